"""Captions of images: files in COCO's format, as captions_train2017.json."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffperception.data.annotations import ADVICE, ID, entry_faults, read_coco
from diffperception.data.check_report import Problem
from diffperception.data.entries import Rule, text, whole_number
from diffperception.data.listing import spelling

RULES = {
    "images": {"id": ID, "file_name": Rule(text, "a text")},
    "annotations": {"image_id": ID, "caption": Rule(text, "a text that is not empty")},
}
# Words that are no longer true of a picture which is mirrored from left to right, or from top to bottom.
SIDES = {
    "horizontal": re.compile(r"\b(?:left|right|leftmost|rightmost)\b|[左右]", re.IGNORECASE),
    "vertical": re.compile(r"\b(?:above|below|over|under|top|bottom|upper|lower)\b|[上下]", re.IGNORECASE),
}


@dataclass(frozen=True)
class Captions:
    """The captions of a file, by the images' names in it."""

    source: Path
    by_name: dict[str, list[str]]

    def __iter__(self) -> Iterator[str]:
        return (caption for captions in self.by_name.values() for caption in captions)

    def of_paths(self, paths: Sequence[Path], folder: str | Path) -> dict[Path, list[str]]:
        """The captions of those images, of a folder that the file's names are relative to, that have some.

        Raises:
            ValueError: none of them has.
        """
        known: dict[str, list[str]] = {}
        for name, captions in self.by_name.items():
            place = os.path.abspath(Path(folder, name.replace("\\", "/")))
            for each in (place, os.path.splitext(place)[0]):
                known.setdefault(spelling(each), captions)
        found = {}
        for path in paths:
            place = os.path.abspath(path)
            if own := known.get(spelling(place)) or known.get(spelling(os.path.splitext(place)[0])):
                found[path] = own
        if not found:
            raise ValueError(f"{self.source} has no caption of any image of {folder}: are they of other images?")
        return found


def read_captions(path: str | Path) -> Captions:
    """The captions of a COCO file: `images` with id and file_name, `annotations` with image_id and caption.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, an entry cannot be used, or entries do not fit one another.
    """
    content, faults = _read(path)
    if faults:
        more = f", and {len(faults) - 1} more faults" if len(faults) > 1 else ""
        raise ValueError(f"{path} cannot be used: {faults[0]}{more}; correct or remove the entry ({ADVICE})")
    names = {whole_number(image["id"]): image["file_name"] for image in content["images"]}
    by_name: dict[str, list[str]] = {name: [] for name in names.values()}
    for entry in content["annotations"]:
        by_name[names[whole_number(entry["image_id"])]].append(entry["caption"].strip())
    return Captions(Path(path), by_name)


def check_captions(path: Path) -> list[Problem]:
    """What keeps the captions of a file from being read."""
    try:
        _, faults = _read(path)
    except (OSError, ValueError) as error:
        return [Problem("error", "captions", str(error))]
    message = f"entries of {path} cannot be used: training refuses the file"
    return [Problem("error", "captions", message, faults)] if faults else []


def _read(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The content of a file, and a sentence for each of its faults."""
    content = read_coco(path, lists=list(RULES))
    if not content["annotations"]:
        raise ValueError(f"{path} holds no caption: its list annotations is empty")
    faults = [fault.sentence() for fault in entry_faults(content, rules_of=RULES)]
    return content, faults or list(_misfits(content))


def _misfits(content: dict[str, Any]) -> Iterator[str]:
    """What is wrong with sound entries beside one another."""
    seen: dict[str, set[Any]] = {"id": set(), "file_name": set()}
    for index, image in enumerate(content["images"]):
        for key, value in (("id", whole_number(image["id"])), ("file_name", image["file_name"])):
            if value in seen[key]:
                yield f'images[{index}]: its "{key}", {value!r}, is that of an earlier image too'
            seen[key].add(value)
    for index, entry in enumerate(content["annotations"]):
        if (number := whole_number(entry["image_id"])) not in seen["id"]:
            yield f'annotations[{index}]: its "image_id", {number}, is of no image in the list images'


def require_sides_kept(captions: Captions, horizontal_flip: float, vertical_flip: float) -> None:
    """ValueError if images are to be mirrored whose captions tell left from right, or above from below."""
    for way, share in (("horizontal", horizontal_flip), ("vertical", vertical_flip)):
        for caption in captions if share else ():
            if said := SIDES[way].search(caption):
                raise ValueError(
                    f"data.{way}_flip is {share:g}, but {captions.source} has captions that are untrue of mirrored"
                    f" images, such as {caption!r} ({said[0]}): set it to 0"
                )
