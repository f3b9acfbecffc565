"""CVAT for images 1.1: one XML file with all images, boxes and polygons in pixels counted from the outer corner, 0.

CVAT's other exports are COCO, Pascal VOC and YOLO, which are read as such. Classes keep the order of the task's labels.
No library that we know reads its rotated boxes and polygons: globox 2.9 reads the plain boxes alone.
"""

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from diffperception.data.formats.collected import (
    MarkedImage,
    MarkedObject,
    Remarks,
    box_around,
    flat,
    number,
    turned,
)
from diffperception.data.formats.pictures import ImageIndex, find_images, tidy
from diffperception.data.formats.voc import read_xml

CORNERS = ("xtl", "ytl", "xbr", "ybr")
OTHERS = ("polyline", "points", "ellipse", "cuboid", "skeleton", "tag")


def read_cvat(
    path: Path, split: str | None, images: Path | None, remarks: Remarks
) -> tuple[list[MarkedImage], list[str] | None, Path]:
    """Images, classes and the folder of the images.

    Args:
        path: the file annotations.xml or its folder.
        split: of images, the `subset` that CVAT gives them.
    """
    path = path / "annotations.xml" if path.is_dir() else path
    root = read_xml(path)
    if root.tag != "annotations":
        raise ValueError(f"{path} holds <{root.tag}>, not <annotations>: is the format the right one?")
    if root.find("track") is not None:
        raise ValueError(f"{path} is CVAT's format for videos: export the task as `CVAT for images 1.1`, or as COCO")
    index = find_images(images, (path.parent / "images", path.parent))
    found = []
    for element in root.findall("image"):
        if split is None or element.get("subset", "").lower() == split.lower():
            image = _image(element, path, index, remarks)
            found += [] if image is None else [image]
    names = [label.text.strip() for label in root.findall(".//meta//labels/label/name") if label.text]
    return found, list(dict.fromkeys(names)) or None, index.folder if index else path.parent


def _image(element: ElementTree.Element, path: Path, index: ImageIndex | None, remarks: Remarks) -> MarkedImage | None:
    written = element.get("name", "")
    place = f"{path}, image {element.get('id', '')} ({written})"
    name = tidy(written) if index is None else index.find(written)
    if not name:
        remarks.add("images of the file that are missing are left out", written)
        return None
    width, height = (int(number(element.get(side), side, place)) for side in ("width", "height"))
    objects: list[MarkedObject] = []
    for shape in element:
        if shape.tag in ("box", "polygon", "mask"):
            objects.append(_object(shape, f"{place}, {shape.tag} {len(objects) + 1}", remarks))
        elif shape.tag in OTHERS:
            remarks.add(f"shapes of the kind {shape.tag} are left out", place)
    return MarkedImage(name, (width, height), objects, place)


def _object(shape: ElementTree.Element, place: str, remarks: Remarks) -> MarkedObject:
    name = shape.get("label", "").strip()
    if not name:
        raise ValueError(f"{place} has no label")
    if shape.tag == "polygon":
        points = _points(shape.get("points", ""), place)
        return MarkedObject(name, box_around(points), place, [flat(points)])
    if shape.tag == "mask":  # run lengths within a box
        left, top, width, height = (number(shape.get(s), s, place) for s in ("left", "top", "width", "height"))
        return MarkedObject(name, (left, top, left + width, top + height), place)
    x1, y1, x2, y2 = (number(shape.get(corner), corner, place) for corner in CORNERS)
    degrees = number(shape.get("rotation", "0"), "rotation", place)
    if not degrees:
        return MarkedObject(name, (x1, y1, x2, y2), place)
    remarks.add("rotated boxes are read as the boxes around them", place)
    corners = turned((x1, y1, x2, y2), degrees, ((x1 + x2) / 2, (y1 + y2) / 2))
    return MarkedObject(name, box_around(corners), place, [flat(corners)])


def _points(text: str, place: str) -> list[Sequence[float]]:
    points = [[number(value, "a point", place) for value in point.split(",")] for point in text.split(";") if point]
    if len(points) < 3 or any(len(point) != 2 for point in points):
        raise ValueError(f"{place} has no three points x,y")
    return list(points)
