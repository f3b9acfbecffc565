"""Label Studio's JSON export (and JSON-MIN): boxes and polygons in percent of the image's sides.

Its COCO, VOC and YOLO exports are read as such. An image's first annotation that was not cancelled counts. Names are
those of uploaded files (`0a1b2c3d-name.jpg`), of served ones (`/data/local-files/?d=folder/name.jpg`) or addresses; the
image is found by the last part. No library that we know reads this export.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffperception.data.formats.collected import (
    MarkedImage,
    MarkedObject,
    Remarks,
    box_around,
    flat,
    number,
    size_of_image,
    turned,
)
from diffperception.data.formats.pictures import ImageIndex, find_images, tidy
from diffperception.files import read_json

BOXES = ("rectanglelabels", "labels", "rectangle")
ADVICE = "export the project as JSON"


def read_label_studio(
    path: Path, split: str | None, images: Path | None, remarks: Remarks
) -> tuple[list[MarkedImage], list[str] | None, Path]:
    """Images, None for the classes, of which the export has no list, and the folder of the images."""
    tasks = read_json(path)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ValueError(f"{path} is no list of tasks as Label Studio writes: {ADVICE}")
    if split is not None:
        raise ValueError(f"an export of Label Studio has no part {split}: give {path} alone")
    index = find_images(images, (path.parent / "images", path.parent))
    found = [_image(task, f"{path}, task {task.get('id', k)}", index, remarks) for k, task in enumerate(tasks, 1)]
    return [image for image in found if image is not None], None, index.folder if index else path.parent


def _image(task: dict[str, Any], place: str, index: ImageIndex | None, remarks: Remarks) -> MarkedImage | None:
    written = _address(task, place)
    name = tidy(written) if index is None else index.find(written) or index.find(str(task.get("file_upload") or ""))
    if not name:
        remarks.add("images of the export that are missing are left out", written)
        return None
    results = _results(task, place, remarks)
    size: tuple[int, int] | str = f"{place} has no object that tells the size of its image, which is not there"
    sides = next(((r["original_width"], r["original_height"]) for r in results if r.get("original_width")), None)
    if sides is not None:
        size = int(number(sides[0], "original_width", place)), int(number(sides[1], "original_height", place))
    elif index is not None:
        size = size_of_image(index.folder / name)
    if isinstance(size, str):
        remarks.add("images of unknown size are left out", size)
        return None
    found = [
        _object(result, size, f"{place}, region {result.get('id', k)}", remarks) for k, result in enumerate(results)
    ]
    return MarkedImage(name, size, [thing for thing in found if thing is not None], place)


def _address(task: dict[str, Any], place: str) -> str:
    """What the task calls its image: `data` has it under the name that the project's configuration gave it."""
    data = task.get("data") if isinstance(task.get("data"), dict) else task
    assert isinstance(data, dict)
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    for key in ("image", "img", "picture", "photo", "url", "ocr"):
        if key in texts:
            return texts[key]
    paths = [value for value in texts.values() if "/" in value]
    if len(paths) != 1:
        raise ValueError(f"{place} does not tell its image: it must have `data` with `image`; {ADVICE}")
    return paths[0]


def _results(task: dict[str, Any], place: str, remarks: Remarks) -> list[dict[str, Any]]:
    """The regions of a task; of JSON-MIN as the full export has them."""
    annotations = task.get("annotations", task.get("completions"))
    if not isinstance(annotations, list):
        lists = [value for value in task.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        return [{**region, "value": region, "type": _type(region)} for regions in lists for region in regions]
    valid = [a for a in annotations if isinstance(a, dict) and not a.get("was_cancelled")]
    if not valid:
        remarks.add("tasks without an annotation count as images without objects", place)
        return []
    if len(valid) > 1:
        remarks.add("of tasks with several annotations the first counts", place)
    return [result for result in valid[0].get("result") or [] if isinstance(result, dict)]


def _type(region: dict[str, Any]) -> str:
    return next((key for key in region if key.endswith("labels")), "")


def _object(result: dict[str, Any], size: tuple[int, int], place: str, remarks: Remarks) -> MarkedObject | None:
    kind, value = str(result.get("type", "")), result.get("value")
    if kind in ("choices", "relation", "textarea", "rating", "") or not isinstance(value, dict):
        remarks.add("answers that are no regions are left out", place)
        return None
    names = value.get(kind) or []
    if not names or not isinstance(names, list):
        remarks.add("regions without a label are left out", place)
        return None
    if len(names) > 1:
        remarks.add("of regions with several labels the first counts", place)
    points = _corners(kind, value, size, place)
    if points is None:
        remarks.add(f"regions of the kind {kind} are left out", place)
        return None
    straight = "points" not in value and not value.get("rotation")
    if not straight and "points" not in value:
        remarks.add("rotated boxes are read as the boxes around them", place)
    return MarkedObject(str(names[0]), box_around(points), place, None if straight else [flat(points)])


def _corners(kind: str, value: dict[str, Any], size: tuple[int, int], place: str) -> list[Sequence[float]] | None:
    """Points (x, y) in pixels of a box or polygon; None of anything else."""
    width, height = (side / 100 for side in size)
    if isinstance(value.get("points"), list) and kind == "polygonlabels":
        pairs = [[number(v, "a point", place) for v in point] for point in value["points"]]
        return [(x * width, y * height) for x, y in pairs] if len(pairs) > 2 else None
    if kind not in BOXES or not {"x", "y", "width", "height"} <= value.keys():
        return None
    x, y, w, h = (number(value[key], key, place) for key in ("x", "y", "width", "height"))
    box = (x * width, y * height, (x + w) * width, (y + h) * height)
    return list(turned(box, number(value.get("rotation") or 0, "rotation", place), box[:2]))
