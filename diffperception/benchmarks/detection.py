"""DiffusionDet with ResNet-50 on 480 x 640 pixels, against torchvision's backbone in the same process."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from diffperception.benchmarks.timing import Row, Say, best_seconds, ratio_table
from diffperception.detection import BoxSampler, DiffusionDet
from diffperception.detection.export import NEEDED, export_detector
from diffperception.detection.matcher import match
from diffperception.detection.targets import PaddedTargets, image_sizes

HEIGHT, WIDTH = 480, 640
NUM_BOXES = 300
NUM_CLASSES = 80
OBJECTS = 10
STAGES = 6


def time_detector(repeats: int, say: Say, device: torch.device | str = "cpu") -> str:
    """The table of what our parts and calls take; the unit is one forward pass of torchvision's resnet50_fpn.

    Args:
        repeats: the best of so many runs counts.
    """
    torch.manual_seed(0)
    images = [torch.rand(3, HEIGHT, WIDTH).to(device) for _ in range(4)]
    rows: list[Row] = []

    def record(name: str, function: Callable[[], object], target: float | None = None) -> None:
        say(name)
        rows.append(Row(name, best_seconds([function], repeats)[0], target))

    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=5).eval().to(device)
    batch = torch.stack(images[:1])
    with torch.no_grad():
        record("torchvision resnet50_fpn, one image (unit)", lambda: backbone(batch))
    detector = DiffusionDet([str(i) for i in range(NUM_CLASSES)], freeze_norm=True, min_size=None).eval().to(device)
    with torch.no_grad():
        _time_prediction(detector, images, record)
        if detector.device.type == "cpu" and not any(find_spec(name) is None for name in (*NEEDED, "onnxruntime")):
            say("export to ONNX")
            record("one step by onnxruntime", _by_onnxruntime(detector, images[0]))
    _time_training(detector.train(), images[:2], record)
    return ratio_table(rows)


def _time_prediction(detector: DiffusionDet, images: list[torch.Tensor], record: Callable[..., None]) -> None:
    one, four = BoxSampler(1, NUM_BOXES), BoxSampler(4, NUM_BOXES)
    encoded = detector.encode(images[:1])
    boxes, t = _random_boxes(NUM_BOXES)[None].to(detector.device), torch.tensor([500]).to(detector.device)
    sampled = detector.sample(encoded, [0], four)
    record("backbone, one image", lambda: detector.features(images[:1]))
    record("head, one pass", lambda: detector.head(encoded.pyramid, boxes, t, last_only=True))
    record("post-processing of four steps", lambda: four.select(sampled, encoded.seen, encoded.sizes))
    record("prediction, one step", lambda: detector.predict(images[:1], sampler=one), target=1.4)
    record("prediction, four steps", lambda: detector.predict(images[:1], sampler=four), target=3.4)
    record("prediction, four images, four steps", lambda: detector.predict(images, sampler=four), target=13)


def _by_onnxruntime(detector: DiffusionDet, image: torch.Tensor) -> Callable[[], object]:
    """One step of the detector as a graph of ONNX, on as many threads."""
    import onnxruntime

    options, sampler = onnxruntime.SessionOptions(), BoxSampler(1, NUM_BOXES)
    options.intra_op_num_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        export_detector(detector, path, HEIGHT, WIDTH, sampler)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {"images": image[None].numpy(), "noise": sampler.draw([0]).numpy()}
    return lambda: session.run(None, inputs)


def _time_training(detector: DiffusionDet, images: list[torch.Tensor], record: Callable[..., None]) -> None:
    targets = [{"boxes": _random_boxes(OBJECTS), "labels": torch.arange(OBJECTS)} for _ in images]
    padded = PaddedTargets.collate(targets, image_sizes(images)).repeat(STAGES).to(detector.device)
    rows = len(padded.boxes)
    logits = torch.randn(rows, NUM_BOXES, NUM_CLASSES).to(detector.device)
    boxes = _random_boxes(NUM_BOXES).to(detector.device).expand(rows, -1, -1)
    optimizer = torch.optim.AdamW(detector.parameters(), 1e-6, fused=True)  # as in training

    def step() -> None:
        torch.stack(list(detector.loss(images, targets).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    record("matching, two images, six stages", lambda: match(logits, boxes, padded))
    record("training step, two images", step, target=8.5)


def _random_boxes(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    size = torch.tensor([WIDTH, HEIGHT])
    extent = 20 + torch.rand(count, 2, generator=generator) * (size / 2 - 20)
    low = torch.rand(count, 2, generator=generator) * (size - extent)
    return torch.cat([low, low + extent], 1)
