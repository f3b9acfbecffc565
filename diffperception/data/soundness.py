"""The rules by which a COCO data set can be used or not: those of `check`, of training and of scoring alike.

An error makes training or its measurement impossible or wrong, and is refused; a warning may be meant, and is said.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffperception.data.annotations import ADVICE, NO_ID, CocoTable
from diffperception.data.check_report import Level, Problem, found_at
from diffperception.data.images import BrokenImageError, read_size

TOLERANCE = 1.0  # pixels by which a box may reach over the border: annotation tools round
NAMES = {"image": "images", "annotation": "annotations", "category": "categories"}  # of the lists of entries
LEAST_SIDE = 1.0  # pixels of a box, in the image as it is seen, for it to be learned or found


def with_sizes(table: CocoTable, folder: Path) -> CocoTable:
    """The table with the sizes that the file does not give from the images' headers; 0 where there is no such image."""
    unknown = np.flatnonzero(table.sizes[:, 0] == 0)
    if not len(unknown):
        return table
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = list(pool.map(_header_size, (folder / table.file_names[row] for row in unknown)))
    sizes = table.sizes.copy()
    sizes[unknown] = read
    return replace(table, sizes=sizes)


def _header_size(path: Path) -> tuple[int, int]:
    try:
        height, width = read_size(path)
    except BrokenImageError:
        return 0, 0
    return width, height


def require_entries(table: CocoTable) -> None:
    """ValueError, naming the file and the first place, if its entries do not fit one another: see `check_ids`."""
    require([problem for problem in check_ids(table) if problem.level == "error"], table.source)


def require(errors: Sequence[Problem], source: str | Path) -> None:
    """ValueError with the first of the errors that were found in a file, if there are any."""
    if errors:
        advice = f" ({ADVICE})" if errors[0].places else ""
        raise ValueError(f"{source} cannot be used: {errors[0].sentence()}{advice}")


def check_learning(table: CocoTable, num_boxes: int | None = None, scale: np.ndarray | None = None) -> list[Problem]:
    """What hinders or changes learning from a table whose entries fit one another.

    Args:
        num_boxes: proposals of the detector, if known.
        scale: (I,) the most that each image is enlarged by before it is seen, if known.
    """
    return [*check_boxes(table), *check_objects(table, scale), *check_counts(table, num_boxes)]


def check_ids(table: CocoTable, listed: Mapping[str, Sequence[int]] | None = None) -> Iterator[Problem]:
    """Problems of entries that refer to one another: ids and names that occur twice or belong to nothing.

    Args:
        listed: the ids that the file lists of each kind, where the table lacks some of its entries.
    """
    if not len(table.image_ids):
        yield Problem("error", "no images", "the file lists no images")
    if not len(table.category_ids):
        yield Problem("error", "no categories", "the file lists no categories")
    given = table.annotation_ids[table.annotation_ids != NO_ID]
    levels: tuple[tuple[Level, str, np.ndarray], ...] = (
        ("error", "image", table.image_ids),
        ("warning", "annotation", given),
        ("error", "category", table.category_ids),
    )
    for level, kind, ids in levels:
        yield from found_at(
            level,
            f"double {kind} id",
            f"several {NAMES[kind]} have the same id, which must be each's own",
            _repeated(ids),
        )
    names, files = (_repeated_texts(texts) for texts in (table.category_names, table.file_names))
    message = "several categories have the same name, to which their id is added"
    yield from found_at("warning", "double category name", message, names)
    message = "several images have the same file, so each learns the objects of the others as background"
    yield from found_at("warning", "double file name", message, files)
    for kind, a_kind, ids, known in (
        ("image", "an image", table.annotation_images, table.image_ids),
        ("category", "a category", table.annotation_categories, table.category_ids),
    ):
        rows = np.flatnonzero(~np.isin(ids, list(listed[kind]) if listed else known))
        places = [f"{table.place(row)}: {kind} id {ids[row]}" for row in rows.tolist()]
        yield from found_at("error", f"unknown {kind} id", f"an annotation has {a_kind} id that is not listed", places)


def _repeated(ids: np.ndarray) -> list[str]:
    unique, counts = np.unique(ids, return_counts=True)
    return [f"{value}: {count} times" for value, count in zip(unique[counts > 1], counts[counts > 1], strict=True)]


def _repeated_texts(texts: Sequence[str]) -> list[str]:
    return [f"{value}: {count} times" for value, count in sorted(Counter(texts).items()) if count > 1]


def check_boxes(table: CocoTable) -> Iterator[Problem]:
    """Problems of boxes: no area, outside of their image, or written in another way than x, y, width, height."""
    image, known = table.rows_of_images
    measured = table.sizes[image, 0] > 0
    image, known = image[measured], known[measured]
    boxes, sizes = table.boxes[known], table.sizes[image]

    flat = (boxes[:, 2:] <= 0).any(axis=1)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    over = (low < -TOLERANCE).any(axis=1) | (high > sizes + TOLERANCE).any(axis=1)
    outside = ((high <= 0) | (low >= sizes)).any(axis=1)

    def found(kind: str, message: str, chosen: np.ndarray) -> list[Problem]:
        rows = zip(known[chosen], image[chosen], boxes[chosen].tolist(), strict=True)
        texts = ((row, table.file_names[i], ", ".join(f"{x:g}" for x in box)) for row, i, box in rows)
        return found_at(
            "warning", kind, message, [f"{table.place(row)} in {name}: box {box}" for row, name, box in texts]
        )

    message = "a box has a width or height of 0 or less, it is left out of training and measurement"
    yield from found("box without area", message, flat)
    if _look_like_corners(boxes, sizes):
        message = "the boxes seem to be written as x1, y1, x2, y2; COCO's are x, y, width, height"
        yield Problem("error", "boxes as corners", f"{message}, and {over.sum()} of {len(boxes)} leave their image so")
        return
    if len(boxes) and boxes.max() <= 1:
        yield Problem("error", "boxes as fractions", "all boxes lie in 0..1: they seem not to be in pixels")
    message = "a box lies wholly outside of its image, it is left out of training"
    yield from found("box outside", message, outside & ~flat)
    message = "a box reaches out of its image, it is clipped in training"
    yield from found("box over the border", message, over & ~outside & ~flat)


def _look_like_corners(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether nearly all boxes make sense as x1 y1 x2 y2, and many make none as x y width height.

    Corners always have x2 > x1 and y2 > y1 inside the image, and read as widths and heights most of them reach far over
    the border. Real widths and heights do so only by the odd pixel, and exceed x and y for large objects alone.
    """
    as_corners = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sizes + TOLERANCE)
    far_over = boxes[:, :2] + boxes[:, 2:] > 1.05 * sizes + TOLERANCE
    return len(boxes) > 0 and as_corners.all(axis=1).mean() > 0.98 and far_over.any(axis=1).mean() > 0.2


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) x y width height -> float32 x1 y1 x2 y2 inside images of `sizes` (n, 2) width height."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return np.clip(corners, 0, np.tile(sizes, 2)).astype(np.float32)


def check_objects(table: CocoTable, scale: np.ndarray | None) -> Iterator[Problem]:
    """Whether there is anything to learn: annotations, no crowds, with an area in their image, that stay visible."""
    image, known = table.rows_of_images
    sizes = np.where(table.sizes[image] > 0, table.sizes[image], np.inf)
    boxes = clip_boxes(table.boxes[known], sizes)
    alone, visible = ~table.iscrowd[known], (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    if not len(table.boxes):
        yield Problem("error", "no annotations", "the file has no annotations: there is nothing to learn or to find")
    elif table.iscrowd.all():
        message = "every annotation is a crowd region (iscrowd 1), which is not learned: there is nothing to learn"
        yield Problem("error", "nothing to learn", message)
    elif not (alone & visible).any():
        message = "no object has a box with an area inside its image: there is nothing to learn"
        yield Problem("error", "nothing to learn", message)
    elif scale is not None:
        learned = alone & visible
        small = objects_below(boxes, scale[image]) & learned
        if small.any():
            tiny, all_of_them = int(small.sum()), int(learned.sum())
            yield Problem(
                "error" if tiny == all_of_them else "warning",
                "objects below a pixel",
                f"{tiny} of {all_of_them} objects are less than a pixel wide or high after resizing, so they are not"
                " learned: larger images are needed (short_sides and max_long_side of the transforms), or windows of"
                " them (data.tile)",
            )


def objects_below(boxes: np.ndarray, scale: np.ndarray, side: float = LEAST_SIDE) -> np.ndarray:
    """(n,) bool, which boxes (n, 4) xyxy have a side below so many pixels in images that are enlarged by scale (n,)."""
    return ((boxes[:, 2:] - boxes[:, :2]) * scale[:, None] < side).any(axis=1)


def resizing(sizes: np.ndarray, short_side: float | None, long_side: float | None) -> np.ndarray:
    """(n,) what images of `sizes` (n, 2) are enlarged by for this short side in pixels, or less for this long one."""
    if short_side is None:
        return np.ones(len(sizes))
    sides = np.maximum(sizes, 1)
    scale = short_side / sides.min(axis=1)
    return scale if long_side is None else np.minimum(scale, long_side / sides.max(axis=1))


def check_counts(table: CocoTable, num_boxes: int | None) -> Iterator[Problem]:
    """Problems of numbers: classes that do not occur, sizes that are not given, more objects than proposals."""
    unknown = [table.file_names[row] for row in np.flatnonzero(table.sizes[:, 0] == 0)]
    message = "the file gives no width and height of an image: they are read from the images, where those are known"
    yield from found_at("warning", "unknown size", message, unknown)
    absent = ~np.isin(table.category_ids, table.annotation_categories)
    names = [f"{table.category_names[k]} (id {table.category_ids[k]})" for k in np.flatnonzero(absent)]
    if len(table.boxes):
        yield from found_at("warning", "category without objects", "a category has no objects", names)
    if num_boxes is not None:
        yield from crowded_images(table.image_ids, _objects_per_image(table), num_boxes)


def _objects_per_image(table: CocoTable) -> np.ndarray:
    image, known = table.rows_of_images
    return np.bincount(image[~table.iscrowd[known]], minlength=len(table.image_ids))


def crowded_images(image_ids: Sequence[Any] | np.ndarray, objects: np.ndarray, num_boxes: int) -> list[Problem]:
    """Images with more objects (I,) than a detector has proposals."""
    places = [f"image {image_ids[row]}: {objects[row]} objects" for row in np.flatnonzero(objects > num_boxes).tolist()]
    message = f"an image has more objects than the detector's {num_boxes} proposals can find"
    return found_at("warning", "more objects than proposals", message, places)
