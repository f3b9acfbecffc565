"""A COCO data set of a few small images, and the configuration that trains on it in a second."""

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

CLASSES = {3: "disc", 7: "square"}  # by category id


def write_tiny_data(folder: Path, images: int = 7) -> tuple[Path, Path]:
    """Write `images` pictures and their annotations; returns the JSON file and the image folder."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    entries, annotations = [], []
    for number in range(images):
        width, height = 32, 24 + number
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        entries.append({"id": 10 + number, "file_name": f"{number}.png", "width": width, "height": height})
        category = list(CLASSES)[number % 2]
        box = [2, 2, 10 + number, 12]
        annotations.append(
            {"id": number + 1, "image_id": 10 + number, "category_id": category, "bbox": box, "area": 12 * box[2]}
        )
    categories = [{"id": number, "name": name} for number, name in CLASSES.items()]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder / "annotations.json", folder / "images"


def write_tiny_config(folder: Path) -> Path:
    """The data set and a configuration of a run on it with `TinyDetector`; returns the YAML file."""
    annotations, images = map(str, write_tiny_data(folder / "data"))
    config = {
        "model": {"class_path": "tests.training.tiny_detector.TinyDetector"},
        "data": {
            "train_annotations": annotations,
            "train_images": images,
            "val_annotations": annotations,
            "val_images": images,
            "transforms": {"class_path": "torchvision.transforms.v2.ColorJitter", "init_args": {"brightness": 0.5}},
            "batch_size": 2,
            "workers": 0,
        },
        "optimizer": {"lr": 0.01, "base_batch_size": 2, "warmup_steps": 3, "ema_decay": 0.9},
        "trainer": {"max_steps": 9, "log_every": 1, "checkpoint_every": 3, "accelerator": "cpu"},
        "evaluation": {"every": 4, "num_pictures": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"
