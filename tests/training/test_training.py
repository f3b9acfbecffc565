"""The parts of training: rates, seeds, parameter groups, averages, logs, data, scores."""

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from diffperception.data import CocoDetection
from diffperception.detection import DiffusionDet, DynamicHead
from diffperception.detection.inference import evaluate_detector, spread
from diffperception.models.base import trusting
from diffperception.models.warm_start import warm_start
from diffperception.training.callbacks import Averaging
from diffperception.training.data import TimedLoader
from diffperception.training.loggers import CsvLog
from diffperception.training.options import OptimizerOptions
from diffperception.training.recipes.detection import DataOptions, DetectionModule
from tests.helpers.devices import Device
from tests.helpers.networks import two_level_unet
from tests.training.tiny_data import write_tiny_data
from tests.training.tiny_detector import TinyDetector


def test_the_rate_rises_linearly_and_then_follows_its_schedule() -> None:
    options = OptimizerOptions(warmup_steps=100, schedule="cosine")
    assert options.lr_factor(0, 1100) == pytest.approx(0.01)
    assert options.lr_factor(50, 1100) == pytest.approx((0.01 + 1) / 2)
    assert options.lr_factor(100, 1100) == pytest.approx(1)
    assert options.lr_factor(350, 1100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert options.lr_factor(600, 1100) == pytest.approx(0.5)
    assert options.lr_factor(1100, 1100) == pytest.approx(0)
    stepped = OptimizerOptions(warmup_steps=0, schedule="steps", milestones=(0.5, 0.75))
    assert [stepped.lr_factor(step, 8) for step in (0, 3, 4, 5, 6, 7)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert OptimizerOptions(warmup_steps=0, schedule="constant").lr_factor(7, 8) == 1


class Groups(DetectionModule):
    lr = 0.5  # what a trainer would say


def test_every_parameter_is_in_one_group_with_its_rate_and_decay() -> None:
    head = partial(DynamicHead, width=16, stages=1, ffn_width=16, num_heads=2)
    detector = DiffusionDet(["a"], "resnet10t", head, strides=(8, 16))
    detector.head.requires_grad_(False)
    module = Groups(detector, OptimizerOptions(backbone_lr_factor=0.1, weight_decay=0.2), seed=0)
    groups = module.parameter_groups()
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in detector.parameters() if p.requires_grad}
    assert len(grouped) == len({id(p) for p in grouped})
    body = {id(p) for p in detector.backbone.backbone.body.parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(0.05 if id(parameter) in body else 0.5)
            assert group["weight_decay"] == (0.2 if parameter.ndim > 1 else 0.0)


class OwnHead(DynamicHead):
    """A user's own."""


def test_weights_to_start_from_may_name_parts_of_a_trusted_package(tmp_path: Path) -> None:
    head = partial(OwnHead, width=16, stages=1, ffn_width=16, num_heads=2)
    source, detector = (DiffusionDet(["a", "b"], "resnet10t", head, strides=(8, 16)) for _ in range(2))
    source.save(tmp_path / "source.safetensors")
    with pytest.raises(ValueError, match=r"names the class tests\..*--trust tests"):
        warm_start(detector, tmp_path / "source.safetensors")
    with trusting("tests"):
        warm_start(detector, tmp_path / "source.safetensors")
    weights = detector.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in source.state_dict().items())


class Weights(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.BatchNorm1d(2)  # has weights, statistics and a counter


def test_the_average_is_the_recursion_it_claims_to_be_on_every_device(device: Device) -> None:
    averaging, module = Averaging(decay=0.9), Weights()
    device.move(module)
    averaging.setup(Trainer(logger=False, enable_checkpointing=False), module, "fit")
    expected = torch.zeros(2)
    for n in range(50):
        value = torch.tensor([float(n), -1.0])
        with torch.no_grad():
            module.model.weight.copy_(device.move(value))
            module.model.num_batches_tracked += 1
        copies = len(device.waits)
        averaging.update(module)
        assert len(device.waits) == copies
        decay = min(0.9, (1 + n) / (10 + n)) if n else 0.0  # the first replaces what was there at random
        expected = decay * expected + (1 - decay) * value
        averaged = device.host(averaging.model.weight)
        assert torch.allclose(averaged, expected)  # in the first updates too, whose decay is smaller
    assert int(device.host(averaging.model.num_batches_tracked)) == 50


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = CsvLog(path)
    log.log_metrics({"train/loss": 1.25}, 2)
    log.log_metrics({"train/loss": 1}, 4)
    log.log_metrics({"val/AP": 0.5}, 4)
    log.log_metrics({"train/loss": 0.75}, 6)
    resumed = CsvLog(path, after=4)
    resumed.log_metrics({"train/lr": 0.1}, 5)
    assert path.read_text().split() == ["step,train/loss,val/AP,train/lr", "2,1.25,,", "4,1,0.5,", "5,,,0.1"]


def test_the_time_spent_waiting_for_data_is_counted() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    loader = TimedLoader(slow())
    assert list(loader) == [0, 1, 2]
    assert 0.15 <= loader.waited < 1


def test_data_sets_with_other_categories_are_refused(tmp_path: Path) -> None:
    annotations, images = write_tiny_data(tmp_path / "a")
    other = tmp_path / "other.json"
    other.write_text(annotations.read_text().replace("disc", "plate"))
    with pytest.raises(ValueError, match=r"has other classes than .*: it has no disc, and only it has plate"):
        DataOptions(annotations, images, other, images).open()


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_scores_do_not_depend_on_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    dataset = CocoDetection(*write_tiny_data(tmp_path / "data"))
    torch.manual_seed(0)
    detector = TinyDetector(dataset.classes)
    single = evaluate_detector(detector, dataset, batch_size=1, seed=5)
    batched = evaluate_detector(detector, dataset, batch_size=batch_size, seed=5)
    assert len(batched.detections) == len(dataset)
    assert [row["score"] for row in batched.detections] == pytest.approx([row["score"] for row in single.detections])
    assert batched.metrics == pytest.approx(single.metrics, nan_ok=True)
    other = evaluate_detector(detector, dataset, batch_size=batch_size, seed=6)
    assert [row["score"] for row in other.detections] != [row["score"] for row in single.detections]


def test_some_images_spread_over_the_set_are_scored(tmp_path: Path) -> None:
    assert spread(10, None) == list(range(10))
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 8) == [0, 1, 2]
    dataset = CocoDetection(*write_tiny_data(tmp_path / "data"))
    result = evaluate_detector(TinyDetector(dataset.classes), dataset, num_images=2)
    assert {row["image_id"] for row in result.detections} == {10, 13}
    assert not result.notes  # the other images do not count as missed


def test_a_detector_of_other_classes_is_refused(tmp_path: Path) -> None:
    dataset = CocoDetection(*write_tiny_data(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"3 classes \(a, b, c\).*2 \(disc, square\)"):
        evaluate_detector(TinyDetector(["a", "b", "c"]), dataset)


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "tf_efficientnet_lite0"])
def test_layers_nearer_the_images_learn_more_slowly_where_asked_for(name: str) -> None:
    head = partial(DynamicHead, width=16, stages=1, ffn_width=16, num_heads=2)
    detector = DiffusionDet(["a"], name, head, strides=(8, 16))
    module = Groups(detector, OptimizerOptions(layer_decay=0.5, backbone_lr_factor=0.1), seed=0)
    numbers = module.layers()
    assert numbers.keys() == {name for name, _ in detector.named_parameters() if name.startswith("backbone.backbone.")}
    assert set(numbers.values()) == set(range(len(set(numbers.values())))) >= set(range(4))
    first = next(iter(detector.backbone.backbone.body.parameters()))
    rates = {id(p): group["lr"] for group in module.parameter_groups() for p in group["params"]}
    assert rates[id(first)] == pytest.approx(0.5 * 0.1 * 0.5 ** len(set(numbers.values())))
    for path, parameter in detector.named_parameters():
        number = numbers.get(path)
        scale = 1.0 if number is None else 0.1 * 0.5 ** (max(numbers.values()) + 1 - number)
        assert rates[id(parameter)] == pytest.approx(0.5 * scale)


def test_a_unets_blocks_are_layers_from_its_stem_to_its_output() -> None:
    unet = two_level_unet()
    numbers = unet.layers()
    assert numbers.keys() == {name for name, _ in unet.named_parameters()}
    order = ["time_embed.0.bias", "encoder.0.0.conv1.bias", "middle.0.conv1.bias", "decoder.0.0.conv1.bias"]
    assert sorted(order, key=lambda name: numbers[name]) == order
    assert numbers["stem.weight"] == numbers["time_embed.0.bias"] == 0
    assert (
        numbers["out_conv.weight"] == max(numbers.values()) == numbers[f"decoder.{len(unet.decoder) - 1}.0.conv1.bias"]
    )


@pytest.mark.parametrize("stages", [1, 2, "all"])
def test_frozen_stages_are_not_trained_and_stay_in_evaluation(stages: int | str) -> None:
    detector = DiffusionDet(["a"], "resnet10t", partial(DynamicHead, width=16, stages=1, num_heads=2), strides=(8, 16))
    module = Groups(detector, OptimizerOptions(frozen_stages=stages), seed=0)
    module.train()
    module.on_train_batch_start(None, 0)
    body = detector.backbone.backbone.body
    for name, parameter in body.named_parameters():
        first = {1: ("conv1", "bn1"), 2: ("conv1", "bn1", "layer1"), "all": ("",)}[stages]
        assert parameter.requires_grad != name.startswith(first), name
    for name, norm in body.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.training == norm.weight.requires_grad, name
    assert all(parameter.requires_grad for parameter in detector.head.parameters())
    grouped = {id(p) for group in module.parameter_groups() for p in group["params"]}
    assert grouped == {id(p) for p in detector.parameters() if p.requires_grad}


@pytest.mark.parametrize("stages", [7, 100])
def test_more_stages_than_there_are_cannot_be_frozen(stages: int) -> None:
    detector = DiffusionDet(["a"], "resnet10t", partial(DynamicHead, width=16, stages=1, num_heads=2), strides=(8, 16))
    with pytest.raises(ValueError, match=rf"frozen_stages is {stages}, but this DiffusionDet has \d stages"):
        DetectionModule(detector, OptimizerOptions(frozen_stages=stages), seed=0)
    with pytest.raises(ValueError, match="has no stages to freeze"):
        DetectionModule(TinyDetector(["a"]), OptimizerOptions(frozen_stages="all"), seed=0)


def test_a_batch_too_small_for_batch_norm_says_what_to_change() -> None:
    torch.manual_seed(0)
    head = partial(DynamicHead, width=16, stages=1, ffn_width=16, num_heads=2)
    detector = DiffusionDet(["a"], "resnet10t", head, strides=(8, 16, 32), fpn_norm=True, num_boxes=5).train()
    module = DetectionModule(detector, OptimizerOptions(), seed=0)
    target = {"boxes": torch.tensor([[5.0, 5, 19, 19]]), "labels": torch.tensor([0]), "image_id": 3}
    images = [torch.rand(3, 32, 32)]
    with pytest.raises(ValueError, match=r"32x32 pixels: raise data.batch_size, .*short_sides.*freeze_norm"):
        module.loss_terms((images, [target]), torch.Generator())
    assert module.loss_terms((images * 2, [target] * 2), torch.Generator())
