from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Draw = Callable[..., Path]


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Writes images of 64 x 48 pixels, or another size, below a folder of the test's, which it returns."""

    def write(*names: str, folder: str = "images", size: tuple[int, int] = (64, 48)) -> Path:
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(path)
        return tmp_path / folder

    return write


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a text file below the test's folder."""

    def save(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return save


def random_coco(seed: int, names: list[str], classes: list[str], size: tuple[int, int] = (64, 48)) -> dict[str, Any]:
    """A COCO file with random boxes in images of these names, some along the borders, one image without any."""
    random = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    for image_id, _ in enumerate(names[1:], 2):
        for _ in range(random.integers(1, 6)):
            x1, x2 = np.sort(random.uniform(0, size[0], 2))
            y1, y2 = np.sort(random.uniform(0, size[1], 2))
            x1, y2 = random.choice([0.0, x1]), random.choice([float(size[1]), y2])
            box = [float(value) for value in (x1, y1, x2 - x1, y2 - y1)]
            if random.random() < 0.5:
                box = [float(np.floor(value)) for value in box[:2]] + [float(np.ceil(value)) for value in box[2:]]
                box[2:] = [min(box[2], size[0] - box[0]), min(box[3], size[1] - box[1])]
            label = int(random.integers(len(classes)))
            annotations.append({"image_id": image_id, "category_id": label, "bbox": box, "iscrowd": 0})
    return {
        "images": [
            {"id": k, "file_name": name, "width": size[0], "height": size[1]} for k, name in enumerate(names, 1)
        ],
        "annotations": [{"id": k, **entry} for k, entry in enumerate(annotations, 1)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(classes)],
    }


def objects(content: dict[str, Any]) -> list[tuple[str, str, list[float]]]:
    """File name, class and box of each object, in order."""
    files = {image["id"]: image["file_name"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = [(files[a["image_id"]], names[a["category_id"]], list(a["bbox"])) for a in content["annotations"]]
    return sorted(found)
