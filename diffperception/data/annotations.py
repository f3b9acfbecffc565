"""COCO annotation files: reading them, which label a category has, and their content as compact columns."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ADVICE = "`diffperception check` lists every problem of the file"


def read_coco(path: str | Path, outlines: bool = False) -> dict[str, Any]:
    """The content of a COCO annotation file, with the lists `images`, `annotations` and `categories`.

    Where images are named by a URL alone, as in LVIS, its last two parts become the file_name: train2017/000001.jpg.

    Args:
        outlines: whether outlines (`segmentation`) are wanted. They are most of a large file: where nobody needs them,
            they are dropped while parsing and take no memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or one of the three lists is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no annotation file {path}: give the path of a COCO JSON file")
    try:
        content = json.loads(path.read_bytes(), object_hook=None if outlines else _without_outline)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not a JSON file ({error}): was it cut short?") from None
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise ValueError(f"{path} is not a COCO annotation file: it must hold the lists {', '.join(keys)}")
    for image in content["images"]:
        if isinstance(image, dict) and isinstance(image.get("coco_url"), str):
            image.setdefault("file_name", "/".join(image["coco_url"].split("/")[-2:]))
    return content


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


def labels_of(categories: list[dict[str, Any]]) -> tuple[list[int], list[str]]:
    """The category id and the class name of each label 0..K-1: labels count the categories in the order of their ids.

    Where several categories share a name, the id is added to it, so that names are unique.
    """
    ordered = sorted(categories, key=lambda category: category["id"])
    names = [str(category["name"]) for category in ordered]
    unique = [
        f"{name} (id {category['id']})" if names.count(name) > 1 else name
        for name, category in zip(names, ordered, strict=True)
    ]
    return [category["id"] for category in ordered], unique


@dataclass(frozen=True)
class CocoTable:
    """The parts of a COCO file that detection needs, one array a column; I images, A annotations, K categories.

    The parsed JSON of a large file takes gigabytes of small Python objects, and every worker process that reads one
    copies its page because of the reference count. Arrays have neither cost.
    """

    image_ids: np.ndarray  # (I,) int64
    file_names: list[str]
    sizes: np.ndarray  # (I, 2) int64: width, height
    category_ids: np.ndarray  # (K,) int64, as listed in the file
    category_names: list[str]
    annotation_ids: np.ndarray  # (A,) int64
    annotation_images: np.ndarray  # (A,) int64 image ids
    annotation_categories: np.ndarray  # (A,) int64 category ids
    boxes: np.ndarray  # (A, 4) float64 x, y, width, height in pixels
    areas: np.ndarray  # (A,) float64; the box's area where the file gives none
    iscrowd: np.ndarray  # (A,) bool

    def rows_of_images(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) the image row of each annotation whose image is listed, and (n,) the row of that annotation."""
        known = np.flatnonzero(np.isin(self.annotation_images, self.image_ids))
        order = np.argsort(self.image_ids, kind="stable")
        return order[np.searchsorted(self.image_ids, self.annotation_images[known], sorter=order)], known


def tabulate(content: dict[str, Any], source: str | Path) -> CocoTable:
    """Columns of a parsed COCO file; raises ValueError naming `source` where a key is missing or has a wrong type."""
    images, annotations, categories = (content[name] for name in ("images", "annotations", "categories"))
    try:
        boxes = np.array([entry["bbox"] for entry in annotations], dtype=np.float64).reshape(len(annotations), 4)
        areas = np.array([entry.get("area", np.nan) for entry in annotations], dtype=np.float64)
        return CocoTable(
            image_ids=_integers(images, "id"),
            file_names=[str(entry["file_name"]) for entry in images],
            sizes=np.stack([_integers(images, "width"), _integers(images, "height")], axis=1),
            category_ids=_integers(categories, "id"),
            category_names=[str(entry["name"]) for entry in categories],
            annotation_ids=np.array([entry.get("id", -1) for entry in annotations], dtype=np.int64),
            annotation_images=_integers(annotations, "image_id"),
            annotation_categories=_integers(annotations, "category_id"),
            boxes=boxes,
            areas=np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
            iscrowd=np.array([bool(entry.get("iscrowd", 0)) for entry in annotations], dtype=bool),
        )
    except KeyError as error:
        raise ValueError(f"{source}: an entry has no key {error}; {ADVICE}") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{source}: an entry has a value of a wrong type ({error}); {ADVICE}") from None


def _integers(entries: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([entry[key] for entry in entries], dtype=np.int64)
