"""Pascal VOC: a folder of XML files, one an image, as in the VOCdevkit and as LabelImg, Roboflow and CVAT write them.

VOC counts pixels from 1 and includes the last one: a box that fills an image of 640 x 480 is 1, 1, 640, 480, so that
x1 = xmin - 1 and x2 = xmax. A folder with an xmin or ymin from 0 to below 1 counts from 0, and its numbers are taken as
they are, unless `convert-data` wrote it (`source/database`), which counts from 1 even where a box leaves its image.
Numbers need not be whole. What is `difficult` becomes `iscrowd`: VOC's rules neither count it nor its detections.

Why not a library: globox 2.9 takes xmin for x1, so boxes shift by a pixel, and drops `difficult`; supervision 0.31
passes over images in subfolders and files whose image is missing without a word, takes difficult objects for others,
orders the classes as the files come, and brings FFmpeg, scipy and requests; torchvision's VOCDetection reads the
VOCdevkit alone and gives the XML as it is. None names the file of a number that is none.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from diffperception.data.formats.collected import (
    Box,
    MarkedImage,
    MarkedObject,
    Remarks,
    box_around,
    flat,
    folder_of_part,
    in_threads,
    number,
    size_of_image,
    turned,
)
from diffperception.data.formats.pictures import ImageIndex, count_unmarked, find_images, tidy
from diffperception.data.listing import files_below, image_endings
from diffperception.files import read_lines

WRITER = "diffperception"  # the source/database of the files that we write
SIDES = ("xmin", "ymin", "xmax", "ymax")
CLASS_FILES = ("labelmap.txt", "classes.txt", "labels.txt", "predefined_classes.txt")  # CVAT's, LabelImg's, others'


NO_CLASSES = {"labelmap.txt": ("background",), "labels.txt": ("__ignore__", "_background_")}  # CVAT's, LabelMe's


@dataclass
class XmlFile:
    """What one file says; boxes are as written."""

    path: Path
    filename: str
    size: tuple[int, int]  # 0, 0 if it does not say
    objects: list[MarkedObject]
    is_ours: bool


def read_voc(
    path: Path, split: str | None, images: Path | None, remarks: Remarks
) -> tuple[list[MarkedImage], list[str] | None, Path]:
    """Images, classes if a list of them lies beside the files (else None), and the folder of the images.

    Args:
        path: the folder with the XML files, or one above it with `Annotations`, or a list of images such as
            ImageSets/Main/train.txt.
        split: the name of such a list in the folder, or of a folder in it.
    """
    folder, files, listed = _files(path, split, remarks)
    found_files = in_threads(_read_file, files, "annotations")
    read_files = [file for file in found_files if isinstance(file, XmlFile)]
    if not read_files:
        raise ValueError(f"{found_files[0]}: is the format the right one?")
    for other in (file for file in found_files if isinstance(file, str)):
        remarks.add("XML files of another kind are left out", other)
    places = (folder.parent / "JPEGImages", folder / "JPEGImages", folder.parent / "images", folder)
    index = find_images(images, places)
    found = [_image(file, folder, index, remarks) for file in read_files]
    corners = [
        min(thing.box[:2]) for file in read_files if not file.is_ours for thing in file.objects if not thing.outline
    ]
    from_zero = any(0 <= corner < 1 for corner in corners)
    if from_zero:
        remarks.add(
            "an xmin or ymin is below 1, so boxes are read as counted from 0, not from 1 as VOC's; files", str(path)
        )
    shift = 0.0 if from_zero else 1.0
    marked = [image._replace(objects=[_shifted(o, shift) for o in image.objects]) for image in found if image]
    if listed is None:
        count_unmarked(index, marked, remarks)
    return marked, read_class_file(folder), index.folder if index else folder


def _files(path: Path, split: str | None, remarks: Remarks) -> tuple[Path, list[Path], Path | None]:
    """The folder of XML files, those of them that are wanted, and the file that chooses them, if there is one."""
    if path.suffix.lower() == ".xml":
        return path.parent, [path], path
    if split is not None:
        lists = [path / "ImageSets" / "Main" / f"{split}.txt", path / f"{split}.txt"]
        listing = next((file for file in lists if file.is_file()), None)
        path = folder_of_part(path, split) if listing is None else listing
    listed = None
    if path.is_file():
        listed = path
        path = next((parent for parent in path.parents[:4] if (parent / "Annotations").is_dir()), path.parent)
    folder = path / "Annotations" if (path / "Annotations").is_dir() else path
    files = files_below(folder, {".xml"})
    if not files:
        raise ValueError(f"there is no XML file in {folder}: give the folder with the annotations of Pascal VOC")
    return folder, files if listed is None else _listed(listed, folder, files, remarks), listed


def _listed(listing: Path, folder: Path, files: Sequence[Path], remarks: Remarks) -> list[Path]:
    """The files of the images that a list names, a name a line, maybe with 1, 0 or -1 after it, as in VOC's own."""
    by_name = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    by_name |= {file.stem: file for file in files}
    chosen = []
    for line in read_lines(listing):
        names = (line, re.sub(r"\s+-?[01]$", "", line))
        stems = [tidy(name).removesuffix(_ending(name)) for name in names]
        file = next((by_name[key] for stem in stems for key in (stem, stem.rsplit("/", 1)[-1]) if key in by_name), None)
        if file is None:
            remarks.add(f"images that {listing.name} lists have no XML file and are left out", line)
        else:
            chosen.append(file)
    return list(dict.fromkeys(chosen))


def _ending(name: str) -> str:
    suffix = Path(name).suffix
    return suffix if suffix.lower() in {".xml", *image_endings()} else ""


def read_class_file(folder: Path) -> list[str] | None:
    """The names of the classes, in order, from a list in the folder or the one above; None if there is none."""
    for place in (folder, folder.parent):
        for name in CLASS_FILES:
            if (place / name).is_file():
                lines = [line for line in read_lines(place / name) if not line.startswith("#")]
                names = [re.sub(r":\d+,\d+,\d+:.*$|:::?$", "", line) for line in lines]  # of labelmap.txt
                return [line for line in dict.fromkeys(names) if line not in NO_CLASSES.get(name, ())]
    return None


def _read_file(path: Path) -> XmlFile | str:
    """What a file says, or that it holds something else, as the files that GDAL leaves beside images do."""
    root = read_xml(path)
    if root.tag != "annotation":
        return f"{path} holds <{root.tag}>, not <annotation>"
    objects = [_object(element, f"{path}, object {k}") for k, element in enumerate(root.findall("object"), 1)]
    sides = [root.findtext(f"size/{side}") or "0" for side in ("width", "height")]
    width, height = (int(number(side, "the size", str(path))) for side in sides)
    name = root.findtext("filename") or root.findtext("path") or ""
    return XmlFile(path, name.strip(), (width, height), objects, root.findtext("source/database") == WRITER)


def read_xml(path: Path) -> ElementTree.Element:
    """The outermost element of an XML file; ValueError naming the file if it is none."""
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path} is not an XML file ({error}): was it cut short?") from None


def _object(element: ElementTree.Element, place: str) -> MarkedObject:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{place} has no name: give it that of its class")
    difficult = (element.findtext("difficult") or "0").strip().lower()
    ignored = difficult in ("1", "true")
    if (rotated := element.find("robndbox")) is not None:
        corners = _corners(rotated, place)
        return MarkedObject(name, box_around(corners), place, [flat(corners)], ignored)
    return MarkedObject(name, _box(element, place), place, ignored=ignored)


def _corners(rotated: ElementTree.Element, place: str) -> list[tuple[float, float]]:
    """The corners of a rotated box of roLabelImg, which gives the centre, from 0, and an angle in radians."""
    cx, cy, w, h, angle = (number(rotated.findtext(key), key, place) for key in ("cx", "cy", "w", "h", "angle"))
    straight = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    return turned(straight, math.degrees(angle), (cx, cy))


def _box(element: ElementTree.Element, place: str) -> Box:
    """The corners as written."""
    if (box := element.find("bndbox")) is None:
        raise ValueError(f"{place} has no bndbox: only boxes are read from Pascal VOC")
    x1, y1, x2, y2 = (number(box.findtext(side), side, place) for side in SIDES)
    return x1, y1, x2, y2


def _shifted(thing: MarkedObject, shift: float) -> MarkedObject:
    if thing.outline is not None:  # a rotated box, which counts from 0
        return thing
    x1, y1, x2, y2 = thing.box
    return thing._replace(box=(x1 - shift, y1 - shift, x2, y2))


def _image(file: XmlFile, folder: Path, index: ImageIndex | None, remarks: Remarks) -> MarkedImage | None:
    """The image of a file: that of the same name, for `filename` often is an old one; else what that says."""
    own = file.path.relative_to(folder).with_suffix("").as_posix()
    if index is None:
        name: str | None = tidy(file.filename) or own
    else:
        named = index.find(file.filename) if file.filename else None
        same = named is not None and PurePosixPath(named).stem.casefold() == file.path.stem.casefold()
        name = named if same else index.find_stem(own) or named
    if name is None:
        remarks.add("XML files without an image are left out", str(file.path))
        return None
    size: tuple[int, int] | str = file.size
    if min(file.size) <= 0:
        remarks.add("XML files say no size, the image's is taken", str(file.path))
        size = (
            size_of_image(index.folder / name)
            if index
            else f"{file.path} gives no size of its image, which is not there"
        )
    if isinstance(size, str):
        remarks.add("images of unknown size are left out", size)
        return None
    return MarkedImage(name, size, file.objects, str(file.path))
