"""What a run leaves behind for people: numbers as JSON, and pictures."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffperception.data import CocoDetection
from diffperception.detection import Detector, image_seed
from diffperception.detection.evaluation import CocoResult
from diffperception.tasks.evaluation import spread
from diffperception.visualize import save_png, side_by_side, trajectory_strip

STRIP_STEPS = 4


def write_scores(result: CocoResult, folder: Path) -> None:
    """metrics.json (overall and by class; null where undefined) and detections.json (a COCO results file)."""
    scores = {
        "metrics": {name: _defined(value) for name, value in result.metrics.items()},
        "per_class": {name: _defined(value) for name, value in result.per_class.items()},
        "notes": [*result.notes, *([result.explanation] if result.explanation else [])],
    }
    write_text(folder / "metrics.json", json.dumps(scores, indent=2) + "\n")
    write_text(folder / "detections.json", json.dumps(result.detections))


def write_text(path: Path, text: str) -> None:
    """Write a file beside `path` and rename it, so that `path` is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    os.replace(beside, path)


def draw_pictures(
    detector: Detector,
    dataset: CocoDetection,
    folder: Path,
    count: int,
    seed: int = 0,
    options: Mapping[str, int] | None = None,
) -> None:
    """Predictions beside ground truth for `count` images spread over the data set, one PNG each.

    Of the first two there is also, for a detector that has a `trace`, a strip that shows noise turning into boxes.

    Args:
        seed, options: as in `evaluate_detector`.
    """
    for number, index in enumerate(spread(len(dataset), count) if count else []):
        image, target = dataset[index]
        name = Path(dataset.file_names[index]).stem
        noise = image_seed(seed, target["image_id"])
        prediction = detector.predict([image.to(detector.device)], seeds=[noise], **(options or {}))[0]
        picture = side_by_side(image, target, _on_cpu(prediction), detector.classes)
        save_png(picture, folder / f"{name}.png")
        if number < 2 and hasattr(detector, "trace"):
            _draw_strip(detector, image, noise, folder / f"{name}_noise_to_boxes.png")


def _draw_strip(detector: Any, image: torch.Tensor, seed: int, path: Path) -> None:
    on_device = image.to(detector.device)
    trace = detector.trace(on_device, steps=STRIP_STEPS, seed=seed)
    detections = detector.predict([on_device], seeds=[seed], steps=STRIP_STEPS)[0]
    save_png(trajectory_strip(image, [_on_cpu(step) for step in trace], _on_cpu(detections), detector.classes), path)


def _on_cpu(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
