"""YOLO: a text file for each image, a line `class cx cy w h` for each object in fractions of the image's sides.

All layouts that Ultralytics' trainers and Darknet take: a data.yaml with `names` (a list or a dictionary) and, relative
to its `path` or to itself, folders of images or lists of them; obj.data with obj.names and train.txt; or a folder with
images/, labels/ and classes.txt, as LabelImg and Label Studio write. The labels of .../images/a/b.jpg are
.../labels/a/b.txt, or else b.txt beside the image; an image without such a file has no objects.

Rows with more numbers: polygons (class x y x y ...) and the corners of rotated boxes become the boxes around them, and
outlines; a pose's box is taken where the data.yaml tells of its points (`kpt_shape`).

Why not a library: globox 2.9 gives class numbers for names and refuses polygons; supervision 0.31 knows neither the
parts of a data.yaml nor lists, passes over subfolders and images without a word, makes polygons dense masks of whole
images, and brings FFmpeg, scipy and requests.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffperception.data.formats.collected import (
    Box,
    MarkedImage,
    MarkedObject,
    Remarks,
    box_around,
    flat,
    in_threads,
    number,
    size_of_image,
)
from diffperception.data.formats.pictures import ImageIndex, find_images, tidy
from diffperception.files import read_lines, read_text

SPLITS = ("train", "val", "valid", "test")
CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt")
NO_LABELS = {*CLASS_FILES, "train.txt", "val.txt", "valid.txt", "test.txt"}
LEVELS = 4  # folders above a path in which its list of classes is looked for
FAR = 1.5  # centre or side of a box, in sides of the image, above which it was never meant as a fraction


@dataclass
class Classes:
    """What a data.yaml, obj.data or list of classes says."""

    names: list[str] | None
    file: Path | None
    parts: dict[str, list[str]]  # train, val, ...: folders of images and lists of them
    values_of_pose: int | None = None  # of a pose's row, whose first are those of its box
    root: Path = Path()

    @property
    def folders(self) -> list[Path]:
        """What its paths may be relative to."""
        return [] if self.file is None else [self.root, self.file.parent, self.file.parent.parent]


def read_yolo(
    path: Path, split: str | None, images: Path | None, remarks: Remarks
) -> tuple[list[MarkedImage], list[str], Path]:
    """Images, classes and the folder of the images.

    Args:
        path: a data.yaml or obj.data, a list of images, or a folder: of labels, of images, or above both.
        split: the part of a data.yaml, such as train.
    """
    classes = find_classes(path)
    if classes.names is None:
        raise ValueError(
            f"no file near {path} names the classes: give a data.yaml with names, or put a classes.txt with a name per"
            " line beside the labels"
        )
    labels = _label_folder(path, classes)
    index, chosen = _images(path, split, images, classes, labels, remarks)
    files = [_label_file(index.folder / name, name, labels) for name in chosen]
    _count_shared(files, chosen, remarks)
    rows = in_threads(_read_label_file, files, "labels")
    sizes = in_threads(size_of_image, [index.folder / name for name in chosen], "sizes of images")
    marked = []
    for name, file, lines, size in zip(chosen, files, rows, sizes, strict=True):
        if file is None:
            remarks.add("images without a label file have no objects", name)
        if isinstance(size, str):
            remarks.add("images of unknown size are left out", size)
            continue
        objects = [_object(line, f"{file}, line {n}", size, classes, remarks) for n, line in lines]
        marked.append(MarkedImage(name, size, [o for o in objects if o is not None], str(file or name)))
    _require_fractions(marked, path)
    _count_unused(files, labels, index, remarks)
    return marked, classes.names, index.folder


def find_classes(path: Path) -> Classes:
    """What the path itself, if it is such a file, or a file in its folder or one above says of classes and parts."""
    if path.is_file() and path.suffix.lower() in (".yaml", ".yml", ".data"):
        return _read_classes(path)
    folder = path if path.is_dir() else path.parent
    for place in [folder, *folder.absolute().parents[:LEVELS]]:
        for file in sorted(place.glob("*.y*ml")) + sorted(place.glob("*.data")):
            if (found := _read_classes(file, quietly=True, is_beside=place == folder)).names is not None:
                return found
        names = [place / name for name in CLASS_FILES] + sorted(place.glob("*.names"))
        listing = next((file for file in names if file.is_file()), None)
        if listing is not None:
            return Classes(read_lines(listing), listing, {}, root=place)
    return Classes(None, None, {})


def _read_classes(path: Path, quietly: bool = False, is_beside: bool = True) -> Classes:
    """The content of a data.yaml or obj.data.

    One that was not asked for (`quietly`) may be anybody's: it needs names, and above the data a part or nc too.
    """
    try:
        # Not safe_load, by which a class `no` would be False and 010 would be 8.
        content = _darknet(path) if path.suffix.lower() == ".data" else yaml.load(read_text(path), yaml.BaseLoader)
    except (yaml.YAMLError, ValueError) as error:
        if quietly:
            return Classes(None, None, {})
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    names = content.get("names") if isinstance(content, dict) else None
    if not names or (quietly and not is_beside and not content.keys() & {*SPLITS, "nc"}):
        if quietly:
            return Classes(None, None, {})
        raise ValueError(f"{path} has no `names`: a data.yaml of YOLO lists its classes there")
    parts = {part: value for part in SPLITS if (value := content.get(part)) and value not in ("null", "~")}
    lists = {
        part: [str(v) for v in value] if isinstance(value, list) else [str(value)] for part, value in parts.items()
    }
    root = path.parent / str(content.get("path") or "")
    points = content.get("kpt_shape")
    values = 5 + int(points[0]) * int(points[1]) if isinstance(points, list) and len(points) == 2 else None
    return Classes(_names(names, path), path, lists, values, root if root.is_dir() else path.parent)


def _darknet(path: Path) -> dict[str, Any]:
    """obj.data: lines `key = value`; its names are in a file of their own."""
    pairs = [line.split("=", 1) for line in read_lines(path) if "=" in line]
    content: dict[str, Any] = {key.strip(): value.strip() for key, value in pairs}
    if "names" in content:
        places = [folder / content["names"] for folder in (path.parent, *path.absolute().parents[1:3])]
        places.append(path.parent / Path(content["names"]).name)
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise ValueError(f"{path} names the file {content['names']} of its classes, which is missing")
        content["names"] = read_lines(file)
    return content


def _names(names: list[Any] | dict[Any, Any] | str, path: Path) -> list[str]:
    if isinstance(names, str):
        raise ValueError(f"{path}: names is the text {names!r}, not a list of the classes")
    if isinstance(names, dict):
        numbered = {str(number): number for number in range(len(names))}
        if names.keys() != numbered.keys():
            raise ValueError(f"{path}: names must number the classes from 0 to {len(names) - 1}, each once")
        names = [names[key] for key in numbered]
    return [str(name) for name in names]


def _label_folder(path: Path, classes: Classes) -> Path | None:
    """The folder of the label files, where it is not the images' path that tells."""
    if path.is_dir():
        if (path / "labels").is_dir():
            return path / "labels"
        if any(file.name not in NO_LABELS for file in path.glob("*.txt")):
            return path
        if any(part.lower() == "images" for part in path.absolute().parts):
            return _beside(path.absolute(), "images", "labels")
        return path
    return next((place / "labels" for place in classes.folders[:2] if (place / "labels").is_dir()), None)


def _beside(path: Path, one: str, other: str) -> Path:
    """The path with the last of its parts of one name replaced by another."""
    parts = list(path.parts)
    places = [k for k, part in enumerate(parts) if part.lower() == one]
    if places:
        parts[places[-1]] = other
    return Path(*parts)


def _images(
    path: Path, split: str | None, images: Path | None, classes: Classes, labels: Path | None, remarks: Remarks
) -> tuple[ImageIndex, list[str]]:
    """The images there are, and the names of those that are wanted."""
    has_parts = bool(classes.parts) and classes.file is not None and classes.file.parent == path
    if path.is_dir() and split is None and not has_parts:
        places = [path / "images", *([_beside(labels.absolute(), "labels", "images"), labels] if labels else []), path]
        index = find_images(images, places)
        chosen = index.names if index else []
    elif path.suffix.lower() == ".txt":
        index = find_images(images, [*classes.folders[:2], path.parent])
        chosen = _listed(path, index, remarks) if index else []
    else:
        places = [_place(value, path, classes) for value in _part(path, split, classes)]
        index = find_images(images, [_root(places, classes)])
        chosen = [name for place in places for name in _of_part(place, index, remarks)] if index else []
    if index is None or not chosen:
        raise ValueError(f"there are no images of {path}: give the folder with the images too")
    return index, list(dict.fromkeys(chosen))


def _part(path: Path, split: str | None, classes: Classes) -> list[str]:
    named = list(classes.parts)
    if split is None and named and all(classes.parts[part] == classes.parts[named[0]] for part in named):
        split = named[0]
    if split == "val" and "val" not in named and "valid" in named:
        split = "valid"
    if split not in classes.parts:
        ways = ", ".join(f"{path}:{part}" for part in named) or "a folder of labels or images"
        problem = "has several parts" if split is None else f"has no part {split}"
        raise ValueError(f"{path} {problem}: give {ways}")
    return classes.parts[split]


def _place(value: str, path: Path, classes: Classes) -> Path:
    """The folder or list that a part of a data.yaml names."""
    # Roboflow writes ../train/images for a folder that lies beside the data.yaml.
    # The obj.data of CVAT's export names data/train.txt, which lies beside it.
    places = [folder / name for name in (value, value.removeprefix("../")) for folder in classes.folders]
    places += [path.parent / Path(value).name] if value.endswith(".txt") else []
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise ValueError(f"{path} names {value}, which is neither at {places[0]} nor beside it: correct `path` in it")
    return place


def _root(places: Sequence[Path], classes: Classes) -> Path:
    """The folder of the images by default: that of the data.yaml, or that above its parts if they are outside."""
    above = [os.path.realpath(place if place.is_dir() else place.parent) for place in places]
    root = os.path.realpath(classes.root)
    return classes.root if os.path.commonpath([root, *above]) == root else Path(os.path.commonpath(above))


def _of_part(place: Path, index: ImageIndex, remarks: Remarks) -> Sequence[str]:
    """The names of the images in a folder, or in a list."""
    if place.is_file():
        return _listed(place, index, remarks)
    inside = Path(os.path.relpath(place.resolve(), index.folder.resolve())).as_posix()
    return [name for name in index.names if inside == "." or name.startswith(f"{inside}/")]


def _listed(listing: Path, index: ImageIndex, remarks: Remarks) -> list[str]:
    """The images that a list names, a path per line."""
    found = []
    for line in read_lines(listing):
        here = Path(os.path.relpath((listing.parent / tidy(line)).resolve(), index.folder.resolve())).as_posix()
        name = index.find(here) if here in index else index.find(line)
        if name is None:
            remarks.add(f"images that {listing.name} lists are missing and left out", line)
        else:
            found.append(name)
    return found


def _label_file(image: Path, name: str, labels: Path | None) -> Path | None:
    """The file with an image's objects, if there is one."""
    candidates = [_beside(image.absolute(), "images", "labels").with_suffix(".txt"), image.with_suffix(".txt")]
    if labels is not None:
        below = Path(name).with_suffix(".txt")
        inner = Path(*below.parts[1:]) if below.parts[0] == "images" else below
        candidates = [labels / below, labels / inner, *candidates]
    return next((file for file in candidates if file.is_file()), None)


def _read_label_file(path: Path | None) -> list[tuple[int, list[str]]]:
    """The number and the values of each line that is not empty."""
    if path is None:
        return []
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(n, values) for n, line in lines if (values := line.split())]


def _object(
    values: list[str], place: str, size: tuple[int, int], classes: Classes, remarks: Remarks
) -> MarkedObject | None:
    label = number(values[0], "the class", place)
    if label != int(label):
        raise ValueError(f"{place}: the class is {values[0]}, not a whole number")
    assert classes.names is not None
    if not 0 <= label < len(classes.names):
        remarks.add(f"objects of a class that the {len(classes.names)} names do not number are left out", place)
        return None
    numbers = [number(value, f"value {k}", place) for k, value in enumerate(values[1:], 2)]
    if classes.values_of_pose == len(values):
        numbers = numbers[:4]
    if len(numbers) == 4:
        return MarkedObject(classes.names[int(label)], _box(numbers, size), place)
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(
            f"{place} has {len(values)} values: an object has 5 (class cx cy w h), or a class and the x y of 3 or more"
            " points; results with a score are no labels"
        )
    remarks.add("polygons or rotated boxes are read as the boxes around them", place)
    points = [(x * size[0], y * size[1]) for x, y in zip(numbers[0::2], numbers[1::2], strict=True)]
    return MarkedObject(classes.names[int(label)], box_around(points), place, [flat(points)])


def _box(numbers: Sequence[float], size: tuple[int, int]) -> Box:
    cx, cy, w, h = (value * side for value, side in zip(numbers, (*size, *size), strict=True))
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def _require_fractions(images: Sequence[MarkedImage], path: Path) -> None:
    """ValueError where most boxes reach far out of their images, as numbers of pixels do."""
    boxes = [(thing, image.size) for image in images for thing in image.objects]
    far = [thing for thing, size in boxes if thing.box[2] > FAR * size[0] or thing.box[3] > FAR * size[1]]
    if len(far) > len(boxes) / 2:
        raise ValueError(
            f"{far[0].place}: the numbers seem to be pixels, but YOLO's are fractions of the image ({path})"
        )


def _count_shared(files: Sequence[Path | None], names: Sequence[str], remarks: Remarks) -> None:
    """Count the images whose label file another one, of the same name but for the ending, has too."""
    owner: dict[Path, str] = {}
    for file, name in zip(files, names, strict=True):
        if file is not None and (other := owner.setdefault(file, name)) is not name:
            remarks.add("images have the label file of another image too", f"{name}, as {other}")


def _count_unused(files: Sequence[Path | None], labels: Path | None, index: ImageIndex, remarks: Remarks) -> None:
    """Count the label files whose name no image has, in this part of the data or another."""
    stems = {Path(name).stem for name in index.names}
    folders = {file.parent for file in files if file is not None} | ({labels} if labels else set())
    for file in (file for folder in sorted(folders) for file in sorted(folder.glob("*.txt"))):
        if file.name not in NO_LABELS and file.stem not in stems:
            remarks.add("label files without an image are left out", str(file))
