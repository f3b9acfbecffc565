"""Sampling: an oracle denoiser is followed exactly, and an image depends on its own number alone."""

import pytest
import torch
from torch import Tensor

from diffperception.diffusion import Denoiser, Estimate
from diffperception.generation import DiffusionModel, SamplingOptions, sample
from diffperception.generation.sampling import SAMPLERS, time_grid
from tests.generation.test_model import conditional, tiny_unet


def oracle(x0: Tensor) -> Denoiser:
    return lambda x, t: Estimate(x0.expand_as(x))


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return DiffusionModel(None, tiny_unet(), image_size=8)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_an_oracle_is_reached_exactly(model: DiffusionModel, sampler: str, steps: int) -> None:
    x0 = torch.linspace(-0.9, 0.9, 3 * 64).view(1, 3, 8, 8)
    images = sample(model, range(2), SamplingOptions(sampler, steps), denoiser=oracle(x0))  # type: ignore[arg-type]
    torch.testing.assert_close(images, (x0.expand(2, -1, -1, -1) + 1) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [SamplingOptions(steps=3), SamplingOptions("ddpm", 3), SamplingOptions("ddim", 3, 0.5)]
)
def test_an_image_is_a_function_of_seed_and_number(model: DiffusionModel, options: SamplingOptions) -> None:
    together = sample(model, range(4), options, seed=7)
    apart = torch.cat([sample(model, [3, 1], options, seed=7), sample(model, [0, 2], options, seed=7)])
    torch.testing.assert_close(together[[3, 1, 0, 2]], apart, atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    assert not torch.allclose(together, sample(model, range(4), options, seed=8), atol=1e-2)
    assert together.min() >= 0
    assert together.max() <= 1


def test_labels_change_the_image() -> None:
    labelled, options = conditional(), SamplingOptions(steps=2)
    one, other = (sample(labelled, [0], options, labels=torch.tensor([k])) for k in (0, 1))
    assert not torch.allclose(one, other, atol=1e-3)


def test_flow_matching_is_sampled_on_the_same_code() -> None:
    straight = DiffusionModel(None, tiny_unet(), "straight", prediction="flow", image_size=8)
    for sampler in ("ddim", "heun", "dpm_solver"):
        assert sample(straight, [0], SamplingOptions(sampler, 3)).isfinite().all()
    with pytest.raises(ValueError, match="ddim with eta 1"):
        sample(straight, [0], SamplingOptions("ddpm", 3))


def test_any_size_is_drawn(model: DiffusionModel) -> None:
    assert sample(model, [0], SamplingOptions(steps=1), image_size=(12, 6)).shape == (1, 3, 12, 6)
    with pytest.raises(ValueError, match="halves images"):
        sample(model, [0], SamplingOptions(steps=1), image_size=(11, 6))


def test_grids_begin_at_the_noisiest_time_and_end_clean(model: DiffusionModel) -> None:
    for sampler in SAMPLERS:
        grid = time_grid(model.schedule, sampler, 10)
        assert (grid[0], grid[-1]) == (999, -1)
        assert len(grid) == 11
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            time_grid(model.schedule, "ddim", steps)
