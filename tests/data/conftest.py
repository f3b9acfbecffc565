import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Content = dict[str, Any]


@pytest.fixture
def content() -> Content:
    """A sound COCO file: three images, two categories whose ids are neither dense nor in order."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.png", "width": 20, "height": 50},
            {"id": 5, "file_name": "c.png", "width": 32, "height": 32},
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 20, "bbox": [1, 2, 10, 12], "area": 100, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 10, "bbox": [5, 5, 20.5, 10], "area": 205, "iscrowd": 0},
            {"id": 3, "image_id": 3, "category_id": 10, "bbox": [0, 0, 20, 50], "area": 900, "iscrowd": 1},
        ],
        "categories": [{"id": 20, "name": "dog"}, {"id": 10, "name": "cat"}],
    }


@pytest.fixture
def folder(tmp_path: Path, content: Content) -> Path:
    """The images of `content`, each of one grey value: 50, 100, 150."""
    for k, image in enumerate(content["images"], start=1):
        pixels = np.full((image["height"], image["width"], 3), 50 * k, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / image["file_name"])
    return tmp_path


@pytest.fixture
def save(tmp_path: Path):
    """Writes a COCO file and returns its path."""

    def write(content: Content) -> Path:
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(content))
        return path

    return write
