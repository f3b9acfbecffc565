"""What the readers of all formats share: images with objects in them, how these become COCO, and what is said."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from diffperception.data.images import BrokenImageError, read_size

Item = TypeVar("Item")
Result = TypeVar("Result")
Box = tuple[float, float, float, float]  # x1 y1 x2 y2 in pixels, from the outer corner of the first pixel
CHUNK = 64  # files that a thread takes at a time
DIGITS = 4  # decimals of pixels that are kept: as many as those of results


class MarkedObject(NamedTuple):
    """An object of an image, as somebody marked it."""

    name: str  # of its class
    box: Box
    place: str  # the file, and the entry in it, for messages
    outline: list[list[float]] | None = None  # polygons x y x y ... in pixels
    ignored: bool = False  # it is neither learned nor counted, as COCO's crowd regions


class MarkedImage(NamedTuple):
    """An image and its objects."""

    file_name: str  # below the folder of images, with slashes
    size: tuple[int, int]  # width, height
    objects: list[MarkedObject]
    place: str  # the file that speaks of it


@dataclass
class Remarks:
    """Counts what a reader passes over or takes in another way than it is written."""

    counts: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, place: str) -> None:
        """Count one more of a kind, such as `boxes without area are left out`; the first place is kept."""
        count, first = self.counts.get(kind, (0, place))
        self.counts[kind] = (count + 1, first)

    def sentences(self) -> list[str]:
        """One a kind."""
        return [f"{kind}: {count}, the first is {first}" for kind, (count, first) in self.counts.items()]


def classes_in_order(images: Sequence[MarkedImage], listed: Sequence[str] | None, remarks: Remarks) -> list[str]:
    """The classes in order: those of a list that lies beside the files if it has all that occur, else these, sorted."""
    found = {thing.name: thing.place for image in images for thing in image.objects}
    absent = [name for name in sorted(found) if listed is not None and name not in listed]
    for name in absent:
        remarks.add(
            "classes that the list beside the files lacks occur, so it is not used", f"{name!r} in {found[name]}"
        )
    return sorted(found) if listed is None or absent else list(listed)


def to_coco(
    images: Iterable[MarkedImage], classes: Sequence[str], remarks: Remarks, source: str | Path
) -> dict[str, Any]:
    """A COCO dictionary. Images count from 1 in the order of their names, categories from 1 in that of the classes.

    Args:
        classes: the names of all classes in order; objects of others are left out and counted.

    Raises:
        ValueError: two files speak of one image, or no image is left; boxes seem to be no pixels; classes share a name.
    """
    images = sorted(images, key=lambda image: image.file_name)
    if not images:
        passed_over = "".join(f" ({sentence})" for sentence in remarks.sentences())
        raise ValueError(f"{source} gives no image{passed_over}: is it the right path and the right format?")
    for one, other in itertools.pairwise(images):
        if one.file_name == other.file_name:
            raise ValueError(f"{one.place} and {other.place} both speak of the image {one.file_name}: remove one")
    _require_pixels(images, source)
    if not classes:
        raise ValueError(f"{source} has no object and no list of classes: there is nothing to learn or to find")
    if twice := [name for name in classes if classes.count(name) > 1]:
        raise ValueError(f"the classes of {source} have {twice[0]!r} more than once: give each a name of its own")
    if not all(name.strip() for name in classes):
        raise ValueError(f"the classes of {source} have an empty name: give each one")
    ids = {name: number for number, name in enumerate(classes, 1)}
    annotations = []
    for image_id, image in enumerate(images, 1):
        kept = [thing for thing in image.objects if _is_usable(thing, image.size, ids, remarks)]
        annotations += [{"image_id": image_id, **_entry(thing, ids)} for thing in kept]
    return {
        "images": [
            {"id": number, "file_name": image.file_name, "width": image.size[0], "height": image.size[1]}
            for number, image in enumerate(images, 1)
        ],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(annotations, 1)],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }


def _is_usable(thing: MarkedObject, size: tuple[int, int], ids: dict[str, int], remarks: Remarks) -> bool:
    x1, y1, x2, y2 = thing.box
    if thing.name not in ids:
        remarks.add(f"objects of the unknown class {thing.name!r} are left out", thing.place)
    elif not (x2 > x1 and y2 > y1):
        remarks.add("boxes without area are left out", thing.place)
    elif x2 <= 0 or y2 <= 0 or x1 >= size[0] or y1 >= size[1]:
        remarks.add("boxes outside of their image are left out", thing.place)
    else:
        if thing.ignored:
            remarks.add("objects marked as difficult, or groups, are neither learned nor counted", thing.place)
        return True
    return False


def _entry(thing: MarkedObject, ids: dict[str, int]) -> dict[str, Any]:
    x1, y1, x2, y2 = thing.box
    box = [whole(value) for value in (x1, y1, x2 - x1, y2 - y1)]
    outline = {} if thing.outline is None else {"segmentation": thing.outline}
    area = whole(box[2] * box[3]) if thing.outline is None else sum(map(polygon_area, thing.outline))
    return {"category_id": ids[thing.name], "bbox": box, "area": area, "iscrowd": int(thing.ignored)} | outline


def whole(value: float) -> float:
    """A length in pixels without the noise of arithmetic, an integer where it is one."""
    rounded = round(value, DIGITS)
    return int(rounded) if rounded == int(rounded) else rounded


def polygon_area(points: Sequence[float]) -> float:
    """The area that a polygon x y x y ... encloses (the shoelace formula)."""
    xs, ys = points[0::2], points[1::2]
    pairs = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return whole(abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in pairs)) / 2)


def _require_pixels(images: Sequence[MarkedImage], source: str | Path) -> None:
    largest = [max(thing.box) for image in images for thing in image.objects]
    if largest and max(largest) <= 1:
        raise ValueError(f"all boxes of {source} lie in 0..1: they seem to be fractions of the images, not pixels")


def box_around(points: Sequence[Sequence[float]]) -> Box:
    """The box around points (x, y)."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def turned(box: Box, degrees: float, pivot: tuple[float, float]) -> list[tuple[float, float]]:
    """The corners of a box after a turn about a point, clockwise as one sees it."""
    sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    x1, y1, x2, y2 = box
    steps = [(x - pivot[0], y - pivot[1]) for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))]
    return [(pivot[0] + dx * cos - dy * sin, pivot[1] + dx * sin + dy * cos) for dx, dy in steps]


def flat(points: Iterable[Sequence[float]]) -> list[float]:
    """Points (x, y) as x y x y ..., as COCO writes polygons."""
    return [value for point in points for value in point]


def number(text: Any, what: str, place: str) -> float:
    """A finite number; ValueError naming the place and what it should be."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{place}: {what} is {text!r}, not a number")
    return value


def folder_of_part(path: Path, part: str) -> Path:
    """The folder of a part such as train, val or test in another; Roboflow calls val valid."""
    names = [part, *({"val": ["valid"], "valid": ["val"]}.get(part, []))]
    found = next((path / name for name in names if (path / name).is_dir()), None)
    if found is None:
        raise ValueError(f"{path} has no folder {part}: give the path of what is meant")
    return found


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], title: str) -> list[Result]:
    """`function` of each item, several at a time, for it waits for the disk; shows a bar."""
    chunks = [items[k : k + CHUNK] for k in range(0, len(items), CHUNK)]
    results: list[Result] = []
    with (
        ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool,
        tqdm(total=len(items), desc=title, leave=False, disable=None) as bar,
    ):
        for part in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
            results += part
            bar.update(len(part))
    return results


def size_of_image(path: Path) -> tuple[int, int] | str:
    """Width and height of an image from its header, or why it has none."""
    try:
        height, width = read_size(path)
    except BrokenImageError as error:
        return str(error)
    return width, height
