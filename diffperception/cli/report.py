"""What a run leaves behind for people: numbers as JSON, and pictures."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from diffperception.data import CocoDetection
from diffperception.detection import BoxSampler, Detector, DiffusionDet
from diffperception.diffusion import sample_seed
from diffperception.detection.evaluator import CocoResult
from diffperception.detection.inference import spread
from diffperception.detection.sweep import Audit
from diffperception.visualization.curves import sweep_curves
from diffperception.visualization.draw import THRESHOLD, save_png
from diffperception.visualization.panels import side_by_side, trajectory

STRIP_STEPS = 4  # of the strips, where no number of steps is asked for


def write_scores(result: CocoResult, folder: Path) -> None:
    """metrics.json (overall and by class; null where undefined) and detections.json (a COCO results file)."""
    scores = {
        "metrics": {name: _defined(value) for name, value in result.metrics.items()},
        "per_class": {name: _defined(value) for name, value in result.per_class.items()},
        "notes": [*result.notes, *([result.explanation] if result.explanation else [])],
    }
    write_text(folder / "metrics.json", json.dumps(scores, indent=2) + "\n")
    write_text(folder / "detections.json", json.dumps(result.detections))


def write_audit(audit: Audit, folder: Path) -> None:
    """audit.json (null where undefined) and audit.png, its curves."""
    content = audit.content()
    write_text(folder / "audit.json", json.dumps(content, indent=2) + "\n")
    save_png(sweep_curves(content["rows"]), folder / "audit.png")


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
    options: Mapping[str, Any] | None = None,
) -> None:
    """Predictions beside ground truth for `count` images spread over the data set, one PNG each.

    Of the first two there is also, for a DiffusionDet, a strip that shows noise turning into boxes.

    Args:
        seed, options: as in `evaluate_detector`.
    """
    for number, index in enumerate(spread(len(dataset), count) if count else []):
        image, target = dataset[index]
        name = Path(dataset.file_names[index]).stem
        noise = sample_seed(seed, target["image_id"])
        prediction = detector.predict([image.to(detector.device)], seeds=[noise], **(options or {}))[0]
        save_png(side_by_side(image, target, prediction, detector.classes), folder / f"{name}.png")
        if number < 2 and isinstance(detector, DiffusionDet):
            save_png(draw_strip(detector, image, noise), folder / f"{name}_noise_to_boxes.png")


def draw_strip(
    detector: DiffusionDet,
    image: Tensor,
    seed: int,
    options: BoxSampler | None = None,
    threshold: float = THRESHOLD,
) -> Image.Image:
    """Noise turning into the boxes of one image.

    Args:
        image: (3, H, W), as for `detector.predict`, on any device.
        seed: of the noise.
        options: of the sampler; by default the model's own, but STRIP_STEPS steps.
        threshold: detections with lower scores are not drawn.
    """
    on_device = image.to(detector.device)
    options = options or detector.sampler_options(STRIP_STEPS)
    trace = detector.trace(on_device, options.steps, seed=seed, options=options)
    detections = detector.predict([on_device], [seed], options=options)[0]
    return trajectory(image, trace, detections, detector.classes, threshold)


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
