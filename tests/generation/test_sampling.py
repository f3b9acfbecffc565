"""Sampling: an oracle denoiser is followed exactly, and an image depends on its own number alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffperception.diffusion import (
    Denoiser,
    DenoiserOutput,
    DiscreteSchedule,
    SampleNoise,
    SubVariancePreserving,
    clip,
    cosine_schedule,
    linear_schedule,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    sample_predictor_corrector,
    sample_seed,
)
from diffperception.generation import DiffusionModel, SamplingOptions, sample
from diffperception.generation.sampling import SAMPLERS, Sampler, sampling_grid
from tests.diffusion.gaussian_mixture import Mixture
from tests.helpers.devices import Device
from tests.helpers.networks import captioned_generator, conditional_generator, two_level_unet


def oracle(x0: Tensor) -> Denoiser:
    return lambda x, t: DenoiserOutput(x0.expand_as(x))


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return DiffusionModel(None, two_level_unet(), image_size=8)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_an_oracle_is_reached_exactly(model: DiffusionModel, sampler: str, steps: int) -> None:
    x0 = torch.linspace(-0.9, 0.9, 3 * 64).view(1, 3, 8, 8)
    images = sample(model, range(2), SamplingOptions(sampler, steps), denoiser=oracle(x0))  # type: ignore[arg-type]
    torch.testing.assert_close(images, (x0.expand(2, -1, -1, -1) + 1) / 2, atol=1e-5, rtol=0)


LOOPS: dict[str, Callable[..., torch.Tensor]] = {
    "dpm_solver": sample_dpm_solver,
    "heun": sample_heun,
    "ddim": sample_ddim,
    "ddpm": sample_ddpm,
    "predictor_corrector": sample_predictor_corrector,
}


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize(
    ("sampler", "eta"),
    [("dpm_solver", 0), ("heun", 0), ("ddim", 0), ("ddim", 0.7), ("ddpm", 0), ("predictor_corrector", 0)],
)
def test_the_sampler_named_is_the_one_taken(model: DiffusionModel, sampler: str, eta: float, clipped: bool) -> None:
    options = SamplingOptions(sampler, 4, eta, clip=clipped)  # type: ignore[arg-type]
    noise = SampleNoise([sample_seed(5, 0), sample_seed(5, 1)])
    start = noise(torch.empty(2, 3, 8, 8))
    denoiser = clip(model.denoiser()) if clipped else model.denoiser()
    extra = {"ddim": (eta, noise), "ddpm": (noise,), "predictor_corrector": (0.16, noise)}.get(sampler, ())
    grid = sampling_grid(model.schedule, options.sampler, 4)
    expected = LOOPS[sampler](denoiser, model.schedule, start, grid, *extra)
    assert torch.equal(sample(model, [0, 1], options, seed=5), (expected.clamp(-1, 1) + 1) / 2)


@pytest.mark.parametrize(
    ("schedule", "first_order_steps", "share"),
    [(linear_schedule(), 100, 1.0), (linear_schedule(), 20, 0.2), (cosine_schedule(), 20, 0.5)],
    ids=["linear-100", "linear-20", "cosine-20"],
)
def test_second_order_with_twenty_steps_beats_first_order(
    schedule: DiscreteSchedule, first_order_steps: int, share: float
) -> None:
    """On the grids that `sample` takes; the error against the same equation solved in 250 steps."""
    mixture = Mixture()
    denoiser = partial(mixture.denoise, schedule)
    start = mixture.start(schedule, torch.tensor(999), 500)
    exact = sample_heun(denoiser, schedule, start, sampling_grid(schedule, "heun", 250))

    def error(sampler: Sampler, steps: int) -> float:
        samples = LOOPS[sampler](denoiser, schedule, start, sampling_grid(schedule, sampler, steps))
        return float((samples - exact).abs().mean())

    first_order = error("ddim", first_order_steps)
    assert error("dpm_solver", 20) < share * first_order
    assert error("heun", 20) < share * first_order


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
    labelled, options = conditional_generator(), SamplingOptions(steps=2)
    one, other = (sample(labelled, [0], options, said=torch.tensor([k])) for k in (0, 1))
    assert not torch.allclose(one, other, atol=1e-3)


def test_flow_matching_is_sampled_on_the_same_code() -> None:
    straight = DiffusionModel(None, two_level_unet(), schedule="flow", prediction="flow", image_size=8)
    told: list[float] = []
    straight.network.register_forward_pre_hook(lambda unet, inputs: told.append(float(inputs[1][0])))
    for sampler in ("ddim", "heun", "dpm_solver"):
        told.clear()
        assert sample(straight, [0], SamplingOptions(sampler, 4)).isfinite().all()  # type: ignore[arg-type]
        # The network knows times 0..1000, on whatever path.
        assert sorted(set(told), reverse=True) == [1000, 750, 500, 250]
    with pytest.raises(ValueError, match="The sampler ddpm needs a schedule of discrete steps"):
        sample(straight, [0], SamplingOptions("ddpm", 3))


def test_any_size_is_drawn(model: DiffusionModel) -> None:
    assert sample(model, [0], SamplingOptions(steps=1), image_size=(12, 6)).shape == (1, 3, 12, 6)
    with pytest.raises(ValueError, match="halves images"):
        sample(model, [0], SamplingOptions(steps=1), image_size=(11, 6))


@pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule(), cosine_schedule(4000)])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 10, 20, 100, 1000])
def test_grids_go_from_the_noisiest_time_to_the_clean_end_in_as_many_steps(
    schedule: DiscreteSchedule, sampler: Sampler, steps: int
) -> None:
    grid = sampling_grid(schedule, sampler, steps)
    assert (grid[0], grid[-1]) == (schedule.num_timesteps - 1, -1)
    assert len(grid) == steps + 1
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_steps_than_the_schedule_has_are_refused(model: DiffusionModel, sampler: Sampler) -> None:
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            sampling_grid(model.schedule, sampler, steps)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1.5), ("ddim", -0.1), ("heun", 0.5)])
def test_an_eta_that_means_nothing_is_refused(sampler: Sampler, eta: float) -> None:
    with pytest.raises(ValueError, match="eta"):
        SamplingOptions(sampler, eta=eta)


def test_an_snr_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="snr belongs to the sampler predictor_corrector, not to ddim"):
        SamplingOptions("ddim", snr=0.1)
    with pytest.raises(ValueError, match="snr is above 0"):
        SamplingOptions("predictor_corrector", snr=0.0)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddpm"])
def test_sub_vp_is_sampled_from_its_file(sampler: Sampler, tmp_path: Path) -> None:
    DiffusionModel(None, two_level_unet(), schedule="sub_vp", image_size=8).save(tmp_path / "g.safetensors")
    model = DiffusionModel.load(tmp_path / "g.safetensors")
    assert model.schedule == SubVariancePreserving()
    images = sample(model, [0, 1], SamplingOptions(sampler, 5))
    assert images.isfinite().all()
    assert images.std() > 0.01


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(name, 2, eta)
        for name, eta in (("dpm_solver", 0), ("heun", 0), ("ddim", 0.5), ("ddpm", 0), ("predictor_corrector", 0))
    ],  # type: ignore[arg-type]
    ids=lambda options: options.sampler,
)
def test_no_step_waits_for_the_device(device: Device, options: SamplingOptions) -> None:
    model = conditional_generator()
    labels = torch.tensor([0, 1])
    expected = sample(model, range(2), options, said=labels)
    model = device.move(model)
    images = sample(model, range(2), options, said=labels)
    few = len(device.waits)
    torch.testing.assert_close(device.host(images), expected, atol=1e-4, rtol=1e-4)
    sample(model, range(2), replace(options, steps=6), said=labels)
    assert len(device.waits) <= 2 * few, device.report()
    assert few <= 4, device.report()


def test_a_step_of_guidance_by_words_waits_for_nothing(device: Device) -> None:
    model, said = captioned_generator(), ["a red star", "a ring"]
    options = SamplingOptions("ddim", 2, guidance=3.0, guidance_rescale=0.7, threshold=0.9)
    expected = sample(model, range(2), options, said=said)
    model = device.move(model)
    images = sample(model, range(2), options, said=said)
    few = len(device.waits)
    torch.testing.assert_close(device.host(images), expected, atol=1e-3, rtol=1e-3)
    sample(model, range(2), replace(options, steps=6), said=said)
    assert len(device.waits) <= 2 * few, device.report()
    assert few <= 6, device.report()
