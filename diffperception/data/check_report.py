"""What a check of a data set found: its problems, and what it holds in figures."""

from dataclasses import astuple, dataclass, field
from typing import Literal, Protocol

import numpy as np

from diffperception.data.annotations import CocoTable
from diffperception.table import format_table

# An error makes training or its measurement fail or be wrong; a warning may be meant.
Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """One kind of problem and every place where it was found."""

    level: Level
    kind: str  # a short name, the same in every data set
    message: str  # what is wrong and what follows from it
    places: list[str] = field(default_factory=list)  # entries, images or files; none where it concerns the whole

    def sentence(self) -> str:
        """The message, how often it applies and where first."""
        many = f" ({len(self.places)} times, first {self.places[0]})" if len(self.places) > 1 else ""
        return self.message + (many or "".join(f": {place}" for place in self.places))

    def text(self, shown: int) -> str:
        """A headline and the first `shown` places."""
        count = f" ({len(self.places)} times)" if len(self.places) > 1 else ""
        lines = [f"{self.level}: {self.message}{count}", *(f"    {place}" for place in self.places[:shown])]
        if len(self.places) > shown:
            lines.append(f"    and {len(self.places) - shown} more")
        return "\n".join(lines)


def found_at(level: Level, kind: str, message: str, places: list[str]) -> list[Problem]:
    """The problem, if it was found at any place."""
    return [Problem(level, kind, message, places)] if places else []


@dataclass(frozen=True)
class ClassCount:
    """How often a class occurs."""

    name: str
    objects: int
    images: int


@dataclass(frozen=True)
class Summary:
    """What a data set holds; crowd regions count as objects."""

    images: int
    objects: int
    crowds: int
    images_without_objects: int
    classes: list[ClassCount]  # in the order of the labels
    objects_per_image: tuple[float, float, float]  # smallest, median and largest number
    box_width: tuple[float, float, float]  # 5 %, 50 % and 95 % quantiles in pixels, of the boxes with an area
    box_height: tuple[float, float, float]
    box_sizes: tuple[int, int, int]  # numbers that COCO calls small (below 32x32 pixels), medium and large (from 96x96)
    image_sizes: tuple[str, str]  # smallest and largest "WxH", by area

    def text(self) -> str:
        few, middle, many = (f"{number:g}" for number in self.objects_per_image)
        small, medium, large = self.box_sizes
        rows = [*(astuple(entry) for entry in self.classes), ("all", self.objects, self.images)]
        figures = {
            "image sizes": " to ".join(self.image_sizes),
            "objects per image": f"{few} to {many}, median {middle}; {self.images_without_objects} images have none",
            "crowd regions": str(self.crowds),
            "box widths": _quantiles(self.box_width),
            "box heights": _quantiles(self.box_height),
            "boxes by area": f"{small} below 32x32, {medium} medium, {large} from 96x96 pixels",
        }
        lines = (f"{name:<18} {figure}" for name, figure in figures.items())
        return "\n".join([format_table(rows, ("class", "objects", "images")), "", *lines])


class Figures(Protocol):
    """What a data set holds, as lines of text: a dataclass such as Summary."""

    def text(self) -> str: ...


@dataclass(frozen=True)
class Report:
    """All problems of a data set, errors first, and what it holds; None where the file cannot be read."""

    problems: list[Problem]
    summary: Figures | None

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "error"]

    @property
    def warnings(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "warning"]

    def text(self, shown: int = 10) -> str:
        """The summary, the problems with at most `shown` places each, and a verdict, as lines."""
        blocks = [self.summary.text()] if self.summary else []
        blocks += [problem.text(shown) for problem in self.problems]
        blocks.append(f"{_kinds(len(self.errors), 'error')} and {_kinds(len(self.warnings), 'warning')}")
        return "\n\n".join(blocks)


def _kinds(count: int, noun: str) -> str:
    return f"{count} kind{'' if count == 1 else 's'} of {noun}" if count else f"no {noun}s"


def summarize(table: CocoTable) -> Summary:
    """The figures of a COCO file; annotations of an unknown image or category count in the totals alone."""
    image, of_image = table.rows_of_images
    counts = np.bincount(image, minlength=len(table.image_ids))
    sides = table.boxes[(table.boxes[:, 2:] > 0).all(axis=1), 2:]
    small, medium = (int((sides.prod(axis=1) < side**2).sum()) for side in (32, 96))
    given = table.sizes[table.sizes[:, 0] > 0]
    by_area = given[np.argsort(given.prod(axis=1), kind="stable")]
    return Summary(
        images=len(table.image_ids),
        objects=len(table.boxes),
        crowds=int(table.iscrowd.sum()),
        images_without_objects=int((counts == 0).sum()),
        classes=_count_classes(table, of_image, image),
        objects_per_image=_three(counts, (0, 0.5, 1)),
        box_width=_three(sides[:, 0], (0.05, 0.5, 0.95)),
        box_height=_three(sides[:, 1], (0.05, 0.5, 0.95)),
        box_sizes=(small, medium - small, len(sides) - medium),
        image_sizes=(_size(by_area[:1]), _size(by_area[-1:])),
    )


def _count_classes(table: CocoTable, rows: np.ndarray, image: np.ndarray) -> list[ClassCount]:
    """Objects and images of each class; `rows` are annotations and `image` the row of each one's image."""
    order = np.argsort(table.category_ids, kind="stable")
    ids, categories = table.category_ids[order], table.annotation_categories[rows]
    known = np.isin(categories, ids)
    label = np.searchsorted(ids, categories[known])
    objects = np.bincount(label, minlength=len(ids))
    pairs = np.unique(label * len(table.image_ids) + image[known])
    images = np.bincount(pairs // max(1, len(table.image_ids)), minlength=len(ids))
    counts = zip(order, objects.tolist(), images.tolist(), strict=True)
    return [ClassCount(table.category_names[k], n, m) for k, n, m in counts]


def _three(values: np.ndarray, quantiles: tuple[float, float, float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, quantiles).tolist() if len(values) else (0.0, 0.0, 0.0)
    return low, middle, high


def _size(sizes: np.ndarray) -> str:
    return "x".join(str(side) for side in sizes.ravel()) or "unknown"


def _quantiles(values: tuple[float, float, float]) -> str:
    low, middle, high = values
    return f"{low:.0f} to {high:.0f} pixels for 90 % of the boxes, median {middle:.0f}"
