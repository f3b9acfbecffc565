"""Small COCO files, and predictions of what is in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffperception.data.annotations import read_coco, tabulate


def write_coco(path: Path, objects: list[dict[str, Any]], images: int, category_ids: list[int]) -> Path:
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 400, "height": 300} for i in range(images)],
        "categories": [{"id": c, "name": f"class {c}"} for c in category_ids],
        "annotations": [{"id": number, **o} for number, o in enumerate(objects)],
    }
    path.write_text(json.dumps(content))
    return path


def item(image_id: int, category_id: int, *xywh: float, **extra: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(xywh), **extra}


def as_predictions(path: Path) -> tuple[list[int], list[dict[str, Tensor]]]:
    """The objects of a file, as a perfect detector would predict them."""
    content = json.loads(path.read_text())
    label = {c: k for k, c in enumerate(tabulate(read_coco(path), path).labels()[0])}
    image_ids = [image["id"] for image in content["images"]]
    predictions = []
    for image_id in image_ids:
        mine = [a for a in content["annotations"] if a["image_id"] == image_id]
        boxes = torch.tensor([a["bbox"] for a in mine], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([label[a["category_id"]] for a in mine], dtype=torch.int64)
        predictions.append({"boxes": boxes, "scores": torch.ones(len(mine)), "labels": labels})
    return image_ids, predictions


def random_case(folder: Path, images: int = 30, seed: int = 0) -> tuple[Path, list[int], list[dict[str, Tensor]]]:
    """Random objects of all sizes, some crowds, and noisy, doubled and wrong predictions of them."""
    random = np.random.default_rng(seed)
    objects = [
        item(
            int(random.integers(images)),
            int(random.choice([3, 7, 90])),
            *random.uniform(0, 250, 2).tolist(),
            *random.uniform(5, 150, 2).tolist(),
            id=number,
            area=random.uniform(20, 20000),
            iscrowd=int(random.random() < 0.1),
        )
        for number in range(1, 6 * images)  # pycocotools itself needs ids above 0
    ]
    path = write_coco(folder / "random.json", objects, images, [90, 3, 7])

    generator = torch.Generator().manual_seed(seed)
    image_ids, perfect = as_predictions(path)
    predictions = []
    for p in perfect:
        boxes = p["boxes"].repeat(2, 1)
        boxes = boxes + torch.randn(boxes.shape, generator=generator) * 8
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = torch.where(
            torch.rand(len(boxes), generator=generator) < 0.8,
            p["labels"].repeat(2),
            torch.randint(3, (len(boxes),), generator=generator),
        )
        predictions.append({"boxes": boxes, "labels": labels, "scores": torch.rand(len(boxes), generator=generator)})
    return path, image_ids, predictions


def boxes(*rows: tuple[float, float, float, float], label: int = 0, scores: list[float] | None = None):
    return {
        "boxes": torch.tensor(rows, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores if scores is not None else [0.9] * len(rows)),
        "labels": torch.full((len(rows),), label),
    }
