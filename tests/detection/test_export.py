"""Detectors as graphs: the same detections as `predict`, in torch, in torch.export's program and in onnxruntime."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from diffperception.cli.main import main
from diffperception.detection import FCOS, BoxSampler, DiffusionDet
from diffperception.detection.export import DetectorGraph, _left_by_nms, export_detector
from diffperception.models import UNetBackbone
from diffperception.models.ops.pooling import FeaturePyramid, PyramidOfMaps
from tests.detection.scenes import CLASSES, assert_same_detections, random_boxes, random_image, tiny_detector
from tests.helpers.networks import tiny_unet

HEIGHT, WIDTH = 56, 90  # which are padded
IMAGES = [random_image(HEIGHT, WIDTH, seed) for seed in range(3)]
SEEDS = [4, 5, 6]


def unet_backbone() -> UNetBackbone:
    return UNetBackbone(tiny_unet(), [0, 1, 3])


def detections(outputs: tuple[Tensor, Tensor, Tensor]) -> list[dict[str, Tensor]]:
    """As `predict` gives them: without what scores nothing."""
    return [
        {"boxes": boxes[scores > 0], "scores": scores[scores > 0], "labels": labels[scores > 0]}
        for boxes, scores, labels in zip(*outputs, strict=True)
    ]


@pytest.mark.parametrize(
    "sampler",
    [
        BoxSampler(1, 12),
        BoxSampler(3, 12),
        BoxSampler(2, 12, eta=0.0, renewal_threshold=None, ensemble=False),
        BoxSampler(2, mode="fresh_boxes", nms_threshold=None),
    ],
)
def test_the_graph_finds_what_prediction_finds(sampler: BoxSampler) -> None:
    detector = tiny_detector()
    graph = DetectorGraph(detector, sampler, HEIGHT, WIDTH).eval()
    with torch.no_grad():
        outputs = graph(torch.stack(IMAGES), graph.sampler.draw(SEEDS))
    assert outputs[1].shape == (3, (sampler.num_boxes or 20) * (sampler.steps if sampler.ensemble else 1))
    assert (outputs[1].diff(dim=1) <= 0).all()
    expected = detector.predict(IMAGES, SEEDS, sampler)
    assert min(len(found["scores"]) for found in expected) > 1
    assert_same_detections(detections(outputs), expected)
    assert not outputs[0][outputs[1] == 0].any()


def test_maps_are_pooled_as_the_table_of_their_cells() -> None:
    maps = [torch.randn(2, 6, 64 // s, 96 // s, dtype=torch.float64) for s in (4, 8, 16)]
    boxes = torch.stack([random_boxes(30, 96, 64, seed) for seed in range(2)])
    boxes[0, 0] += torch.tensor([-200.0, -20, 300, 50])  # beyond the image
    for samples in (1, 2):
        table, own = (kind(m, [4, 8, 16]) for kind, m in ((_table, maps), (PyramidOfMaps, maps)))
        torch.testing.assert_close(own.pool(boxes, 5, samples), table.pool(boxes, 5, samples), atol=1e-5, rtol=1e-5)


def _table(maps: list[Tensor], strides: list[int]) -> FeaturePyramid:
    return FeaturePyramid.from_maps([maps], strides)


@pytest.mark.parametrize("classes", [1, 2, 7, 80])
def test_boxes_of_other_classes_and_images_do_not_suppress_each_other(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    boxes = torch.stack([random_boxes(200, 60, 60, seed) for seed in range(3)])
    boxes[:, 100:] = boxes[:, :100] + torch.rand(3, 100, 4, generator=generator)
    scores = torch.rand(3, 200, generator=generator)
    labels = torch.randint(classes, (3, 200), generator=generator)
    kept = _left_by_nms(boxes, scores, labels, classes, 0.5)
    for image in range(3):
        expected = batched_nms(boxes[image], scores[image], labels[image], 0.5)
        assert kept[image].nonzero().flatten().tolist() == sorted(expected.tolist())


def test_a_program_of_torch_takes_any_number_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_detector(stages=1).save(tmp_path / "model.safetensors")
    where = ["--model", str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "model.pt2")]
    options = ["--height", str(HEIGHT), "--width", str(WIDTH), "--steps", "1", "--num_boxes", "12"]
    assert main(["export", *where, *options]) == 0
    assert f"images (batch, 3, {HEIGHT}, {WIDTH}) and noise (1, batch, 12, 4)" in capsys.readouterr().out
    detector = DiffusionDet.load(tmp_path / "model.safetensors")
    sampler = detector.sampler_with(steps=1, num_boxes=12)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 3):
        outputs = program(torch.stack(IMAGES[:count]), sampler.draw(SEEDS[:count]))
        assert_same_detections(detections(outputs), detector.predict(IMAGES[:count], SEEDS[:count], sampler))


@pytest.mark.slow
def test_onnxruntime_finds_the_same(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    detector, sampler = tiny_detector(stages=1), BoxSampler(2, 12)
    export_detector(detector, tmp_path / "model.onnx", HEIGHT, WIDTH, sampler)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES
    for count in (1, 3):
        noise = sampler.draw(SEEDS[:count])
        inputs = {"images": torch.stack(IMAGES[:count]).numpy(), "noise": noise.numpy()}
        found = detections(tuple(map(torch.from_numpy, session.run(["boxes", "scores", "labels"], inputs))))
        for ours, theirs in zip(found, detector.predict(IMAGES[:count], SEEDS[:count], sampler), strict=True):
            assert torch.equal(ours["labels"], theirs["labels"])
            torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-4, rtol=0)
            torch.testing.assert_close(ours["boxes"] / WIDTH, theirs["boxes"] / WIDTH, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "strides"),
    [(unet_backbone, [1, 2, 4]), ("swin_tiny_patch4_window7_224", [4, 8]), ("regnetx_002", [8])],
)
def test_other_backbones_can_be_exported_too(tmp_path: Path, backbone: Any, strides: list[int]) -> None:
    body = backbone if isinstance(backbone, str) else backbone()
    detector = tiny_detector(stages=1, backbone=body, strides=strides)
    graph = export_detector(detector, tmp_path / "model.pt2", HEIGHT, WIDTH, BoxSampler(1, 10))
    program, inputs = torch.export.load(tmp_path / "model.pt2").module(), graph.example(3)
    assert_same_detections(detections(program(*inputs)), detector.predict(list(inputs[0]), range(3), graph.sampler))


@pytest.mark.skipif(find_spec("onnx") is not None, reason="onnx is installed")
def test_without_onnx_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'diffperception[export]'")):
        export_detector(tiny_detector(), tmp_path / "model.onnx", HEIGHT, WIDTH)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fcos = FCOS(CLASSES, "test_resnet", width=64, min_size=None)
    with pytest.raises(ValueError, match="boxes alone can be exported, not FCOS"):
        export_detector(fcos, tmp_path / "model.pt2", HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"must end in \.onnx, or in \.pt2"):
        export_detector(tiny_detector(), tmp_path / "model.pb", HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="as NMS leaves them: leave box_voting out"):
        export_detector(tiny_detector(), tmp_path / "model.pt2", HEIGHT, WIDTH, BoxSampler(box_voting=0.5))
    with pytest.raises(ValueError, match="from noise alone: leave start_time out"):
        export_detector(tiny_detector(), tmp_path / "model.pt2", HEIGHT, WIDTH, BoxSampler(start_time=3))
    tiny_detector().save(tmp_path / "model.safetensors")
    model = ["--model", str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "model.pb")]
    assert main(["export", *model, "--height", "56", "--width", "90"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "must end in .onnx" in line
