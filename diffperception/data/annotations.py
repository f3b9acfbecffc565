"""COCO annotation files: reading them, which label a category has, and their content as compact, checked columns."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffperception.data.entries import (
    Rule,
    box,
    boxes,
    category_name,
    faults,
    finite_number,
    flag,
    flags,
    integers,
    numbers,
    text,
    whole_number,
)
from diffperception.data.outlines import Outlines, outline
from diffperception.files import read_json

ADVICE = "`diffperception check` lists every problem of the file"
NO_ID = int(np.iinfo(np.int64).min)  # of annotations without one
ID = Rule(whole_number, "a whole number of at most 63 bits")
SIDE = Rule(lambda value: _side(value), "a whole number from 0", optional=True)
IDS = Rule(lambda value: [whole_number(part) for part in value], "a list of whole numbers", optional=True)
LISTS = ("images", "annotations", "categories")
LVIS_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")
RULES: dict[str, dict[str, Rule]] = {
    "images": {
        "id": ID,
        "file_name": Rule(text, "a text"),
        "width": SIDE,
        "height": SIDE,
        **dict.fromkeys(LVIS_LISTS, IDS),
    },
    "annotations": {
        "id": Rule(whole_number, ID.expected, optional=True),
        "image_id": ID,
        "category_id": ID,
        "bbox": Rule(box, "a list of four finite numbers"),
        "area": Rule(lambda value: _area(value), "a number from 0", optional=True),
        "iscrowd": Rule(flag, "0 or 1", optional=True),
    },
    "categories": {"id": ID, "name": Rule(category_name, "a text")},
}
OUTLINE = {"segmentation": Rule(outline, "polygons of three points or more, or run lengths", optional=True)}


def read_coco(path: str | Path, outlines: bool = False, lists: Sequence[str] = LISTS) -> dict[str, Any]:
    """The content of a COCO annotation file, with the lists `images`, `annotations` and `categories`.

    Where images are named by a URL alone, as in LVIS, its last two parts become the file_name: train2017/000001.jpg.

    Args:
        outlines: whether outlines (`segmentation`) are wanted. They are most of a large file: where nobody needs them,
            they are dropped while parsing and take no memory.
        lists: those that it must hold; captions, for example, are without categories.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or one of the lists is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no annotation file {path}: give the path of a COCO JSON file")
    content = read_json(path, None if outlines else _without_outline)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        raise ValueError(f"{path} is not a COCO annotation file: it must hold the lists {', '.join(lists)}")
    for image in content["images"]:
        if isinstance(image, dict) and isinstance(image.get("coco_url"), str):
            image.setdefault("file_name", "/".join(image["coco_url"].split("/")[-2:]))
    return content


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


def _side(value: Any) -> int:
    if (read := whole_number(value)) < 0:
        raise ValueError(f"{value!r} is below 0")
    return read


def _area(value: Any) -> float:
    """An area in pixels; nan, for none, where the value is so or null."""
    if value is None or value != value:
        return np.nan
    if (read := finite_number(value)) < 0:
        raise ValueError(f"{value!r} is below 0")
    return read


def labels_of(category_ids: Sequence[int], names: Sequence[str]) -> tuple[list[int], list[str]]:
    """The category id and the class name of each label 0..K-1: labels count the categories in the order of their ids.

    Where several categories share a name, the id is added to it, so that names are unique.
    """
    pairs = sorted(zip(category_ids, names, strict=True))
    unique = [f"{name} (id {number})" if list(names).count(name) > 1 else name for number, name in pairs]
    return [number for number, _ in pairs], unique


def require_same_classes(wanted: Sequence[str], names: Sequence[str], source: str | Path, owner: str | Path) -> None:
    """ValueError that says which classes differ unless a file's are those of their owner, in whatever order."""
    lacking, unknown = [x for x in wanted if x not in names], [x for x in names if x not in wanted]
    if lacking or unknown:
        parts = [f"it has no {shortened(lacking)}"] if lacking else []
        parts += [f"only it has {shortened(unknown)}"] if unknown else []
        raise ValueError(
            f"{source} has other classes than {owner}: {', and '.join(parts)}; label numbers would mean different"
            " things, so give both the same"
        )


def shortened(names: Sequence[str]) -> str:
    """The first five names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


@dataclass(frozen=True)
class CocoTable:
    """The parts of a COCO file that detection needs, one array a column; I images, A annotations, K categories.

    The parsed JSON of a large file takes gigabytes of small Python objects, and every worker process that reads one
    copies its page because of the reference count. Arrays have neither cost.
    """

    source: str  # the file, for messages
    image_ids: np.ndarray  # (I,) int64
    file_names: list[str]
    sizes: np.ndarray  # (I, 2) int64: width, height; 0, 0 where the file does not say
    category_ids: np.ndarray  # (K,) int64, as listed in the file
    category_names: list[str]
    annotation_ids: np.ndarray  # (A,) int64, NO_ID where the file gives none
    annotation_images: np.ndarray  # (A,) int64 image ids
    annotation_categories: np.ndarray  # (A,) int64 category ids
    boxes: np.ndarray  # (A, 4) float64 x, y, width, height in pixels
    areas: np.ndarray  # (A,) float64; the box's area where the file gives none
    iscrowd: np.ndarray  # (A,) bool
    entries: np.ndarray  # (A,) int64: which of the file's annotations each is
    frequencies: list[str]  # (K,) LVIS's frequency of each category, r, c or f
    image_lists: dict[str, list[list[int]]]  # LVIS's lists of categories by name, one for each image
    outlines: Outlines | None  # where they are asked for

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return Path(self.source).name

    @cached_property
    def rows_of_images(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) the image row of each annotation whose image is listed, and (n,) the row of that annotation."""
        known = np.flatnonzero(np.isin(self.annotation_images, self.image_ids))
        order = np.argsort(self.image_ids, kind="stable")
        return order[np.searchsorted(self.image_ids, self.annotation_images[known], sorter=order)], known

    def labels(self, classes: Sequence[str] | None = None) -> tuple[list[int], list[str]]:
        """The category id and the class name of each label: see `labels_of`, or in the order of `classes`.

        Raises:
            ValueError: the categories have other names than `classes`, or not the same.
        """
        category_ids, names = labels_of(self.category_ids.tolist(), self.category_names)
        if classes is None:
            return category_ids, names
        require_same_classes(classes, names, self.source, "the model")
        id_of = dict(zip(names, category_ids, strict=True))
        return [id_of[name] for name in classes], list(classes)

    def place(self, row: int) -> str:
        """Which entry of the file annotation `row` is: `annotations[3] (id 17)`."""
        return _place("annotations", int(self.entries[row]), int(self.annotation_ids[row]))

    def require_outlines(self, rows: np.ndarray, images: np.ndarray) -> Outlines:
        """The outlines; ValueError if one of these rows has none, or one of another size than its image (images)."""
        assert self.outlines is not None
        if len(unknown := images[self.sizes[images, 0] == 0]):
            raise ValueError(
                f"{self.source} gives no width and height of {self.file_names[unknown[0]]}: its masks need them, so add"
                " them, or do without masks"
            )
        sizes = self.outlines.sizes[rows]
        wrong = np.flatnonzero((sizes >= 0).all(axis=1) & (sizes != self.sizes[images][:, ::-1]).any(axis=1))
        if len(absent := rows[self.outlines.absent[rows]]):
            raise ValueError(
                f"{self.place(absent[0])} of {self.source} has no segmentation, among {len(absent)} in all: masks need"
                " one of every object, so do without masks, or add it"
            )
        if len(wrong):
            height, width = sizes[wrong[0]].tolist()
            raise ValueError(
                f"the run lengths of {self.place(rows[wrong[0]])} of {self.source} are {width}x{height} pixels, but its"
                f" image is {'x'.join(map(str, self.sizes[images[wrong[0]]]))}: do without masks, or correct them"
            )
        return self.outlines


def tabulate(content: dict[str, Any], source: str | Path, outlines: bool = False) -> CocoTable:
    """Columns of a parsed COCO file.

    Numbers as text count as numbers; ids and area of annotations, iscrowd, width and height may be missing or null.

    Args:
        source: the file, for messages.
        outlines: whether `segmentation` is wanted too; it must not have been dropped by `read_coco`.

    Raises:
        ValueError: it names the source and the first entry with a missing key or with a value that cannot be used.
    """
    try:
        return _columns(content, str(source), outlines)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        found = list(entry_faults(content, outlines))
        if not found:
            raise
        more = f", and {len(found) - 1} more faults" if len(found) > 1 else ""
        raise ValueError(
            f"{source} cannot be used: {found[0].sentence()}{more}; correct or remove the entry ({ADVICE})"
        ) from None


def _columns(content: dict[str, Any], source: str, outlines: bool) -> CocoTable:
    images, annotations, categories = (content[name] for name in ("images", "annotations", "categories"))
    corners = boxes([entry["bbox"] for entry in annotations])
    areas = numbers(_given(annotations, "area", np.nan), _area)
    sizes = np.stack([integers(_given(images, side, 0)) for side in ("width", "height")], axis=1)
    if (areas < 0).any() or (sizes < 0).any():
        raise ValueError("an area or a size is below 0")
    return CocoTable(
        source=source,
        image_ids=integers([entry["id"] for entry in images]),
        file_names=[text(entry["file_name"]) for entry in images],
        sizes=np.where((sizes > 0).all(axis=1, keepdims=True), sizes, 0),
        category_ids=integers([entry["id"] for entry in categories]),
        category_names=[category_name(entry["name"]) for entry in categories],
        annotation_ids=integers(_given(annotations, "id", NO_ID)),
        annotation_images=integers([entry["image_id"] for entry in annotations]),
        annotation_categories=integers([entry["category_id"] for entry in annotations]),
        boxes=corners,
        areas=np.where(np.isnan(areas), corners[:, 2] * corners[:, 3], areas),
        iscrowd=flags(_given(annotations, "iscrowd", 0)),
        entries=np.arange(len(annotations)),
        frequencies=[str(entry.get("frequency")) for entry in categories],
        image_lists={key: lists for key in LVIS_LISTS if len(lists := _lists(images, key)) == len(images)},
        outlines=Outlines([outline(entry.get("segmentation")) for entry in annotations]) if outlines else None,
    )


def _given(entries: list[dict[str, Any]], key: str, default: Any) -> list[Any]:
    """The value of each entry, the default where it is missing or null."""
    return [default if (value := entry.get(key)) is None else value for entry in entries]


def _lists(images: list[dict[str, Any]], key: str) -> list[list[int]]:
    return [IDS.read(value) for image in images if (value := image.get(key)) is not None]


class Fault(NamedTuple):
    """What is wrong with an entry of one of the lists of a file."""

    section: str
    position: int
    entry: Any
    fault: str

    def sentence(self) -> str:
        """Where it is and what is wrong: `annotations[3] (id 17): it has no "bbox"`."""
        known = self.entry.get("id", NO_ID) if isinstance(self.entry, dict) else NO_ID
        return f"{_place(self.section, self.position, known)}: {self.fault}"


def entry_faults(
    content: dict[str, Any], outlines: bool = False, rules_of: Mapping[str, Mapping[str, Rule]] = RULES
) -> Iterator[Fault]:
    """What is wrong with single entries of a parsed COCO file; `rules_of` the entries of each list are."""
    for section, rules in rules_of.items():
        wanted = {**rules, **OUTLINE} if outlines and section == "annotations" else rules
        for index, entry in enumerate(content[section]):
            yield from (Fault(section, index, entry, fault) for fault in faults(entry, wanted))


def _place(section: str, index: int, number: Any) -> str:
    return f"{section}[{index}]" + ("" if number == NO_ID else f" (id {reprlib.repr(number)})")
