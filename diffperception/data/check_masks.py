"""Finding every problem of images with masks."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffperception.data.check_report import Problem, Report
from diffperception.data.images import BrokenImageError, read_image, read_size
from diffperception.data.listing import list_images
from diffperception.data.masks import (
    IGNORE_INDEX,
    MaskDataOptions,
    MaskError,
    MaskValues,
    open_pairs,
    orientation,
    read_mask,
)
from diffperception.data.pairing import Pairing, find_pairs, require_pairs
from diffperception.table import format_table

MEANING = {
    "broken image": "an image cannot be read",
    "broken mask": "a mask cannot be read",
    "painted mask": "a mask has colours in place of numbers, and `mask_values` does not say which class each is",
    "no mask": "a mask does not hold a whole number a pixel",
    "mask size": "a mask is of another size than its image",
    "unknown value": "a mask has values that are no class",
}


@dataclass(frozen=True)
class ClassPixels:
    """How many pixels are of a class, and how many masks have any."""

    name: str
    pixels: int
    masks: int


@dataclass(frozen=True)
class MaskSummary:
    """What the masks of a folder hold."""

    masks: int
    classes: list[ClassPixels]
    ignored: int  # pixels without a label
    values: str  # how many pixels each value has

    def text(self) -> str:
        total = sum(each.pixels for each in self.classes) or 1
        rows = [(c.name, c.pixels, f"{100 * c.pixels / total:.1f} %", c.masks) for c in self.classes]
        table = format_table([*rows, ("ignored", self.ignored, "", "")], ("class", "pixels", "share", "masks"))
        return f"{table}\n\nvalues in {self.masks} masks: {self.values}"


@dataclass(frozen=True)
class MaskSummaries:
    """What is learned from and, if there is any, what is measured on."""

    train: MaskSummary | None
    val: MaskSummary | None

    def text(self) -> str:
        named = {"": self.train, "to measure on:\n\n": self.val}
        return "\n\n".join(title + found.text() for title, found in named.items() if found is not None)


def check_masks(options: MaskDataOptions) -> Report:
    """Look through all images and masks, and name every problem: what training refuses is an error.

    Without names of classes every value is a class of its own.
    """
    problems, train = _check_folder(options, learn=True)
    val = None
    if options.val_images is not None and options.val_masks is not None:
        of_val = replace(options, images=options.val_images, masks=options.val_masks)
        more, val = _check_folder(replace(of_val, annotations=options.val_annotations), learn=False)
        problems += more
    elif options.val_images is not options.val_masks:
        problems.append(Problem("error", "half of val", "give both val_images and val_masks, or neither"))
    if options.val_share is not None and not any(problem.level == "error" for problem in problems):
        problems += _check_split(options)
    summary = MaskSummaries(train, val) if train or val else None
    return Report(sorted(problems, key=lambda problem: problem.level), summary)


def _check_folder(options: MaskDataOptions, learn: bool) -> tuple[list[Problem], MaskSummary | None]:
    masks = Path(options.masks)
    try:
        root, paths, remark = list_images(options.images, options.annotations)
        pairing = find_pairs(paths, root, masks, options.image_suffix, options.mask_suffix)
        values = MaskValues.of(_with_classes(options, pairing))
    except (OSError, ValueError) as error:
        return [Problem("error", "no pairs", str(error))], None
    problems = [Problem("warning", "left out", remark)] if remark else []
    problems += _check_pairs(pairing, options)
    places: dict[str, list[str]] = defaultdict(list)
    counts, in_masks = Counter[int](), Counter[int]()
    turned = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looked = pool.map(partial(_look, values), pairing.pairs)
        for found in tqdm(looked, "masks", len(pairing.pairs), unit="mask", leave=False, disable=None):
            for kind, place in found.faults:
                places[kind].append(place)
            turned += found.turned
            counts += found.counts
            in_masks += Counter(values.present(found.counts))
    problems += [Problem("error", kind, MEANING[kind], places[kind]) for kind in MEANING if places[kind]]
    if turned:
        message = (
            "the EXIF orientation turns an image, and its size does not tell whether its mask is drawn on what is seen"
        )
        problems.append(Problem("warning", "turned image", f"{message}: it is taken to be", turned))
    if not counts:
        return problems, None
    if problem := values.problem(counts, learn):
        problems.append(Problem("error", "classes", f"the masks in {masks} {problem}"))
    elif absent := values.absent(counts):
        problems.append(Problem("warning", "class without pixels", f"the masks in {masks} {absent}"))
    pixels = zip(values.classes, values.per_class(counts), strict=True)
    classes = [ClassPixels(name, number, in_masks[label]) for label, (name, number) in enumerate(pixels)]
    ignored = sum(n for value, n in counts.items() if values.label_of.get(value) == IGNORE_INDEX)
    return problems, MaskSummary(len(pairing.pairs), classes, ignored, values.describe(counts))


def _check_pairs(pairing: Pairing, options: MaskDataOptions) -> Iterator[Problem]:
    """Problems of images and masks that are left over."""
    try:
        require_pairs(pairing, pairing.root, Path(options.masks), options.unlabelled)
    except ValueError as error:
        yield Problem("error", "image without a mask", str(error), list(map(str, pairing.unlabelled)))
    else:
        if pairing.unlabelled:
            left = list(map(str, pairing.unlabelled))
            yield Problem("warning", "image without a mask", "an image has no mask and is left out", left)
    if pairing.unused and options.annotations is None:
        unused = list(map(str, pairing.unused))
        yield Problem("warning", "mask without an image", "a mask has no image and is left out", unused)


@dataclass
class _Look:
    """What is found in one image and its mask."""

    faults: list[tuple[str, str]]
    counts: Counter[int]
    turned: list[str]


def _look(values: MaskValues, pair: tuple[Path, Path]) -> _Look:
    image, mask = pair
    found = _Look([], Counter(), [])
    try:
        read_image(image)
    except BrokenImageError as error:
        found.faults.append(("broken image", str(error)))
    try:
        found.counts = values.count(image, mask)
    except MaskError as error:
        found.faults.append((error.kind, str(error)))
    except BrokenImageError:  # named above
        pass
    else:
        square = len(set(read_size(image))) == 1
        if 1 < (turn := orientation(image)) <= (8 if square else 4):
            found.turned.append(f"{image}: orientation {turn}")
    return found


def _with_classes(options: MaskDataOptions, pairing: Pairing) -> MaskDataOptions:
    """The options with names of classes: where none are given, every value that occurs is a class of its own."""
    if options.classes:
        return options
    if options.mask_values:
        return replace(options, classes=[f"class {k}" for k in range(max(options.mask_values.values()) + 1)])
    values: set[int] = set()
    for _, mask in pairing.pairs:
        try:
            values |= set(np.unique(read_mask(mask)).astype(int).tolist())
        except MaskError:  # named where each mask is looked at
            continue
    labels: Sequence[int] = sorted(values - {options.ignore})
    if len(labels) > IGNORE_INDEX:
        raise ValueError(f"the masks in {options.masks} have {len(labels)} values: are they labels?")
    known = {value: label for label, value in enumerate(labels)}
    return replace(options, classes=[f"value {value}" for value in labels], mask_values=known)


def _check_split(options: MaskDataOptions) -> list[Problem]:
    """What training says of the parts that `val_share` makes."""
    try:
        pairing = open_pairs(options)
        options = _with_classes(options, pairing)
        parts = options.open(), options.open_val()
    except ValueError as error:
        return [Problem("error", "split", str(error))]
    notes = [note for part in parts if part is not None for note in part.notes]
    return [Problem("warning", "class without pixels", note) for note in notes if note not in pairing.remarks()]
