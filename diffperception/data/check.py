"""Finding every problem of a COCO data set."""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diffperception.data.annotations import CocoTable, read_coco, tabulate
from diffperception.data.check_report import Level, Problem, Report, summarize
from diffperception.data.images import BrokenImageError, read_image

TOLERANCE = 1.0  # pixels by which a box may reach over the border: annotation tools round


def check_coco(
    annotations: str | Path, images: str | Path | None = None, open_images: bool = True, num_boxes: int | None = None
) -> Report:
    """Read a COCO data set and name every problem of it.

    An entry with a missing key or a value of a wrong type is named and left out of what is checked after it.

    Args:
        annotations: COCO JSON file.
        images: folder of its images; null: only the annotations are checked.
        open_images: decode every image and compare its size; false only looks whether the files are there.
        num_boxes: proposals of the detector to train; images with more objects are named.
    """
    try:
        content = read_coco(annotations)
    except (OSError, ValueError) as error:
        return Report([Problem("error", "unreadable file", str(error))], None)
    sound, faults = sound_entries(content)
    table = tabulate(sound, annotations)
    del content, sound  # gigabytes, for a large file
    problems = _found("error", "unusable entry", "an entry lacks a key or has a wrong value in it", faults)
    problems += [*check_ids(table), *check_boxes(table), *check_counts(table, num_boxes)]
    if images is not None:
        problems += check_files(table, Path(images), open_images)
    return Report(sorted(problems, key=lambda problem: problem.level), summarize(table))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


Rule = tuple[Callable[[Any], bool], str]
ID: Rule = (_is_whole, "a whole number")
TEXT: Rule = (lambda value: isinstance(value, str) and value != "", "a text")
SIDE: Rule = (lambda value: _is_whole(value) and value > 0, "a whole number above 0")
BOX: Rule = (_is_box, "four finite numbers")
AREA: Rule = (lambda value: _is_number(value) and value >= 0, "a number from 0")
FLAG: Rule = (lambda value: value in (0, 1), "0 or 1")
RULES = {
    "images": {"id": ID, "file_name": TEXT, "width": SIDE, "height": SIDE},
    "annotations": {"id": ID, "image_id": ID, "category_id": ID, "bbox": BOX, "area": AREA, "iscrowd": FLAG},
    "categories": {"id": ID, "name": TEXT},
}
OPTIONAL = ("area", "iscrowd")


def sound_entries(content: dict[str, list[Any]]) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The entries that have all keys with values of the right type, and what is wrong with each of the others."""
    sound: dict[str, list[dict[str, Any]]] = {section: [] for section in RULES}
    faults = []
    for section, entries in sound.items():
        for index, entry in enumerate(content[section]):
            found = _faults(section, entry)
            called = f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else ""
            faults += [f"{section}[{index}]{called}: {fault}" for fault in found]
            if not found:
                entries.append(entry)
    return sound, faults


def _faults(section: str, entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return ["it is not an object with keys"]
    missing = [f'no "{key}"' for key in RULES[section] if key not in entry and key not in OPTIONAL]
    wrong = [
        f'"{key}" is {entry[key]!r}, not {expected}'
        for key, (is_right, expected) in RULES[section].items()
        if key in entry and not is_right(entry[key])
    ]
    return missing + wrong


def check_ids(table: CocoTable) -> Iterator[Problem]:
    """Problems of entries that refer to one another: ids and names that occur twice or belong to nothing."""
    columns = {"image": table.image_ids, "annotation": table.annotation_ids, "category": table.category_ids}
    for kind, ids in columns.items():
        yield from _found("error", f"double {kind} id", f"several entries have the same {kind} id", _repeated(ids))
    names, files = _repeated(table.category_names), _repeated(table.file_names)
    yield from _found("warning", "double category name", "several categories have the same name", names)
    yield from _found("warning", "double file name", "several images have the same file", files)
    for kind, ids, known in (
        ("image", table.annotation_images, table.image_ids),
        ("category", table.annotation_categories, table.category_ids),
    ):
        rows = np.flatnonzero(~np.isin(ids, known))
        places = [f"annotation {a}: {kind} id {k}" for a, k in zip(table.annotation_ids[rows], ids[rows], strict=True)]
        yield from _found("error", f"unknown {kind} id", f"an annotation names a {kind} that is not listed", places)


def _repeated(values: np.ndarray | list[str]) -> list[str]:
    unique, counts = np.unique(values, return_counts=True)
    return [f"{value}: {count} times" for value, count in zip(unique[counts > 1], counts[counts > 1], strict=True)]


def check_boxes(table: CocoTable) -> Iterator[Problem]:
    """Problems of boxes: no area, outside of their image, or written in another way than x, y, width, height."""
    image, known = table.rows_of_images()
    boxes, sizes = table.boxes[known], table.sizes[image]

    flat = (boxes[:, 2:] <= 0).any(axis=1)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    over = (low < -TOLERANCE).any(axis=1) | (high > sizes + TOLERANCE).any(axis=1)
    outside = ((high <= 0) | (low >= sizes)).any(axis=1)

    def found(level: Level, kind: str, message: str, chosen: np.ndarray) -> list[Problem]:
        rows = zip(table.annotation_ids[known[chosen]], image[chosen], boxes[chosen].tolist(), strict=True)
        places = [f"annotation {a} in {table.file_names[i]}: box {', '.join(f'{x:g}' for x in b)}" for a, i, b in rows]
        return _found(level, kind, message, places)

    message = "a box has a width or height of 0 or less, it is left out of training and measurement"
    yield from found("error", "box without area", message, flat)
    if _look_like_corners(boxes, sizes):
        message = "the boxes seem to be written as x1, y1, x2, y2; COCO's are x, y, width, height"
        yield Problem("error", "boxes as corners", f"{message}, and {over.sum()} of {len(boxes)} leave their image so")
        return
    if len(boxes) and boxes.max() <= 1:
        yield Problem("error", "boxes as fractions", "all boxes lie in 0..1: they seem not to be in pixels")
    yield from found("error", "box outside", "a box lies wholly outside of its image", outside & ~flat)
    message = "a box reaches out of its image, it is clipped in training"
    yield from found("warning", "box over the border", message, over & ~outside & ~flat)


def _look_like_corners(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether nearly all boxes make sense as x1 y1 x2 y2, and many make none as x y width height.

    Corners always have x2 > x1 and y2 > y1 inside the image, and read as widths and heights most of them reach far over
    the border. Real widths and heights do so only by the odd pixel, and exceed x and y for large objects alone.
    """
    as_corners = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sizes + TOLERANCE)
    far_over = boxes[:, :2] + boxes[:, 2:] > 1.05 * sizes + TOLERANCE
    return len(boxes) > 0 and as_corners.all(axis=1).mean() > 0.98 and far_over.any(axis=1).mean() > 0.2


def check_counts(table: CocoTable, num_boxes: int | None) -> Iterator[Problem]:
    """Problems of numbers: nothing to learn from, classes that do not occur, more objects than proposals."""
    if not len(table.image_ids):
        yield Problem("error", "no images", "the file lists no images")
    if not len(table.category_ids):
        yield Problem("error", "no categories", "the file lists no categories")
    if not len(table.boxes):
        yield Problem("error", "no annotations", "the file has no annotations: there is nothing to learn or to find")
        return
    absent = ~np.isin(table.category_ids, table.annotation_categories)
    names = [f"{table.category_names[k]} (id {table.category_ids[k]})" for k in np.flatnonzero(absent)]
    yield from _found("warning", "category without objects", "a category has no objects", names)
    if num_boxes is not None:
        ids, counts = np.unique(table.annotation_images[~table.iscrowd], return_counts=True)
        crowded = counts > num_boxes
        places = [f"image {i}: {count} objects" for i, count in zip(ids[crowded], counts[crowded], strict=True)]
        message = f"an image has more objects than the detector's {num_boxes} proposals can find"
        yield from _found("warning", "more objects than proposals", message, places)


def _found(level: Level, kind: str, message: str, places: list[str]) -> list[Problem]:
    """The problem, if it was found at any place."""
    return [Problem(level, kind, message, places)] if places else []


FILE_PROBLEMS = {
    "missing image": "an image file is missing",
    "broken image": "an image file cannot be read",
    "image size": "an image is of another size than the file says, so boxes are off",
}


def check_files(table: CocoTable, folder: Path, open_images: bool) -> Iterator[Problem]:
    """Problems of image files, each decoded if `open_images`, several at a time."""
    if not folder.is_dir():
        yield Problem("error", "no image folder", f"there is no image folder {folder}")
        return
    paths = [folder / name for name in table.file_names]
    places: dict[str, list[str]] = {kind: [] for kind in FILE_PROBLEMS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(partial(_file_problem, open_image=open_images), paths, table.sizes.tolist())
        for found in tqdm(results, "images", len(paths), unit="image", leave=False, disable=None):
            if found is not None:
                places[found[0]].append(found[1])
    for kind, message in FILE_PROBLEMS.items():
        yield from _found("error", kind, message, places[kind])


def _file_problem(path: Path, size: list[int], open_image: bool) -> tuple[str, str] | None:
    """Which of FILE_PROBLEMS a file has that should be an image of this width and height, and what to say of it."""
    if not path.is_file():
        return "missing image", str(path)
    if not open_image:
        return None
    try:
        _, height, width = read_image(path).shape
    except BrokenImageError as error:
        return "broken image", str(error)
    if [width, height] == size:
        return None
    turned = ": does its EXIF orientation turn it?" if [height, width] == size else ""
    return "image size", f"{path} is {width}x{height}, not {size[0]}x{size[1]}{turned}"
