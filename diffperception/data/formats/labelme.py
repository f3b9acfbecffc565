"""LabelMe: a JSON file for each image, with polygons, rectangles, circles and masks in pixels from the outer corner.

Shapes of one label and one `group_id` are parts of one object, as in LabelMe's own converter to COCO. The picture
inside a file (`imageData`) is not read. globox 2.9 knows neither groups nor polygons' outlines nor circles.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffperception.data.formats.collected import (
    MarkedImage,
    MarkedObject,
    Remarks,
    box_around,
    flat,
    folder_of_part,
    in_threads,
    number,
    size_of_image,
)
from diffperception.data.formats.pictures import ImageIndex, count_unmarked, find_images, tidy
from diffperception.data.formats.voc import NO_CLASSES, read_class_file
from diffperception.data.listing import files_below
from diffperception.files import read_json

POLYGONS = ("polygon", "rotation")
BOXES = ("rectangle", "mask")


def read_labelme(
    path: Path, split: str | None, images: Path | None, remarks: Remarks
) -> tuple[list[MarkedImage], list[str] | None, Path]:
    """Images, classes if a list of them lies beside the files (else None), and the folder of the images.

    Args:
        path: the folder with the JSON files, or one of them.
        split: a folder in it.
    """
    path = path if split is None else folder_of_part(path, split)
    folder = path if path.is_dir() else path.parent
    files = files_below(folder, {".json"}) if path.is_dir() else [path]
    contents = in_threads(read_json, files, "annotations")
    index = find_images(images, (folder, folder.parent / "images", folder.parent))
    found = []
    for file, content in zip(files, contents, strict=True):
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            remarks.add("JSON files without `shapes`, which are not LabelMe's, are left out", str(file))
        elif image := _image(file, content, folder, index, remarks):
            found.append(image)
    if path.is_dir():
        count_unmarked(index, found, remarks)
    return found, read_class_file(folder), index.folder if index else folder


def _image(
    file: Path, content: dict[str, Any], folder: Path, index: ImageIndex | None, remarks: Remarks
) -> MarkedImage | None:
    own, written = file.relative_to(folder).with_suffix("").as_posix(), str(content.get("imagePath") or "")
    if index is None:
        name: str | None = tidy(written)
    else:
        beside = (file.relative_to(folder).parent / tidy(written)).as_posix()
        name = index.find(beside if beside in index else written) or index.find_stem(own)
    if not name:
        remarks.add("JSON files without an image are left out", str(file))
        return None
    sides = content.get("imageWidth"), content.get("imageHeight")
    size: tuple[int, int] | str
    if all(isinstance(side, int) and side > 0 for side in sides):
        size = (int(sides[0] or 0), int(sides[1] or 0))
    else:
        size = size_of_image(index.folder / name) if index else f"{file} gives no size of its image, which is not there"
    if isinstance(size, str):
        remarks.add("images of unknown size are left out", size)
        return None
    return MarkedImage(name, size, _objects(file, content["shapes"], remarks), str(file))


def _objects(file: Path, shapes: list[Any], remarks: Remarks) -> list[MarkedObject]:
    """The objects of a file: parts of one group and label are joined."""
    joined: dict[Any, MarkedObject] = {}
    for k, shape in enumerate(shapes):
        place = f"{file}, shape {k + 1}"
        if not isinstance(shape, dict) or not str(shape.get("label") or "").strip():
            raise ValueError(f"{place} has no label")
        found = _object(shape, place, remarks)
        if found is None:
            continue
        group = shape.get("group_id")
        key = k if group is None else (found.name, str(group))
        joined[key] = _union(joined[key], found) if key in joined else found
    return list(joined.values())


def _object(shape: dict[str, Any], place: str, remarks: Remarks) -> MarkedObject | None:
    name, kind = str(shape["label"]).strip(), shape.get("shape_type") or "polygon"
    if name in NO_CLASSES["labels.txt"]:
        remarks.add(f"shapes labelled {name}, which is no class, are left out", place)
        return None
    points = [[number(value, "a point", place) for value in point] for point in _pairs(shape.get("points"), place)]
    if kind == "circle" and len(points) == 2:  # its centre, and a point on it
        (x, y), radius = points[0], math.dist(*points)
        return MarkedObject(name, (x - radius, y - radius, x + radius, y + radius), place)
    if kind in BOXES and len(points) >= 2:
        return MarkedObject(name, box_around(points), place)
    if kind in POLYGONS and len(points) >= 3:
        return MarkedObject(name, box_around(points), place, [flat(points)])
    remarks.add(f"shapes of the kind {kind} with {len(points)} points are left out", place)
    return None


def _pairs(points: Any, place: str) -> Sequence[Sequence[Any]]:
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise ValueError(f"{place}: its points are no list of pairs x, y")
    return points


def _union(one: MarkedObject, other: MarkedObject) -> MarkedObject:
    box = box_around([one.box[:2], one.box[2:], other.box[:2], other.box[2:]])
    both = one.outline is not None and other.outline is not None
    return one._replace(box=box, outline=[*(one.outline or []), *(other.outline or [])] if both else None)
