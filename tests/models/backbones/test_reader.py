"""The UNet as a backbone: what it gives, what it sees, and what frozen means."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffperception.detection import FCOS
from diffperception.diffusion import cosine_schedule, linear_schedule
from diffperception.models import ActivationReader, DiffusionModel, UNet, UNetBackbone
from tests.helpers.devices import Device
from tests.helpers.networks import tiny_unet

TILE = 256  # side of the noise that is repeated
BLOCKS = [0, 2, 4]  # of the tiny UNet's 0, 1, ..., 5 with strides 4, 2, 2, 1, 1, 1


def images(*shape: int) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1


def network(backbone: UNetBackbone) -> UNet:
    return backbone.reader.generator.network


def seen_by_the_unet(backbone: UNetBackbone, batch: Tensor) -> Tensor:
    seen = []
    handle = network(backbone).stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    backbone(batch)
    handle.remove()
    return seen[0]


def test_maps_are_normalised_activations_finest_first() -> None:
    unet, batch = tiny_unet(), images(2, 3, 16, 24)
    backbone = UNetBackbone(unet, blocks=BLOCKS, timestep=60)
    assert backbone.strides == [1, 2, 4]
    assert backbone.channels == [32, 32, 64]
    maps = backbone(batch)
    activations = unet.activations(seen_by_the_unet(backbone, batch), torch.full((2,), 60), [4, 2, 0])
    for map_, activation, stride, channels in zip(maps, activations, backbone.strides, backbone.channels, strict=True):
        assert map_.shape == (2, channels, 16 // stride, 24 // stride)
        torch.testing.assert_close(map_, F.group_norm(activation, 32), atol=1e-4, rtol=1e-4)


def test_the_unet_sees_images_at_the_noise_level_it_is_told() -> None:
    batch = images(1, 3, 96, 128)
    for timestep in (0, 60, 999):
        seen = seen_by_the_unet(UNetBackbone(tiny_unet(), blocks=[0], timestep=timestep), batch)
        alpha, sigma = (f(timestep).float() for f in (linear_schedule().alpha, linear_schedule().sigma))
        noise = (seen - alpha * batch) / sigma
        assert abs(noise.mean()) < 0.02
        assert abs(noise.std() - 1) < 0.02


def test_noise_depends_on_the_pixels_place_alone() -> None:
    backbone = UNetBackbone(tiny_unet(), blocks=[0], timestep=500)
    other = UNetBackbone(tiny_unet(), blocks=[0], timestep=500)
    small, wide = torch.zeros(1, 3, 16, 24), torch.zeros(3, 3, 32, TILE + 8)
    noise = seen_by_the_unet(other, wide)
    torch.testing.assert_close(seen_by_the_unet(backbone, small)[0], noise[2, :, :16, :24])
    assert torch.equal(noise[..., TILE:], noise[..., :8])


def test_blocks_after_the_last_one_named_are_not_computed() -> None:
    backbone = UNetBackbone(tiny_unet(), blocks=[0, 1], frozen=False)
    runs = []
    for index, block in enumerate(network(backbone).decoder):
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
    backbone(images(1, 3, 16, 16))
    assert runs == [0, 1]


def test_a_frozen_unet_stays_as_it_is() -> None:
    backbone = UNetBackbone(tiny_unet(dropout=0.5), blocks=BLOCKS).train()
    batch = images(1, 3, 16, 16)
    maps = backbone(batch)
    assert not any(module.training for module in network(backbone).modules())
    assert all(torch.equal(a, b) for a, b in zip(maps, backbone(batch), strict=True))
    torch.stack([m.square().sum() for m in maps]).sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network(backbone).parameters())
    assert all(parameter.grad is not None for parameter in backbone.norms.parameters())


def test_fine_tuning_reaches_every_weight_that_is_used_and_asks_for_no_other() -> None:
    backbone = UNetBackbone(tiny_unet(), blocks=BLOCKS, frozen=False).train()
    assert network(backbone).training
    torch.stack([(m * images(*m.shape)).sum() for m in backbone(images(1, 3, 16, 16))]).sum().backward()
    for name, parameter in network(backbone).named_parameters():
        used = not name.startswith(("decoder.5.", "out_"))
        assert parameter.requires_grad == used, name
        assert (parameter.grad is not None) == used, name


@pytest.mark.parametrize(
    ("schedule", "prediction", "alpha", "sigma"),
    [
        ("cosine", "eps", cosine_schedule(4000).alpha(2300), cosine_schedule(4000).sigma(2300)),
        ("flow", "flow", 0.7, 0.3),
    ],
)
def test_a_diffusion_model_brings_its_own_noise(
    tmp_path: Path, schedule: str, prediction: str, alpha: float, sigma: float
) -> None:
    model = DiffusionModel(
        None, tiny_unet(), schedule=schedule, num_timesteps=4000, prediction=prediction, image_size=16
    )  # type: ignore[arg-type]
    model.save(tmp_path / "model.safetensors")
    backbone = UNetBackbone(tmp_path / "model.safetensors", blocks=[0], timestep=2300 if schedule == "cosine" else 0.3)
    (level,) = backbone.reader.levels
    assert level == pytest.approx((float(alpha), float(sigma), 2300 if schedule == "cosine" else 300))


def test_a_label_is_told() -> None:
    batch = images(1, 3, 16, 16)
    model = labelled()
    one, other = (UNetBackbone(model, blocks=[0], label=label)(batch)[0] for label in (0, 2))
    assert not torch.allclose(one, other)


def labelled(null_class: bool = False) -> DiffusionModel:
    return DiffusionModel(["a", "b", "c"], tiny_unet(), image_size=16, null_class=null_class)


def test_bfloat16() -> None:
    backbone, batch = UNetBackbone(tiny_unet(), blocks=BLOCKS), images(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(batch)
    for a, b in zip(rounded, backbone(batch), strict=True):
        assert (a.float() - b).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("unet", "options", "complaint"),
    [
        ({}, {"blocks": [0, 9]}, r"no decoder blocks \[9\]; it has stride 4: 0; stride 2: 1, 2; stride 1: 3, 4, 5$"),
        ({}, {"blocks": []}, r"no decoder blocks \[\]; it has stride 4: 0"),
        ({}, {"blocks": [1, 2]}, r"blocks \[2, 1\] have strides \[2, 2\], but .* stride 2: 1, 2"),
        ({}, {"blocks": [5, 0]}, r"blocks \[5, 0\] have strides \[1, 4\], but"),
        ({}, {"blocks": [0], "timestep": 1000}, r"timesteps \[1000\] lie outside of this path: .* 0 to 999"),
        ({}, {"blocks": [0], "label": 1}, "trained without classes: leave labels out"),
        ({"in_channels": 1}, {"blocks": [0]}, "features need colour images, but this UNet takes 1 channels"),
    ],
)
def test_a_mistake_is_one_sentence(unet: dict, options: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        UNetBackbone(tiny_unet(**unet), **options)


def test_a_label_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="not learned images without a label: give one"):
        UNetBackbone(labelled(), blocks=[0])
    with pytest.raises(ValueError, match="label from 0 to 2, not 3"):
        UNetBackbone(labelled(), blocks=[0], label=3)
    UNetBackbone(labelled(null_class=True), blocks=[0])


def test_files_of_other_models_are_refused(tmp_path: Path) -> None:
    FCOS(["one"], "test_resnet", width=64).save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds a FCOS: give the file of a generator or a UNet"):
        UNetBackbone(tmp_path / "model.safetensors", blocks=[0])
    with pytest.raises(FileNotFoundError, match=r"no model file .*other\.safetensors"):
        UNetBackbone(tmp_path / "other.safetensors", blocks=[0])


# The reader under it


@torch.no_grad()
def test_the_reader_gives_maps_time_by_time_in_strides_of_the_image() -> None:
    reader = ActivationReader(tiny_unet(), [4, 0], [50, 900]).eval()
    pictures = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    maps = reader(pictures)
    assert [info.name for info in reader.info] == ["t50 block 4", "t50 block 0", "t900 block 4", "t900 block 0"]
    for read, info in zip(maps, reader.info, strict=True):
        assert read.shape == (2, info.channels, 16 // info.stride, 24 // info.stride)
    for timestep, expected in ((50, maps[:2]), (900, maps[2:])):
        single = ActivationReader(reader.generator, [4, 0], [timestep]).eval()
        assert all(map(torch.equal, single(pictures), expected))
    for alone, together in zip(reader(pictures[:1]), maps, strict=True):
        torch.testing.assert_close(alone, together[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("blocks", "timesteps", "complaint"),
    [
        ([0, 0], [50], r"each timestep once, to six digits, not \[0, 0\] and"),
        ([0], [50, 50], r"each timestep once, to six digits, not \[0\] and \[50, 50\]"),
        ([0], [], "name at least one timestep"),
        ([0], [0.5], "its times are whole"),
    ],
)
def test_a_reader_of_nothing_or_of_the_same_twice_is_refused(
    blocks: list[int], timesteps: list[float], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        ActivationReader(tiny_unet(), blocks, timesteps)


def test_a_saved_reader_keeps_its_noise(tmp_path: Path) -> None:
    reader = ActivationReader(labelled(), [0], [50], label=1, seed=3).eval()
    reader.save(tmp_path / "reader.safetensors")
    loaded = ActivationReader.load(tmp_path / "reader.safetensors")
    pictures = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(pictures)[0], reader(pictures)[0])


@torch.no_grad()
def test_reading_waits_for_no_device(device: Device) -> None:
    reader = ActivationReader(labelled(), [4, 0], [50, 900], label=1).eval()
    pictures = torch.rand(2, 3, 16, 24)
    expected = reader(pictures)
    reader, pictures = device.move((reader, pictures))
    maps = reader(pictures)
    assert len(device.waits) <= 1, device.report()  # the label's number
    for read, wanted in zip(device.host(maps), expected, strict=True):
        torch.testing.assert_close(read, wanted, atol=1e-4, rtol=1e-4)


def test_a_detectors_backbone_on_every_device(device: Device) -> None:
    backbone, batch = UNetBackbone(tiny_unet(), blocks=BLOCKS), images(2, 3, 16, 24)
    expected = [m.detach() for m in backbone(batch)]
    backbone, batch = device.move((backbone, batch))
    maps = backbone(batch)
    assert not device.waits, device.report()
    for read, wanted in zip(device.host(maps), expected, strict=True):
        torch.testing.assert_close(read, wanted, atol=1e-4, rtol=1e-4)
