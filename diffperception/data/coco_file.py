"""The COCO annotation file: reading it, and the one rule that ties labels to category ids."""

import json
from pathlib import Path
from typing import Any


def read_coco(path: str | Path, outlines: bool = False) -> dict[str, Any]:
    """The content of a COCO annotation file.

    Args:
        outlines: whether outlines (`segmentation`) are wanted. They are most of a large file: where nobody needs them,
            they are dropped while parsing and take no memory.

    Returns:
        Its dictionary, with the lists `images`, `annotations` and `categories`.
        Images have a `file_name` where LVIS names them by their URL: its last two parts, such as train2017/000001.jpg.

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
        raise ValueError(
            f"{path} is not a COCO annotation file: it must hold the lists images, annotations, categories"
        )
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
