"""The generator's file, its labels and its complaints."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diffperception.diffusion import FlowSchedule, Objective
from diffperception.generation import DiffusionModel
from diffperception.models import ClassLabels, Condition, Pixels
from diffperception.models.base import file_kind
from tests.helpers.devices import Device
from tests.helpers.networks import CLASSES, conditional_generator, two_level_unet


def test_a_file_holds_all_that_sampling_needs(tmp_path: Path) -> None:
    model = DiffusionModel(
        CLASSES,
        two_level_unet(out_channels=6),
        schedule="cosine",
        num_timesteps=50,
        prediction="v",
        learned_range=True,
        image_size=(8, 12),
    )
    model.save(tmp_path / "model.safetensors")
    loaded = DiffusionModel.load(tmp_path / "model.safetensors")
    assert (loaded.classes, loaded.image_size, loaded.prediction, loaded.learned_range) == (CLASSES, (8, 12), "v", True)
    t = torch.arange(-1, 50)
    assert torch.equal(loaded.schedule.alpha(t), model.schedule.alpha(t))
    x, times, labels = torch.randn(2, 3, 8, 12), torch.tensor([3, 40]), torch.tensor([0, 1])
    expected = model(x, times, model.condition(labels))
    assert torch.equal(loaded(x, times, loaded.condition(labels)), expected)
    assert not torch.equal(loaded(x, times, loaded.condition(labels.flip(0))), expected)
    assert file_kind(tmp_path / "model.safetensors") == "generator"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert '"class": "diffperception.models.unet.unet:UNet"' in file.metadata()["arguments"]


def test_the_fewest_steps_of_a_path() -> None:
    for schedule, steps in (("linear", 21), ("cosine", 1)):
        model = DiffusionModel(None, two_level_unet(), schedule=schedule, num_timesteps=steps, image_size=8)  # type: ignore[arg-type]
        assert 0 < float(model.schedule.alpha(steps - 1)) < 1


def test_flow_matching_has_its_own_path() -> None:
    model = DiffusionModel(None, two_level_unet(), schedule="flow", prediction="flow", image_size=8)
    assert isinstance(model.schedule, FlowSchedule)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"learned_range": True}, "learned_range needs twice as many"),
        ({"prediction": "flow"}, "flow belongs to the schedule flow"),
        ({"image_size": 0}, "height must be above 0, not 0"),
        ({"image_size": (8, -8)}, "width must be above 0, not -8"),
        ({"num_timesteps": 0}, "21 steps or more, not 0: raise num_timesteps"),
        ({"num_timesteps": 20}, "21 steps or more, not 20: raise num_timesteps"),
        ({"num_timesteps": -5, "schedule": "cosine"}, "1 step or more, not -5: raise num_timesteps"),
        ({"image_size": 9}, "crop to 8 x 8 or pad to 10 x 10"),
        ({"space": Pixels(1)}, "3 channels in, but its space 1"),
        ({"null_class": True}, "null_class belongs to a model with classes"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DiffusionModel(**{"classes": None, "network": two_level_unet(), "image_size": 8} | arguments)


def test_guidance_moves_from_the_unconditional_to_the_conditional_denoiser_and_beyond() -> None:
    model, x, t = conditional_generator(), torch.randn(2, 3, 8, 8), torch.tensor([10, 500])
    labels = torch.tensor([0, 1])
    without, plain = model.denoiser()(x, t).x0, model.denoiser(labels)(x, t).x0
    assert not torch.allclose(without, plain)
    nothing = torch.full((2,), 2)  # the label after those of the classes
    torch.testing.assert_close(without, model.denoiser(nothing)(x, t).x0)
    for weight in (0.0, 1.0, 3.0):
        guided = model.denoiser(labels, weight)(x, t).x0
        torch.testing.assert_close(guided, without + weight * (plain - without), rtol=1e-4, atol=1e-4)


def test_labels_and_guidance_need_a_model_that_has_learned_them() -> None:
    plain = DiffusionModel(None, two_level_unet(), image_size=8)
    with pytest.raises(ValueError, match="trained without classes"):
        plain.denoiser(torch.tensor([0]))
    with pytest.raises(ValueError, match="train it with classes and null_class"):
        plain.denoiser(guidance=2.0)
    labelled = conditional_generator(null_class=False)
    with pytest.raises(ValueError, match="null_class"):
        labelled.denoiser(torch.tensor([0]), guidance=2.0)
    with pytest.raises(ValueError, match="null_class"):
        labelled.denoiser()


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    two_level_unet().save(tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="holds a UNet, not a DiffusionModel"):
        DiffusionModel.load(tmp_path / "unet.safetensors")


# What a denoiser is told


def test_labels_are_read_dropped_and_chosen() -> None:
    labels = ClassLabels(CLASSES, 8, null_class=True)
    assert labels.read([{"label": 1}, {"label": 0, "path": "x"}]).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"no labels.*data\.labelled"):
        labels.read([{"label": 1}, {"label": None}])
    assert labels.drop(torch.tensor([1, 0, 1]), torch.tensor([True, False, False])).tolist() == [2, 0, 1]
    assert labels.absent(2).tolist() == [2, 2]
    assert labels.choose(None, range(3, 7)).tolist() == [1, 0, 1, 0]
    assert labels.choose(["square"], [0, 5]).tolist() == [1, 1]
    with pytest.raises(ValueError, match="there is no class cube: the generator knows disc, square"):
        labels.choose(["cube"], [0])
    assert labels(torch.tensor([2, 0])).vector.shape == (2, 8)  # type: ignore[union-attr]


def test_a_condition_of_one_sample_is_that_of_any_batch() -> None:
    condition = Condition(vector=torch.randn(1, 4), maps=torch.randn(1, 3, 2, 2))
    several = condition.expand(5)
    assert several.vector is not None
    assert several.maps is not None
    assert several.tokens is several.mask is None
    assert several.vector.shape == (5, 4)
    assert several.maps.shape == (5, 3, 2, 2)
    assert torch.equal(several.expand(5).vector, several.vector)  # type: ignore[arg-type]


def test_pixels_are_twice_less_one() -> None:
    images = torch.tensor([[[[0.0, 0.25, 1.0]]]])
    signal = Pixels(1).encode(images)
    assert signal.tolist() == [[[[-1, -0.5, 1]]]]
    assert torch.equal(Pixels(1).decode(signal), images)
    assert Pixels(1).decode(3 * signal).tolist() == [[[[0, 0, 1]]]]


def test_losses_are_the_objectives_with_what_is_said() -> None:
    model, (x0, noise) = conditional_generator(), torch.randn(2, 2, 3, 8, 8)
    t, targets = torch.tensor([3, 700]), [{"label": 1}, {"label": 0}]
    losses = model.losses(model.objective(), x0, t, noise, model.read(targets))
    told = model.condition(torch.tensor([1, 0]))
    expected = Objective(model.schedule)(lambda x, time: model.network(x, time, told), x0, t, noise)
    assert torch.equal(losses["mse"], expected["mse"])
    losses["mse"].sum().backward()
    assert model.conditioner.embedding.weight.grad[:2].any(1).all()  # type: ignore[union-attr]
    plain = DiffusionModel(None, two_level_unet(), image_size=8)
    assert plain.read(targets) is None
    assert plain.losses(plain.objective(), x0, t, noise)["mse"].shape == (2,)


def test_a_training_step_waits_for_the_copies_of_its_batch_alone(device: Device) -> None:
    model, (x0, noise) = conditional_generator(), torch.randn(2, 2, 3, 8, 8)
    t, said = torch.tensor([3, 700]), torch.tensor([1, 0])
    expected = model.losses(model.objective(5.0), x0, t, noise, said)["mse"].detach()
    model, x0, noise, t, said = device.move((model, x0, noise, t, said))
    model.schedule.alpha(t)  # its table is on the device from the first step on
    before = len(device.waits)
    losses = model.losses(model.objective(5.0), x0, t, noise, said)["mse"]
    assert len(device.waits) == before, device.report()
    torch.testing.assert_close(device.host(losses), expected, atol=1e-4, rtol=1e-4)
