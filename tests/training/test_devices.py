"""Training steps on every device: nothing is mixed, and a GPU is hardly waited for."""

import tempfile
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from diffperception.generation import DiffusionModel
from diffperception.models import NoisyClassifier, UNet
from diffperception.training.module import NonFiniteLossError, TrainingModule
from diffperception.training.options import OptimizerOptions
from diffperception.training.recipes.detection import DetectionModule, DistillationModule
from diffperception.training.recipes.generation import GenerationModule, ObjectiveOptions
from diffperception.training.recipes.noisy_classifier import NoisyClassifierModule
from tests.detection.scenes import random_image, random_target, tiny_detector
from tests.helpers.devices import Device

SIZES = {"channels": 32, "channel_mult": (1,), "num_res_blocks": 1, "attention": (), "num_head_channels": 32}


def detection() -> tuple[TrainingModule, Any]:
    images = [random_image(64, 50 + seed, seed) for seed in range(4)]
    targets = [random_target(2, 64, 50, seed) | {"image_id": 70 + seed} for seed in range(4)]
    return DetectionModule(tiny_detector().train(), OptimizerOptions(), 0), (images, targets)


def distillation() -> tuple[TrainingModule, Any]:
    module, batch = detection()
    with tempfile.TemporaryDirectory() as folder:
        tiny_detector(seed=1).save(f"{folder}/teacher.safetensors")
        return DistillationModule(module.model, module.options, 0, f"{folder}/teacher.safetensors", steps=2), batch


def labelled_batch() -> tuple[list[Tensor], list[dict[str, Any]]]:
    images = [random_image(8, 8, seed) for seed in range(4)]
    return images, [{"label": k % 2, "path": f"{k}.png"} for k in range(4)]


def generation() -> tuple[TrainingModule, Any]:
    torch.manual_seed(0)
    model = DiffusionModel(["a", "b"], UNet(**SIZES), image_size=8, null_class=True)
    return GenerationModule(model, OptimizerOptions(), 0, ObjectiveOptions(label_dropout=0.5)), labelled_batch()


def classification() -> tuple[TrainingModule, Any]:
    torch.manual_seed(0)
    return NoisyClassifierModule(
        NoisyClassifier(["a", "b"], **SIZES, image_size=8), OptimizerOptions(), 0
    ), labelled_batch()


@pytest.mark.parametrize(("make", "most"), [(detection, 4), (distillation, 13), (generation, 4), (classification, 4)])
def test_a_step_gives_the_same_loss_everywhere_and_hardly_waits(device: Device, make: Any, most: int) -> None:
    module, batch = make()
    expected = module.training_step(batch, 3)
    module, batch = make()
    device.move(module)
    batch = module.transfer_batch_to_device(batch, device.device, 0)
    module.on_fit_start()
    before = len(device.waits)
    loss = module.training_step(batch, 3)
    assert len(device.waits) - before <= most, device.report()
    torch.testing.assert_close(device.host(loss), expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_is_found_later_on_a_gpu_and_named(device: Device) -> None:
    module, batch = classification()
    batch[0][2][:] = float("nan")
    if device.device.type == "cpu":
        with pytest.raises(NonFiniteLossError, match=r"2\.png"):
            module.training_step(batch, 0)
        return
    device.move(module)
    module.training_step(module.transfer_batch_to_device(batch, device.device, 0), 0)
    for _ in range(2):  # later ones do not hide it
        module.training_step(module.transfer_batch_to_device(classification()[1], device.device, 0), 1)
    with pytest.raises(NonFiniteLossError, match=r"cross_entropy nan.*2\.png"):
        module.require_finite()


@pytest.mark.parametrize("make", [detection, generation, classification])
def test_networks_are_compiled_in_place_and_their_averages_are_not(make: Any) -> None:
    module, _ = make()
    names = list(module.state_dict())
    module.compile_networks()
    compiled = [name for name, part in module.model.named_modules() if part._compiled_call_impl is not None]
    assert compiled == {detection: ["backbone", "head"], generation: ["network"], classification: [""]}[make]
    assert list(module.state_dict()) == names
    assert all(part._compiled_call_impl is None for part in deepcopy(module).modules())


def test_noise_is_drawn_on_the_device_on_demand_and_repeats_itself(device: Device) -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model = DiffusionModel(None, UNet(**SIZES), image_size=8)
        module = GenerationModule(model, OptimizerOptions(), 0, ObjectiveOptions(noise="device"))
        device.move(module)
        batch = module.transfer_batch_to_device(labelled_batch(), device.device, 0)
        losses.append(device.host(module.training_step(batch, 3)))
    assert losses[0] == losses[1]
