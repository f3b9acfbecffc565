"""A detector as one graph for other runtimes: a fixed number of steps and boxes, images of a fixed size."""

import io
import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from diffperception.detection.detector import Detector, DiffusionDet
from diffperception.detection.heads.boxes import HeadOutput
from diffperception.detection.sampler import BoxSampler
from diffperception.doctor import require_installed
from diffperception.files import written_beside
from diffperception.models.ops.pooling import PyramidOfMaps

OPSET = 18
INPUTS, OUTPUTS = ("images", "noise"), ("boxes", "scores", "labels")
NEEDED = ("onnx", "onnxscript")  # by torch's exporter
TALKATIVE = ("onnxscript", "onnx_ir", "torch.onnx")


class DetectorGraph(nn.Module):
    """What `DiffusionDet.predict` finds in images of one size, as a function of tensors alone.

    Args:
        detector: in evaluation mode.
        sampler: with its steps and boxes.
        height, width: of the images, as the network sees them: nothing is resized.
    """

    size: Tensor

    def __init__(self, detector: DiffusionDet, sampler: BoxSampler, height: int, width: int):
        super().__init__()
        self.detector = detector
        self.sampler = sampler.changed(num_boxes=sampler.num_boxes or detector.num_boxes)
        self.times = self.sampler.times(detector.schedule)
        self.register_buffer("size", torch.tensor([width, height] * 2, dtype=torch.float32))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """P candidates per image, N for every step that counts, best first; those that NMS takes away are zeros.

        Args:
            images: float32 (B, 3, H, W), RGB, 0..1.
            noise: (2 * steps - 1, B, N, 4), standard normal, as `BoxSampler.draw` gives it.

        Returns: boxes (B, P, 4) xyxy in pixels, scores (B, P), and labels (B, P) int64.
        """
        detector, sampler, sizes = self.detector, self.sampler, self.size.expand(images.shape[0], 4)
        below, right = (-side % detector.pad_multiple for side in images.shape[-2:])
        padded = F.pad((images * 255 - detector.mean) / detector.std, (0, right, 0, below))
        pyramid = PyramidOfMaps(detector.backbone(padded), detector.strides)

        def denoise(boxes: Tensor, t: Tensor) -> HeadOutput:
            return HeadOutput.last_stage([detector.head(pyramid, boxes, t, last_only=True)])

        steps = sampler.walk(denoise, detector.schedule, self.times, noise, sizes, detector.signal_scale)
        found = sampler.candidates(steps)
        boxes, scores, labels = (found[name] for name in OUTPUTS)
        clipped = torch.minimum(boxes.clamp(min=0), sizes[:, None])
        left = (clipped[..., 2:] > clipped[..., :2]).all(-1)
        if sampler.nms_threshold is not None:
            left &= _left_by_nms(boxes, scores, labels, len(detector.classes), sampler.nms_threshold)
        scores, order = torch.where(left, scores, 0).topk(scores.shape[1], dim=1)
        clipped, labels = clipped.gather(1, order[..., None].expand(-1, -1, 4)), labels.gather(1, order)
        return torch.where(scores[..., None] > 0, clipped, 0), scores, torch.where(scores > 0, labels, 0)

    def example(self, batch: int) -> tuple[Tensor, Tensor]:
        """Inputs of the right shapes."""
        width, height = self.size[:2].int().tolist()
        return torch.rand(batch, 3, height, width), self.sampler.draw(range(batch))


def _left_by_nms(boxes: Tensor, scores: Tensor, labels: Tensor, classes: int, threshold: float) -> Tensor:
    """(B, P) whether class-wise NMS leaves a box.

    Before it, boxes of another class or image are moved to another field of a grid, which is about as wide as it is
    high, so that float32 rounds little away.
    """
    columns = math.isqrt(classes - 1) + 1
    image = torch.arange(labels.shape[0], device=labels.device)[:, None] * (classes // columns + 1)
    field = torch.stack([labels % columns, labels // columns + image], 2).repeat(1, 1, 2)
    side = boxes.flatten().amax(0) - boxes.flatten().amin(0) + 1
    kept = nms((boxes + field * side).flatten(0, 1), scores.flatten(), threshold)
    return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill(0, kept, True).view(scores.shape)


def export_detector(
    detector: Detector,
    output: str | Path,
    height: int,
    width: int,
    sampler: BoxSampler | None = None,
) -> DetectorGraph:
    """Write a DiffusionDet's prediction, of any number of images, as a graph of ONNX or a program of `torch.export`.

    Args:
        detector: which computes on the CPU; it is left in evaluation mode.
        output: a file that ends in .onnx, or in .pt2 for `torch.export.load`.
        height, width: of the images, as the network sees them.
        sampler: instead of the detector's own, see `Detector.sampler_with`.

    Returns: what was written; its `forward` says what goes in and what comes out.

    Raises:
        ModuleNotFoundError: ONNX is asked for and `onnx` or `onnxscript` is not installed.
        ValueError: the detector is of another kind, or a part of it cannot be exported; or the file has another end.
    """
    path = Path(output)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{path} must end in .onnx, or in .pt2 for torch.export")
    if not isinstance(detector, DiffusionDet) or detector.gives_masks:
        what = "a detector of masks" if detector.gives_masks else type(detector).__name__
        raise ValueError(f"DiffusionDets that give boxes alone can be exported, not {what}")
    graph = DetectorGraph(detector.eval(), sampler or detector.sampler, height, width).eval()
    if graph.sampler.box_voting is not None:
        raise ValueError("a graph gives boxes as NMS leaves them: leave box_voting out (null)")
    if graph.sampler.start_time is not None:
        raise ValueError("a graph starts from noise alone: leave start_time out (null)")
    for name in NEEDED if path.suffix == ".onnx" else ():
        require_installed(name, "ONNX", "pip install 'diffperception[export]'")
    content, batch = io.BytesIO(), torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(graph, graph.example(2), dynamic_shapes=({0: batch}, {1: batch}))
            if path.suffix == ".onnx":
                content.write(_onnx_of(program, detector.classes))
            else:
                torch.export.save(program, content)
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"a part of this detector cannot be exported ({reason[:300]})") from error
    with written_beside(path) as beside:
        beside.write_bytes(content.getbuffer())
    return graph


def _onnx_of(program: torch.export.ExportedProgram, classes: list[str]) -> bytes:
    names: dict[str, Any] = {"input_names": INPUTS, "output_names": OUTPUTS, "opset_version": OPSET}
    converted = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    assert converted is not None
    converted.model.metadata_props["classes"] = json.dumps(classes)
    return converted.model_proto.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says to programmers."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
