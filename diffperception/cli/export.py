"""`diffperception export`: a detector for other runtimes."""

from pathlib import Path

from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from diffperception.detection import Detector
from diffperception.detection.export import export_detector
from diffperception.echo import echo


def command(
    model: Path,
    output: Path,
    height: PositiveInt,
    width: PositiveInt,
    steps: PositiveInt | None = None,
    num_boxes: PositiveInt | None = None,
    renewal_threshold: ClosedUnitInterval | None = None,
    ensemble: bool | None = None,
    eta: ClosedUnitInterval | None = None,
    nms_threshold: ClosedUnitInterval | None = None,
) -> None:
    """Write a DiffusionDet as a graph of ONNX (.onnx), or as a program of torch.export (.pt2).

    Steps, boxes and the size of the images are fixed in it, the number of images is not. It takes `images`
    (batch, 3, height, width), float32, RGB, 0..1, and `noise` (2 * steps - 1, batch, num_boxes, 4), standard normal;
    and gives `boxes` (xyxy in pixels), `scores` and `labels` of candidates, best first, of which those that NMS takes
    away are zeros.

    Args:
        output: the file, which ends in .onnx or .pt2.
        height: of the images, as the network sees them: whoever calls the graph resizes them.
        width: of the images.
    """
    detector = Detector.load(model)
    thresholds = {"renewal_threshold": renewal_threshold, "nms_threshold": nms_threshold}
    sampler = detector.sampler_with(steps=steps, num_boxes=num_boxes, ensemble=ensemble, eta=eta, **thresholds)
    graph = export_detector(detector, output, height, width, sampler)
    draws, _, boxes, _ = graph.example(1)[1].shape
    inputs = f"images (batch, 3, {height}, {width}) and noise ({draws}, batch, {boxes}, 4)"
    echo(f"{output}: {inputs} to boxes, scores and labels")
