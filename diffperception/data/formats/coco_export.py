"""COCO as Roboflow, CVAT and Label Studio write it: names of images that need a second look, a category of no object.

Roboflow's file `_annotations.coco.json` lies among the images, and its category 0 is the project's name, the
super-category of the others. Label Studio's file names begin with images/ or are addresses; CVAT's are in order.
"""

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffperception.data.annotations import read_coco
from diffperception.data.formats.collected import Remarks, folder_of_part
from diffperception.data.formats.pictures import find_images, tidy

ROBOFLOW = "_annotations.coco.json"


def read_coco_export(
    path: Path, split: str | None, images: Path | None, outlines: bool, remarks: Remarks
) -> tuple[dict[str, Any], Path]:
    """The content of the file, and the folder of its images: by default the one in which the file lies.

    Args:
        path: the file, or a folder in which it is the one JSON file.
        split: a folder in that.
    """
    file = _file(path if split is None else folder_of_part(path, split))
    content = read_coco(file, outlines)
    _leave_out_project(content, remarks)
    if images is None:
        return content, file.parent
    if _are_lost([entry for entry in content["images"] if isinstance(entry, dict)], images):
        _find_images(content, images, remarks)
    return content, images


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = [path / ROBOFLOW] if (path / ROBOFLOW).is_file() else sorted(path.glob("*.json"))
    if len(files) != 1:
        parts = sorted(folder.parent.name for folder in path.glob(f"*/{ROBOFLOW}"))
        ways = ", ".join(f"{path}:{part}" for part in parts) or "the path of a COCO JSON file"
        raise ValueError(f"{path} is a folder that holds {len(files) or 'no'} JSON files: give {ways}")
    return files[0]


def _leave_out_project(content: dict[str, Any], remarks: Remarks) -> None:
    """Leave out Roboflow's category 0, if it is the super-category of others and no object has it."""
    categories = [entry for entry in content["categories"] if isinstance(entry, dict)]
    above = {entry.get("supercategory") for entry in categories if entry.get("id") != 0}
    used = any(isinstance(a, dict) and a.get("category_id") == 0 for a in content["annotations"])
    for entry in categories:
        if entry.get("id") == 0 and entry.get("supercategory") == "none" and entry.get("name") in above and not used:
            content["categories"].remove(entry)
            remarks.add(
                "the project's name, a category without objects above all others, is left out", str(entry["name"])
            )


def _are_lost(images: list[dict[str, Any]], folder: Path) -> bool:
    """Whether the first image is not where the file says; then all are looked for."""
    names = [entry["file_name"] for entry in images[:1] if isinstance(entry.get("file_name"), str)]
    return folder.is_dir() and any(not (folder / name).is_file() for name in names)


def _find_images(content: dict[str, Any], folder: Path, remarks: Remarks) -> None:
    """Give the images the names of the files that are meant.

    Those that are not found, that may be several files, or of which several would be one file keep theirs.
    """
    index = find_images(None, [folder])
    if index is None:
        return
    entries = [e for e in content["images"] if isinstance(e, dict) and isinstance(e.get("file_name"), str)]
    meant: dict[str, str] = {}
    for written in {entry["file_name"]: None for entry in entries}:
        with suppress(ValueError):
            meant[written] = index.find(written) or ""
    count = Counter(meant.values())
    for entry in entries:
        written, name = entry["file_name"], meant.get(entry["file_name"], "")
        if name not in ("", written) and count[name] == 1:
            remarks.add("images are found under other names than the file's", f"{tidy(written)} as {name}")
            entry["file_name"] = name
