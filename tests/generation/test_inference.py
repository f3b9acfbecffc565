"""Batches and folders of samples."""

from pathlib import Path

import pytest
import torch

from diffperception.generation import SamplingOptions, sample
from diffperception.generation.inference import draw_samples, sample_folder
from tests.helpers.networks import CLASSES, conditional_generator

TWO = SamplingOptions(steps=2)


def test_batches_are_the_images_of_their_numbers_with_classes_in_turn() -> None:
    model = conditional_generator()
    batches = list(draw_samples(model, range(3, 8), TWO, seed=5, batch_size=2))
    assert [list(numbers) for numbers, _ in batches] == [[3, 4], [5, 6], [7]]
    expected = sample(model, range(3, 8), TWO, 5, torch.tensor([1, 0, 1, 0, 1]))
    torch.testing.assert_close(torch.cat([images for _, images in batches]), expected, atol=1e-4, rtol=0)
    ((_, only),) = draw_samples(model, [4], TWO, seed=5, said=["square"])
    torch.testing.assert_close(only, sample(model, [4], TWO, 5, torch.tensor([1])), atol=1e-4, rtol=0)


def test_a_file_is_sampled_in_one_call_and_other_files_stay(tmp_path: Path) -> None:
    conditional_generator().save(tmp_path / "model.safetensors")
    output = tmp_path / "out"
    sample_folder(tmp_path / "model.safetensors", output, 3, TWO, device="cpu")
    (output / "images" / "disc" / "000009.png").touch()
    sample_folder(conditional_generator(), output, 1, TWO, ["square"], device="cpu", overwrite=True)
    found = {path.relative_to(output).as_posix() for path in output.rglob("*.png")}
    assert found == {"images/square/000000.png", "images/disc/000009.png", "grid.png"}
    with pytest.raises(ValueError, match="holds results of other settings"):
        sample_folder(conditional_generator(), output, 1, TWO, device="cpu")


def test_half_precision_stays_close(tmp_path: Path) -> None:
    model = conditional_generator()
    with torch.autocast("cpu", torch.bfloat16):
        ((_, rounded),) = draw_samples(model, range(2), TWO)
    ((_, exact),) = draw_samples(model, range(2), TWO)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.02


def test_noise_of_the_device_is_as_reproducible() -> None:
    """On the CPU both are the same."""
    model, options = conditional_generator(), SamplingOptions("ddpm", 3, noise="device")
    one, other = (sample(model, range(2), o, 1, torch.tensor([0, 1])) for o in (options, SamplingOptions("ddpm", 3)))
    assert torch.equal(one, other)
    assert model.classes == CLASSES
