"""The generator's file, its labels and its complaints."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diffperception.diffusion import FlowSchedule
from diffperception.generation import DiffusionModel
from diffperception.models import UNet

CLASSES = ["disc", "square"]


def tiny_unet(**changes: int | None) -> UNet:
    torch.manual_seed(0)
    unet = UNet(channels=32, multipliers=(1, 2), depth=1, attention=(2,), head_channels=32, **changes)  # type: ignore[arg-type]
    for parameter in unet.parameters():  # layers that begin at zero would hide what comes before them
        parameter.data += 0.05 * torch.randn_like(parameter)
    return unet.eval()


def conditional(absent_label: bool = True) -> DiffusionModel:
    return DiffusionModel(CLASSES, tiny_unet(num_classes=2 + absent_label), image_size=8, absent_label=absent_label)


def test_a_file_holds_all_that_sampling_needs(tmp_path: Path) -> None:
    model = DiffusionModel(
        CLASSES, tiny_unet(num_classes=2, out_channels=6), "cosine", 50, "v", learned_range=True, image_size=(8, 12)
    )
    model.save(tmp_path / "model.safetensors")
    loaded = DiffusionModel.load(tmp_path / "model.safetensors")
    assert (loaded.classes, loaded.image_size, loaded.prediction, loaded.learned_range) == (CLASSES, (8, 12), "v", True)
    t = torch.arange(-1, 50)
    assert torch.equal(loaded.schedule.alpha(t), model.schedule.alpha(t))
    x, times, labels = torch.randn(2, 3, 8, 12), torch.tensor([3, 40]), torch.tensor([0, 1])
    assert torch.equal(loaded.unet(x, times, labels), model.unet(x, times, labels))
    assert isinstance(UNet.load(tmp_path / "model.safetensors"), UNet)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert '"class": "diffperception.models.unet.unet:UNet"' in file.metadata()["arguments"]


def test_the_fewest_steps_of_a_path() -> None:
    for schedule, steps in (("linear", 21), ("cosine", 1)):
        model = DiffusionModel(None, tiny_unet(), schedule, steps, image_size=8)  # type: ignore[arg-type]
        assert 0 < float(model.schedule.alpha(steps - 1)) < 1


def test_flow_matching_has_its_own_path() -> None:
    model = DiffusionModel(None, tiny_unet(), "flow", prediction="flow", image_size=8)
    assert isinstance(model.schedule, FlowSchedule)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"learned_range": True}, "learned_range needs twice as many"),
        ({"prediction": "flow"}, "flow belongs to the schedule straight"),
        ({"image_size": 0}, "height must be above 0, not 0"),
        ({"image_size": (8, -8)}, "width must be above 0, not -8"),
        ({"num_timesteps": 0}, "21 steps or more, not 0: raise num_timesteps"),
        ({"num_timesteps": 20}, "21 steps or more, not 20: raise num_timesteps"),
        ({"num_timesteps": -5, "schedule": "cosine"}, "1 step or more, not -5: raise num_timesteps"),
        ({"image_size": 9}, "crop to 8 x 8 or pad to 10 x 10"),
        ({"classes": CLASSES}, "set unet.num_classes to 2"),
        ({"classes": CLASSES, "absent_label": True}, "set unet.num_classes to 3"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DiffusionModel(**{"classes": None, "unet": tiny_unet(), "image_size": 8} | arguments)


def test_guidance_moves_from_the_unconditional_to_the_conditional_denoiser_and_beyond() -> None:
    model, x, t = conditional(), torch.randn(2, 3, 8, 8), torch.tensor([10, 500])
    labels = torch.tensor([0, 1])
    without, plain = model.denoiser()(x, t).x0, model.denoiser(labels)(x, t).x0
    assert not torch.allclose(without, plain)
    nothing = torch.full((2,), 2)  # the label after those of the classes
    torch.testing.assert_close(without, model._denoiser(nothing)(x, t).x0)
    for weight in (0.0, 1.0, 3.0):
        guided = model.denoiser(labels, weight)(x, t).x0
        torch.testing.assert_close(guided, without + weight * (plain - without), rtol=1e-4, atol=1e-4)


def test_labels_and_guidance_need_a_model_that_has_learned_them() -> None:
    plain = DiffusionModel(None, tiny_unet(), image_size=8)
    with pytest.raises(ValueError, match="trained without classes"):
        plain.denoiser(torch.tensor([0]))
    with pytest.raises(ValueError, match="trained without classes"):
        plain.denoiser(guidance=2.0)
    labelled = conditional(absent_label=False)
    with pytest.raises(ValueError, match="absent_label"):
        labelled.denoiser(torch.tensor([0]), guidance=2.0)
    with pytest.raises(ValueError, match="absent_label"):
        labelled.denoiser()


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    tiny_unet().save(tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="holds a UNet, not a generator"):
        DiffusionModel.load(tmp_path / "unet.safetensors")
