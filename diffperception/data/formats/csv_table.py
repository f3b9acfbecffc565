"""CSV: a row for each object. The columns are found by their names, or are those of torchvision's and keras-retinanet's
files without a header: path, x1, y1, x2, y2, class; a row with a path alone is an image without objects.

Corners (xmin ymin xmax ymax, or x1 y1 x2 y2) and sizes (x y w h, or x y width height) are pixels from the outer corner,
0; Open Images' (XMin XMax YMin YMax), and others that all lie in 0..1, are fractions of the image. Beside corners, the
columns width and height are the image's, as TensorFlow's and Roboflow's files have them.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from diffperception.data.formats.collected import (
    Box,
    MarkedImage,
    MarkedObject,
    Remarks,
    in_threads,
    number,
    size_of_image,
)
from diffperception.data.formats.pictures import ImageIndex, find_images, tidy
from diffperception.files import read_text

IMAGE = (
    "filename",
    "file_name",
    "imagepath",
    "image_path",
    "path",
    "file",
    "image",
    "img",
    "imageid",
    "image_id",
    "img_id",
)
CLASS = ("class", "label", "labelname", "label_name", "class_name", "classname", "category", "category_name", "name")
CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
)
SIZES = (
    ("x", "y", "w", "h"),
    ("x", "y", "width", "height"),
    ("xmin", "ymin", "w", "h"),
    ("bbox_x", "bbox_y", "bbox_width", "bbox_height"),
    ("bbox_x", "bbox_y", "bbox_w", "bbox_h"),
    ("left", "top", "width", "height"),
)
BARE = ["path", "x1", "y1", "x2", "y2", "class"]
SIZE_OF_IMAGE = (("width", "height"), ("image_width", "image_height"), ("img_width", "img_height"))


class Columns:
    """Which column holds what; ValueError, naming those that are missing."""

    def __init__(self, header: Sequence[str], path: Path) -> None:
        self.names = [name.strip().lower() for name in header]
        self.image = self._one(IMAGE)
        self.label = self._one(CLASS)
        self.corners = self._all(CORNERS)
        self.box = None if self.corners else self._all(SIZES)
        self.list = self._one(("bbox", "box")) if not (self.corners or self.box) else None
        taken = set(self.box or ())
        self.size = next((s for s in (self._all([pair]) for pair in SIZE_OF_IMAGE) if s and not taken & set(s)), None)
        self.group = self._one(("isgroupof", "iscrowd", "difficult"))
        missing = [
            what
            for what, found in (
                ("the image (filename)", self.image is not None),
                ("the class (class)", self.label is not None),
                ("the box (xmin, ymin, xmax, ymax, or x, y, w, h)", self.corners or self.box or self.list is not None),
            )
            if not found
        ]
        if missing:
            raise ValueError(f"{path} has no column for {' and '.join(missing)}; its header is {', '.join(header)}")

    def _one(self, names: Sequence[str]) -> int | None:
        return next((self.names.index(name) for name in names if name in self.names), None)

    def _all(self, choices: Sequence[Sequence[str]]) -> list[int] | None:
        found = next((names for names in choices if set(names) <= set(self.names)), None)
        return None if found is None else [self.names.index(name) for name in found]


def read_csv(
    path: Path, split: str | None, images: Path | None, remarks: Remarks
) -> tuple[list[MarkedImage], list[str] | None, Path]:
    """Images, None for the classes, of which the file has no list, and the folder of the images."""
    if split is not None:
        raise ValueError(f"a CSV file has no part {split}: give {path} alone")
    rows, columns = _rows(path)
    index = find_images(images, (path.parent / "images", path.parent, path.parent.parent / "images"))
    by_image: dict[str, list[tuple[int, list[str]]]] = {}
    found: dict[str, str | None] = {}
    written_as: dict[str, str] = {}
    for line, row in rows:
        written = _cell(row, columns.image)
        if written not in found:
            found[written] = _find(written, index)
        name = found[written]
        if name is not None and written_as.setdefault(name, tidy(written)) != tidy(written):
            raise ValueError(
                f"{path}, line {line}: {written} and {written_as[name]} would both be the image {name}: give a folder"
                " with both, as they are named"
            )
        if name is None:
            remarks.add("rows whose image is missing are left out", f"{path}, line {line} ({written})")
        else:
            by_image.setdefault(name, []).append((line, row))
    boxes = {
        line: _box(row, columns, f"{path}, line {line}") for of_image in by_image.values() for line, row in of_image
    }
    fractions = _are_fractions([box for box in boxes.values() if box is not None], remarks, path)
    sizes = _sizes(by_image, columns, index, path, fractions, remarks)
    marked = []
    for name, size in sizes.items():
        scale = size if fractions else (1, 1)
        objects = [_object(row, boxes[line], columns, scale, f"{path}, line {line}") for line, row in by_image[name]]
        marked.append(MarkedImage(name, size, [o for o in objects if o is not None], str(path)))
    return marked, None, index.folder if index else path.parent


def _rows(path: Path) -> tuple[list[tuple[int, list[str]]], Columns]:
    """The rows below the header with the numbers of their lines."""
    text = read_text(path)
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    if not rows:
        raise ValueError(f"{path} is empty: a CSV file has a row for each object")
    if len(rows[0][1]) == 6 and (not rows[0][1][1].strip() or _is_number(rows[0][1][1])):
        return rows, Columns(BARE, path)
    return rows[1:], Columns([cell.strip('"') for cell in rows[0][1]], path)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _find(written: str, index: ImageIndex | None) -> str | None:
    return tidy(written) if index is None else index.find(written) or index.find_stem(written)


def _cell(row: Sequence[str], column: int | None) -> str:
    return row[column].strip() if column is not None and column < len(row) else ""


def _box(row: Sequence[str], columns: Columns, place: str) -> Box | None:
    """The corners of a row's box as written; None of a row that speaks of an image alone."""
    if columns.list is not None:
        text = _cell(row, columns.list)
        values = text.strip("[]() ").replace(",", " ").split()
    else:
        values = [_cell(row, column) for column in columns.corners or columns.box or ()]
    if not any(values):
        return None
    if len(values) != 4:
        raise ValueError(f"{place}: the box {json.dumps(values)} has no four numbers")
    a, b, c, d = (number(value, "a side of the box", place) for value in values)
    return (a, b, c, d) if columns.corners else (a, b, a + c, b + d)


def _are_fractions(boxes: Sequence[Box], remarks: Remarks, path: Path) -> bool:
    fractions = bool(boxes) and max(map(max, boxes)) <= 1
    if fractions:
        remarks.add("all boxes lie in 0..1 and are read as fractions of the images; files", str(path))
    return fractions


def _sizes(
    by_image: dict[str, list[tuple[int, list[str]]]],
    columns: Columns,
    index: ImageIndex | None,
    path: Path,
    fractions: bool,
    remarks: Remarks,
) -> dict[str, tuple[int, int]]:
    """Width and height of each image: what the file says, or else the images' headers."""
    told: dict[str, tuple[int, int] | str] = {}
    for name, rows in by_image.items() if columns.size else ():
        line, row = rows[0]
        sides = (number(_cell(row, c) or 0, "the size", f"{path}, line {line}") for c in columns.size or ())
        width, height = map(int, sides)
        if min(width, height) > 0:
            told[name] = (width, height)
    unknown = [name for name in by_image if name not in told]
    if unknown and index is None:
        raise ValueError(f"{path} gives no size of {unknown[0]}: give the folder with the images too")
    if index is not None:
        measured = in_threads(size_of_image, [index.folder / name for name in unknown], "sizes of images")
        told |= dict(zip(unknown, measured, strict=True))
    for size in told.values():
        if isinstance(size, str):
            remarks.add("images of unknown size are left out", size)
    return {name: size for name in by_image if not isinstance(size := told[name], str)}


def _object(
    row: Sequence[str], box: Box | None, columns: Columns, scale: tuple[int, int], place: str
) -> MarkedObject | None:
    if box is None:
        return None
    name = _cell(row, columns.label)
    if not name:
        raise ValueError(f"{place} has no class")
    x1, y1, x2, y2 = box
    pixels = (x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1])
    return MarkedObject(name, pixels, place, ignored=_cell(row, columns.group).lower() in ("1", "true"))
