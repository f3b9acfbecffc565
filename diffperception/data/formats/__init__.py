"""Annotations as people have them: each format becomes a COCO dictionary.

Each has a module; corners are pixels from the outer corner of the first pixel, as COCO's.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from diffperception.data.annotations import tabulate
from diffperception.data.formats.coco_export import ROBOFLOW, read_coco_export
from diffperception.data.formats.collected import MarkedImage, Remarks, classes_in_order, to_coco
from diffperception.data.formats.csv_table import read_csv
from diffperception.data.formats.cvat import read_cvat
from diffperception.data.formats.labelme import read_labelme
from diffperception.data.formats.labelstudio import read_label_studio
from diffperception.data.formats.voc import read_voc
from diffperception.data.formats.yolo import find_classes, read_yolo
from diffperception.data.split import held_out

Format = Literal["coco", "voc", "yolo", "cvat", "labelstudio", "labelme", "csv", "auto"]
Reader = Callable[[Path, str | None, Path | None, Remarks], tuple[list[MarkedImage], list[str] | None, Path]]
READERS: dict[str, Reader] = {
    "voc": read_voc,
    "yolo": read_yolo,
    "cvat": read_cvat,
    "labelstudio": read_label_studio,
    "labelme": read_labelme,
    "csv": read_csv,
}


class Annotations(NamedTuple):
    """What was read."""

    source: str  # the file or folder, for messages
    content: dict[str, Any]  # of COCO
    images: Path  # the folder that its file names are relative to
    notes: list[str]  # what was passed over, or taken in another way than it is written


def open_annotations(
    path: str | Path,
    images: str | Path | None = None,
    format: Format = "coco",
    outlines: bool = False,
    classes: Sequence[str] | None = None,
) -> Annotations:
    """Read the annotations of a file or folder.

    Args:
        path: the file or folder; `data.yaml:val` or `VOC2007:val` is one part of what it lists.
        images: the folder of the images; by default where the format has them.
        format: of which kind it is; auto looks for itself.
        outlines: whether polygons are wanted too.
        classes: all classes in order, for formats that do not list them (VOC, CSV, LabelMe, Label Studio, CVAT);
            objects of others are left out and counted.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image.
        ValueError: it is of another format, which is named, or an entry is wrong, which is named.
    """
    folder = None if images is None else Path(images)
    place, part = split_part(str(path))
    if not place.exists():
        raise FileNotFoundError(f"there is no annotation file or folder {place}")
    kind = detect_format(place)
    if format == "auto" and kind is None:
        raise ValueError(f"the format of {place} is not clear: name one of {', '.join(['coco', *READERS])}")
    if format == "coco" and kind not in (None, "coco"):
        raise ValueError(
            f"{place} seems to be of the format {kind}, not coco: give --format {kind}, in training --data.format"
        )
    chosen = kind if format == "auto" else format
    remarks = Remarks()
    if chosen == "coco":
        content, found = read_coco_export(place, part, folder, outlines, remarks)
        return Annotations(str(path), content, found, remarks.sentences())
    marked, listed, found = READERS[str(chosen)](place, part, folder, remarks)
    if listed is None or chosen != "yolo":  # YOLO's classes are numbers, which only its own list names
        listed = classes_in_order(marked, listed, remarks) if classes is None else list(classes)
    content = to_coco(marked, listed, remarks, path)
    if not outlines:
        for entry in content["annotations"]:
            entry.pop("segmentation", None)
    return Annotations(str(path), content, found, remarks.sentences())


def split_annotations(found: Annotations, share: float, seed: int) -> tuple[Annotations, Annotations]:
    """Annotations without the images that are held out, and those of these; see :func:`held_out`.

    Raises:
        ValueError: an entry cannot be used, or the share is not between 0 and 1.
    """
    table = tabulate(found.content, found.source)
    out = np.array(held_out(table.file_names, share, seed))
    of_held_out = np.isin(table.annotation_images, table.image_ids[out])
    kept, held = (
        found.content | {"images": _chosen(found, "images", images), "annotations": _chosen(found, "annotations", rows)}
        for images, rows in ((~out, ~of_held_out), (out, of_held_out))
    )
    note = f"{out.sum()} of {len(out)} images are held out to be scored on, chosen by their names and the seed {seed}"
    return (
        found._replace(content=kept, notes=[*found.notes, note]),
        found._replace(content=held, notes=[], source=f"{found.source} (held out)"),
    )


def _chosen(found: Annotations, section: str, rows: np.ndarray) -> list[Any]:
    return [entry for entry, chosen in zip(found.content[section], rows.tolist(), strict=True) if chosen]


def split_part(path: str) -> tuple[Path, str | None]:
    """A path and the part of it that is meant: `data.yaml:val` is data.yaml and val, if there is no such file."""
    whole, _, part = path.rpartition(":")
    if whole and re.fullmatch(r"[\w.-]+", part) and not Path(path).exists() and Path(whole).exists():
        return Path(whole), part
    return Path(path), None


def detect_format(path: Path) -> str | None:
    """The format that a file or folder seems to have; None if that is not clear."""
    if path.is_dir():
        return _format_of_folder(path)
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml", ".data"):
        return "yolo"
    if suffix in (".csv", ".tsv"):
        return "csv"
    if suffix == ".txt":
        return "voc" if any((parent / "Annotations").is_dir() for parent in path.absolute().parents[:4]) else "yolo"
    with open(path, "rb") as file:
        beginning = file.read(4096).decode(errors="ignore").lstrip("\ufeff \n\r\t")
    if suffix == ".xml":
        return "cvat" if "<annotations" in beginning else "voc"
    if suffix == ".json" and beginning.startswith("["):  # a file of results is a list too
        return "labelstudio" if '"annotations"' in beginning or "labels" in beginning else None
    if suffix == ".json":
        return "labelme" if '"shapes"' in beginning and '"categories"' not in beginning else "coco"
    return None


def _format_of_folder(path: Path) -> str | None:
    if (path / "Annotations").is_dir():
        return "voc"
    if (path / ROBOFLOW).is_file() or any(path.glob(f"*/{ROBOFLOW}")):
        return "coco"
    if (path / "labels").is_dir():
        return "yolo"
    for ending in ("*.xml", "*.json"):
        if first := next(path.glob(ending), None):
            return detect_format(first)
    if find_classes(path).names is not None:
        return "yolo"
    return detect_format(first) if (first := next(path.rglob("*.xml"), None)) else None
