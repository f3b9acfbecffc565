"""Finding every problem of a COCO data set."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from diffperception.data.annotations import RULES, CocoTable, entry_faults, tabulate
from diffperception.data.check_report import Problem, Report, found_at, summarize
from diffperception.data.entries import whole_number
from diffperception.data.formats import Format, open_annotations
from diffperception.data.images import BrokenImageError, read_image
from diffperception.data.soundness import check_ids, check_learning, resizing, with_sizes
from diffperception.files import existing

# What cannot be said of a file of which some of these entries had to be left out.
UNKNOWN = {
    "images": ("no images", "nothing to learn"),
    "annotations": ("no annotations", "nothing to learn", "category without objects"),
    "categories": ("no categories",),
}


def check_coco(
    annotations: str | Path,
    images: str | Path | None = None,
    open_images: bool = True,
    num_boxes: PositiveInt | None = None,
    short_side: PositiveInt | None = None,
    max_long_side: PositiveInt | None = None,
    format: Format = "coco",
) -> Report:
    """Read a data set and name every problem of it.

    An entry with a missing key or a value that cannot be used is named and left out of what is checked after it.

    Args:
        annotations: COCO JSON file, or what `format` says.
        images: folder of its images; null: where the format has them; of COCO only the annotations are checked.
        open_images: decode every image and compare its size; false only looks whether the files are there.
        num_boxes: proposals of the detector to train; images with more objects are named.
        short_side: largest of the short sides that training resizes images to, in pixels (`short_sides` of its
            transforms); objects that are less than a pixel wide or high then are counted.
        max_long_side: in pixels, as in those transforms; where the long side would exceed it, images become smaller.
        format: coco, voc (Pascal VOC), yolo, cvat, labelstudio, labelme or csv; auto looks for itself.
    """
    try:
        _, content, found_images, notes = open_annotations(annotations, images, format)
    except (OSError, ValueError) as error:
        return Report([Problem("error", "unreadable file", str(error))], None)
    faulty = list(entry_faults(content))
    table, listed = _sound_part(content, annotations, {(section, index) for section, index, _, _ in faulty})
    del content  # gigabytes, for a large file
    problems = [Problem("warning", "passed over", note) for note in notes]
    places = [fault.sentence() for fault in faulty]
    problems += found_at("error", "unusable entry", "an entry lacks a key or has a value that cannot be used", places)
    folder = found_images if images is not None or format != "coco" else None
    table = table if folder is None else with_sizes(table, folder)
    scale = None if short_side is None else resizing(table.sizes, short_side, max_long_side)
    problems += [*check_ids(table, listed), *check_learning(table, num_boxes, scale)]
    problems += [] if folder is None else check_files(table, folder, open_images)
    unknown = {kind for section in {fault.section for fault in faulty} for kind in UNKNOWN[section]}
    problems = [problem for problem in problems if problem.kind not in unknown]
    return Report(sorted(problems, key=lambda problem: problem.level), summarize(table))


def _sound_part(
    content: Mapping[str, list[Any]], source: str | Path, left_out: set[tuple[str, int]]
) -> tuple[CocoTable, dict[str, list[int]]]:
    """The table of all entries but some, by list and index, and the ids of all images and categories listed."""
    kept = {section: [i for i in range(len(content[section])) if (section, i) not in left_out] for section in RULES}
    table = tabulate({section: [content[section][i] for i in rows] for section, rows in kept.items()}, source)
    listed = {"image": table.image_ids.tolist(), "category": table.category_ids.tolist()}
    sections = {"images": "image", "categories": "category"}
    for section, index in left_out:
        if section in sections:
            with suppress(KeyError, TypeError, ValueError):
                listed[sections[section]].append(whole_number(content[section][index]["id"]))
    return replace(table, entries=np.array(kept["annotations"], dtype=np.int64)), listed


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
        yield from found_at("error", kind, message, places[kind])


def _file_problem(path: Path, size: list[int], open_image: bool) -> tuple[str, str] | None:
    """Which of FILE_PROBLEMS a file has that should be an image of this width and height, and what to say of it."""
    if not existing(path).is_file():
        return "missing image", str(path)
    if not open_image:
        return None
    try:
        _, height, width = read_image(path).shape
    except BrokenImageError as error:
        return "broken image", str(error)
    if size in ([width, height], [0, 0]):  # 0: the file does not say
        return None
    turned = ": does its EXIF orientation turn it?" if [height, width] == size else ""
    return "image size", f"{path} is {width}x{height}, not {size[0]}x{size[1]}{turned}"
