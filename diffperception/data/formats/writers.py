"""From COCO to the folders of Pascal VOC and YOLO. Images are not copied."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import yaml

from diffperception.data.annotations import NO_ID, CocoTable
from diffperception.data.formats.collected import whole
from diffperception.data.formats.voc import WRITER
from diffperception.files import OutputFolder, safe_path, write_text


class WrittenImage(NamedTuple):
    """An image of a table, and which of its annotations are the image's."""

    file: Path  # of its annotations, below the folder of such files
    name: str
    size: tuple[int, int]  # width, height
    rows: np.ndarray  # (n,) int64


def write_voc(table: CocoTable, folder: OutputFolder) -> None:
    """Annotations/NAME.xml for each image, and classes.txt with the classes in order.

    xmin = x + 1 and xmax = x + width, as VOC counts; numbers that are not whole are written with decimals, so nothing
    is rounded. What is `iscrowd` becomes `difficult`.

    Raises:
        ValueError: two images would share a file, or one has no size.
    """
    classes, labels = classes_and_labels(table)
    for image in list(_images(table, ".xml")):  # all names are known to be good before a file is written
        root = ElementTree.Element("annotation")
        _add(root, {"folder": "JPEGImages", "filename": image.name})
        _add(ElementTree.SubElement(root, "source"), {"database": WRITER})
        size = ElementTree.SubElement(root, "size")
        _add(size, {"width": image.size[0], "height": image.size[1], "depth": 3})
        for row in image.rows:
            x, y, width, height = table.boxes[row].tolist()
            thing = ElementTree.SubElement(root, "object")
            _add(thing, {"name": classes[labels[row]], "pose": "Unspecified", "truncated": 0})
            _add(thing, {"difficult": int(table.iscrowd[row])})
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
            _add(ElementTree.SubElement(thing, "bndbox"), {side: whole(value) for side, value in corners.items()})
        ElementTree.indent(root)
        path = folder.file(Path("Annotations", image.file))
        write_text(path, ElementTree.tostring(root, encoding="unicode") + "\n")
    write_text(folder.file("classes.txt"), "\n".join(classes) + "\n")


def _add(element: ElementTree.Element, texts: dict[str, str | float]) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(element, tag).text = str(text)


def write_yolo(table: CocoTable, folder: OutputFolder) -> None:
    """labels/NAME.txt for each image, train.txt with the images, and data.yaml. Crowd regions are left out.

    The images belong into a folder `images` beside them, or a link of that name.

    Raises:
        ValueError: two images would share a file, one has no size, or a name that a file of labels cannot have.
    """
    classes, labels = classes_and_labels(table)
    images = list(_images(table, ".txt"))
    for image in images:
        if image.file.with_suffix("") != Path(image.name).with_suffix(""):
            raise ValueError(f"the image {image.name!r} can have no label file of its name: rename it")
        single = image.rows[~table.iscrowd[image.rows]]
        lines = [_line(labels[row], table.boxes[row].tolist(), image.size) for row in single]
        write_text(folder.file(Path("labels", image.file)), "".join(lines))
    write_text(folder.file("train.txt"), "".join(f"./images/{image.name}\n" for image in images))
    settings = {"path": ".", "train": "train.txt", "val": "train.txt", "names": dict(enumerate(classes))}
    write_text(folder.file("data.yaml"), yaml.safe_dump(settings, allow_unicode=True, sort_keys=False))


def _line(label: int, box: Sequence[float], size: tuple[int, int]) -> str:
    x, y, width, height = box
    values = (x + width / 2) / size[0], (y + height / 2) / size[1], width / size[0], height / size[1]
    return " ".join([str(label), *(f"{value:.10g}" for value in values)]) + "\n"


def coco_content(table: CocoTable) -> dict[str, Any]:
    """A table as the content of a COCO file, with outlines where it has some."""
    rows = np.arange(len(table.boxes))
    ids = np.where(table.annotation_ids == NO_ID, rows + 1, table.annotation_ids).tolist()
    columns = (
        table.annotation_images,
        table.annotation_categories,
        table.boxes,
        table.areas,
        table.iscrowd.astype(int),
    )
    names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    annotations = [dict(zip(names, row, strict=True)) for row in zip(ids, *(c.tolist() for c in columns), strict=True)]
    if table.outlines is not None:
        for entry, outline, is_absent in zip(annotations, table.outlines.of(rows), table.outlines.absent, strict=True):
            entry |= {} if is_absent else {"segmentation": outline}
    images = [
        {"id": number, "file_name": name, "width": width, "height": height}
        for number, name, (width, height) in zip(
            table.image_ids.tolist(), table.file_names, table.sizes.tolist(), strict=True
        )
    ]
    for key, lists in table.image_lists.items():
        for image, categories in zip(images, lists, strict=True):
            image[key] = categories
    known = zip(table.category_ids.tolist(), table.category_names, table.frequencies, strict=True)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name, "frequency": frequency} for number, name, frequency in known],
    }


def classes_and_labels(table: CocoTable) -> tuple[list[str], np.ndarray]:
    """The name of each class, and (A,) the label of each annotation."""
    category_ids, classes = table.labels()
    return classes, np.searchsorted(category_ids, table.annotation_categories)


def _images(table: CocoTable, suffix: str) -> Iterator[WrittenImage]:
    """The images with the names of their files of annotations."""
    image, known = table.rows_of_images
    order = np.argsort(image, kind="stable")
    rows = np.split(known[order], np.searchsorted(image[order], np.arange(1, len(table.image_ids))))
    taken: dict[str, str] = {}
    for name, size, of_image in zip(table.file_names, table.sizes.tolist(), rows, strict=True):
        file = safe_path(name).with_suffix(suffix)
        other = taken.setdefault(file.as_posix().casefold(), name)
        if other is not name:
            raise ValueError(f"the images {other} and {name} would share the file {file}: rename one")
        if min(size) <= 0:
            raise ValueError(f"{name} has no width and height in the annotations: give the folder of the images too")
        yield WrittenImage(file, name, (size[0], size[1]), of_image)
