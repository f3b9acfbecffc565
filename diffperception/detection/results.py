"""COCO results files: read row by row, and given the ids of the annotation file that they are scored against."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffperception.data.annotations import ID, CocoTable, read_coco, require_same_classes, tabulate
from diffperception.data.entries import Rule, box, boxes, faults, finite_number, integers, numbers
from diffperception.data.outlines import outline
from diffperception.files import read_json

IMAGES = "images.json"  # beside the results: the COCO file with the images and categories that their ids are of
WRITER = "diffperception predict"  # in that file, so that no other one is taken for it
Row = dict[str, Any]


def _result_box(value: Any) -> list[float]:
    if min((read := box(value))[2:]) < 0:
        raise ValueError(f"{value!r} has a width or height below 0")
    return read


RULES = {
    "image_id": ID,
    "category_id": ID,
    "bbox": Rule(_result_box, "a list of four finite numbers: x, y, and width and height from 0"),
    "score": Rule(finite_number, "a finite number"),
}
TRACK = {"track_id": ID}
RUN_LENGTHS = {"segmentation": Rule(lambda value: _run_lengths(value), "run lengths: an object with size and counts")}


def _run_lengths(value: Any) -> Any:
    if not isinstance(value, dict) or not value:
        raise ValueError("they are no run lengths")
    return outline(value)


@dataclass(frozen=True)
class ResultRows:
    """Rows of a results file, with image and category ids of the annotation file, and what was done to them."""

    rows: list[Row]
    notes: list[str]


def read_results(path: str | Path, table: CocoTable, with_masks: bool = False, with_tracks: bool = False) -> ResultRows:
    """The rows of a COCO results file: image_id, category_id, bbox (xywh in pixels), score, and segmentation for masks.

    And the track_id, a whole number, where tracks are wanted.

    Where `predict` has left an images.json beside it, image ids are found by the names of files and category ids by
    those of classes; rows of images that the annotation file does not list are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no list of rows, or one of them (counted from 1) has a value that cannot be used or an id that
            the annotation file does not list.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no results file {path}")
    rows = _read_rows(path, RULES | (RUN_LENGTHS if with_masks else {}) | (TRACK if with_tracks else {}))
    notes: list[str] = []
    if (found := read_described(path)) is not None:
        described, by_name = found
        rows, notes = translate(rows, described, table)
        if by_name:
            notes.append(
                "Noise was drawn from the images' names, so the score may differ from that of the model as between"
                " seeds: predict with --annotations for the same."
            )
    known: dict[str, set[int]] = {
        "image_id": set(table.image_ids.tolist()),
        "category_id": set(table.category_ids.tolist()),
    }
    for row, entry in enumerate(rows, 1):
        for key, ids in known.items():
            if entry[key] not in ids:
                examples = f"{table.source} has {', '.join(map(str, sorted(ids)[:5]))}{', ...' if len(ids) > 5 else ''}"
                raise ValueError(
                    f'{path}, row {row}: "{key}" is {entry[key]}, which the annotation file does not list ({examples})'
                )
    return ResultRows(rows, notes)


def _read_rows(path: Path, rules: dict[str, Rule]) -> list[Row]:
    content = read_json(path)
    expected = f"a results file is a list of rows, objects with {', '.join(rules)}"
    if isinstance(content, dict):
        keys = ", ".join(list(content)[:5])
        inside = [key for key, value in content.items() if isinstance(value, list)]
        advice = f": save its list {inside[0]!r} alone" if len(inside) == 1 else ""
        raise ValueError(f"{path} holds an object ({keys or 'empty'}), but {expected}{advice}")
    if not isinstance(content, list):
        raise ValueError(f"{path} holds {json.dumps(content)[:20]}, but {expected}")
    try:
        return _columns(content, rules)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        found = [(row, fault) for row, entry in enumerate(content, 1) for fault in faults(entry, rules)]
        if not found:
            raise
        (row, fault), rest = found[0], len({row for row, _ in found}) - 1
        more = f" (and {rest} more rows are wrong)" if rest else ""
        raise ValueError(f"{path}, row {row}: {fault}{more}; {expected}") from None


def _columns(content: list[Any], rules: dict[str, Rule]) -> list[Row]:
    """The rows with plain numbers; an error that says nothing of where if one cannot be read."""
    found = boxes([entry["bbox"] for entry in content])
    if (found[:, 2:] < 0).any():
        raise ValueError("a box has a side below 0")
    columns = {
        "image_id": integers([entry["image_id"] for entry in content]).tolist(),
        "category_id": integers([entry["category_id"] for entry in content]).tolist(),
        "bbox": found.tolist(),
        "score": numbers([entry["score"] for entry in content]).tolist(),
    }
    if "segmentation" in rules:
        columns["segmentation"] = [_run_lengths(entry["segmentation"]) for entry in content]
    if "track_id" in rules:
        columns["track_id"] = integers([entry["track_id"] for entry in content]).tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def describe_results(
    images: list[dict[str, Any]], category_ids: Sequence[int], classes: Sequence[str], results: str, seeds_of: str
) -> dict[str, Any]:
    """The content of IMAGES beside a results file of that name, whose noise was drawn from `names` or `ids`."""
    categories = [{"id": category, "name": name} for category, name in zip(category_ids, classes, strict=True)]
    info = {"by": WRITER, "results": results, "noise": seeds_of}
    return {"info": info, "images": images, "annotations": [], "categories": categories}


def read_described(results: Path) -> tuple[CocoTable, bool] | None:
    """The images and categories that the ids of a results file are of, where `predict` has written them beside it.

    And whether its noise was drawn from the names of the images.
    """
    path = results.with_name(IMAGES)
    if not path.is_file():
        return None
    try:
        content = read_coco(path)
    except ValueError:  # another's file
        return None
    info = content.get("info")
    if not isinstance(info, dict) or info.get("by") != WRITER or info.get("results") != results.name:
        return None
    return tabulate(content, path), info.get("noise") == "names"


def translate(rows: Sequence[Row], described: CocoTable, table: CocoTable) -> tuple[list[Row], list[str]]:
    """Rows with the ids that the annotation file has for the described images and classes, and what was done.

    Raises:
        ValueError: the annotation file has other classes, or none of the images.
    """
    label_ids, classes = described.labels()
    require_same_classes(classes, table.labels()[1], table.source, described.source)
    category_of = dict(zip(label_ids, table.labels(classes)[0], strict=True))
    image_of = match_images(described, table)
    if not image_of:
        raise ValueError(
            f"none of the images of {described.source} is in {table.source}: {described.file_names[0]} was predicted,"
            f" {table.file_names[0]} is in the file; predict with --annotations {table.source}"
        )
    notes = []
    if any(a != b for a, b in [*category_of.items(), *image_of.items()]):
        notes.append(f"Image ids are found by file name and classes by name, as {described.source} lists them.")
    if absent := len(described.image_ids) - len(image_of):
        notes.append(
            f"{absent} of {len(described.image_ids)} predicted images are not in {table.name}: they do not count."
        )
    known = set(described.image_ids.tolist())
    kept = [row for row in rows if row["image_id"] in image_of or row["image_id"] not in known]
    ids = ((row, image_of.get(row["image_id"]), category_of.get(row["category_id"])) for row in kept)
    return [row | {"image_id": image, "category_id": category} for row, image, category in ids], notes


def match_images(described: CocoTable, table: CocoTable) -> dict[int, int]:
    """The id in `table` of each image that is described, by its file's name: the whole, or the last part alone.

    Raises:
        ValueError: two of them would be one image of the table.
    """
    whole_names = dict(zip(table.file_names, table.image_ids.tolist(), strict=True))
    last_names = _unique_last_parts(table.file_names, table.image_ids.tolist())
    own = _unique_last_parts(described.file_names, described.image_ids.tolist())
    found = {}
    for name, described_id in zip(described.file_names, described.image_ids.tolist(), strict=True):
        last = _last_part(name)
        image = whole_names.get(name, last_names.get(last) if last in own else None)
        if image is not None:
            found[described_id] = image
    if len(set(found.values())) < len(found):
        raise ValueError(
            f"two images of {described.source} have the name of one in {table.source}: predict with --annotations"
            f" {table.source}"
        )
    return found


def _unique_last_parts(names: Iterable[str], ids: Iterable[int]) -> dict[str, int]:
    pairs = [(_last_part(name), image_id) for name, image_id in zip(names, ids, strict=True)]
    count = Counter(name for name, _ in pairs)
    return {name: image_id for name, image_id in pairs if count[name] == 1}


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]
