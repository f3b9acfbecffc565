from itertools import pairwise

import diffusers
import pytest
import torch
from torch import Tensor

from diffperception.diffusion import (
    FlowSchedule,
    Schedule,
    Spacing,
    VarianceExploding,
    add_noise,
    cosine_schedule,
    ddim_step,
    learned_log_variance,
    linear_schedule,
    posterior_log_variance,
    posterior_mean,
    posterior_std,
    to_eps,
    to_x0,
)

SPACINGS: list[Spacing] = ["leading", "trailing", "linspace", "diffusiondet"]
PATHS = [
    (linear_schedule(), linear_schedule().grid(7, "trailing")),
    (cosine_schedule(), cosine_schedule().grid(7, "trailing")),
    (VarianceExploding(), torch.tensor([80.0, 10.0, 1.0, 0.1, 0.0])),
    (FlowSchedule(), torch.linspace(1, 0, 8, dtype=torch.float64)),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Grids


def test_grids_of_known_steps() -> None:
    assert linear_schedule().grid(4, "diffusiondet").tolist() == [999, 749, 499, 249, -1]
    assert linear_schedule().grid(3, "diffusiondet").tolist() == [999, 665, 332, -1]
    assert linear_schedule().grid(1, "diffusiondet").tolist() == [999, -1]
    assert linear_schedule().grid(4, "leading").tolist() == [750, 500, 250, 0, -1]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 333, 999, 1000])
def test_grids_descend_to_the_clean_end(spacing: Spacing, steps: int) -> None:
    grid = linear_schedule().grid(steps, spacing)
    assert grid.dtype == torch.int64
    assert len(grid) == steps + 1
    assert (grid.diff() < 0).all()
    assert grid[0] <= 999
    assert grid[-1] == -1


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 4, 7, 30, 50, 1000])
def test_grids_are_diffusers(spacing: Spacing, steps: int) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert linear_schedule().grid(steps, spacing)[:-1].tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, 11])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 10 steps"):
        cosine_schedule(10).grid(steps, "trailing")


def test_unknown_spacings_are_named() -> None:
    with pytest.raises(ValueError, match="'even'"):
        cosine_schedule(10).grid(2, "even")  # type: ignore[arg-type]


# Steps


@pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule()])
@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_full_noise_draws_from_the_ancestral_posterior(schedule: Schedule, t: int) -> None:
    """DDPM, arXiv 2006.11239, eq. 7."""
    x0, x_t, noise = random(3, 2, 5)
    bar, bar_before = schedule.alpha(t).square(), schedule.alpha(t - 1).square()
    beta = 1 - bar / bar_before
    mean = (bar_before.sqrt() * beta * x0 + (bar / bar_before).sqrt() * (1 - bar_before) * x_t) / (1 - bar)
    std = (beta * (1 - bar_before) / (1 - bar)).sqrt()
    assert torch.allclose(ddim_step(schedule, x_t, x0, t, t - 1, 1.0, noise), mean + std * noise, atol=1e-10)
    assert torch.allclose(posterior_std(schedule, t, t - 1), std, rtol=1e-10)


@pytest.mark.parametrize(("schedule", "grid"), PATHS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_an_oracle_comes_back_exactly(schedule: Schedule, grid: Tensor, eta: float) -> None:
    x0, noise = random(2, 3, 4)
    x = add_noise(schedule, x0, grid[0], noise)
    for step, (t, s) in enumerate(pairwise(grid)):
        x = ddim_step(schedule, x, x0, t, s, eta, random(3, 4, seed=step))
    assert torch.equal(x, x0)


@pytest.mark.parametrize(("schedule", "grid"), PATHS)
def test_steps_without_noise_stay_on_the_path(schedule: Schedule, grid: Tensor) -> None:
    x0, noise = random(2, 3, 4)
    x_s = ddim_step(schedule, add_noise(schedule, x0, grid[1], noise), x0, grid[1], grid[2])
    assert torch.allclose(x_s, add_noise(schedule, x0, grid[2], noise), atol=1e-10)


@pytest.mark.parametrize(("schedule", "grid"), PATHS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noisy_steps_keep_the_paths_distribution(schedule: Schedule, grid: Tensor, eta: float) -> None:
    x0, noise, fresh = random(3, 1, 200_000)
    t, s = grid[1], grid[2]
    x_s = ddim_step(schedule, add_noise(schedule, x0, t, noise), x0, t, s, eta, fresh)
    residual = (x_s - schedule.alpha(s) * x0) / schedule.sigma(s)
    assert residual.mean().abs() < 0.01
    assert residual.std() == pytest.approx(1, abs=0.01)


def test_paths_agree_on_the_same_oracle() -> None:
    """Two paths are one process rescaled: equal sigma/alpha means equal steps of x / alpha."""
    preserving, exploding, straight = cosine_schedule(), VarianceExploding(), FlowSchedule()
    discrete = linear_schedule().grid(5, "trailing")
    ratio = preserving.sigma(discrete) / preserving.alpha(discrete)
    x0, noise = random(2, 3, 4)
    guesses = [x0 + 0.3 * random(3, 4, seed=10 + step) for step in range(5)]

    def trajectory(schedule: Schedule, grid: Tensor, eta: float) -> list[Tensor]:
        x, points = add_noise(schedule, x0, grid[0], noise), []
        for step, guess in enumerate(guesses):
            x = ddim_step(schedule, x, guess, grid[step], grid[step + 1], eta, random(3, 4, seed=20 + step))
            points.append(x / schedule.alpha(grid[step + 1]))
        return points

    for eta in (0.0, 1.0):
        expected = torch.stack(trajectory(preserving, discrete, eta))
        for schedule, grid in ((exploding, ratio), (straight, ratio / (1 + ratio))):
            assert torch.allclose(torch.stack(trajectory(schedule, grid, eta)), expected, rtol=1e-6, atol=1e-6)


def test_noise_is_recomputed_when_the_signal_is_clipped() -> None:
    schedule, t, s = cosine_schedule(), 600, 300
    x_t, eps = random(2, 3, 4)
    x0 = to_x0("eps", eps, x_t, schedule.alpha(t), schedule.sigma(t)).clamp(-0.5, 0.5)
    noise = to_eps("x0", x0, x_t, schedule.alpha(t), schedule.sigma(t))
    assert not torch.allclose(noise, eps, atol=0.1)
    assert torch.allclose(ddim_step(schedule, x_t, x0, t, s), add_noise(schedule, x0, s, noise), atol=1e-10)


def test_samples_may_stand_at_different_times() -> None:
    schedule, (x_t, x0, noise) = cosine_schedule(), random(3, 2, 3, 4)
    t, s = torch.tensor([999, 400]), torch.tensor([499, -1])
    together = ddim_step(schedule, x_t, x0, t, s, 1.0, noise)
    for i in range(2):
        alone = ddim_step(schedule, x_t[i], x0[i], int(t[i]), int(s[i]), 1.0, noise[i])
        assert torch.equal(together[i], alone)


def test_half_precision_is_rounded_once() -> None:
    schedule = cosine_schedule()
    x_t, x0 = random(2, 100).bfloat16()
    exact = ddim_step(schedule, x_t.double(), x0.double(), 600, 599)
    assert torch.equal(ddim_step(schedule, x_t, x0, 600, 599), exact.bfloat16())


def test_a_noisy_step_asks_for_noise() -> None:
    with pytest.raises(ValueError, match="give it as `noise`"):
        ddim_step(cosine_schedule(), torch.zeros(1), torch.zeros(1), 5, 4, eta=0.5)


# The posterior


@pytest.mark.parametrize(
    ("schedule", "t", "s"),
    [
        (linear_schedule(), 500, 499),
        (cosine_schedule(), 999, 300),
        (cosine_schedule(), 3, -1),
        (VarianceExploding(), 3.0, 0.5),
        (FlowSchedule(), 0.9, 0.2),
    ],
)
def test_the_posteriors_mean_and_spread_are_bayes(schedule: Schedule, t: float, s: float) -> None:
    """Of (x_s, x_t) given x0, both Gaussian with Cov = (alpha_t / alpha_s) sigma_s^2, condition on x_t."""
    x0, x_t = torch.randn(2, 3, 4, dtype=torch.float64)
    alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    covariance = alpha_t / alpha_s * sigma_s**2
    mean = alpha_s * x0 + covariance / sigma_t**2 * (x_t - alpha_t * x0)
    assert torch.allclose(posterior_mean(schedule, x_t, x0, t, s), mean)
    assert torch.allclose(posterior_std(schedule, t, s).square(), sigma_s**2 - covariance**2 / sigma_t**2, atol=1e-14)


def test_the_posteriors_mean_is_the_full_noise_step_without_its_noise() -> None:
    schedule, (x0, x_t) = cosine_schedule(), torch.randn(2, 2, 3, dtype=torch.float64)
    t, s = torch.tensor([900, 40]), torch.tensor([500, 20])
    expected = ddim_step(schedule, x_t, x0, t, s, 1.0, torch.zeros_like(x_t))
    assert torch.allclose(posterior_mean(schedule, x_t, x0, t, s), expected)


def test_the_clean_end_takes_the_variance_of_the_step_before() -> None:
    schedule = linear_schedule()
    t = torch.tensor([0, 1, 700])
    assert torch.allclose(
        posterior_log_variance(schedule, t, t - 1)[1:], 2 * posterior_std(schedule, t, t - 1)[1:].log()
    )
    assert posterior_log_variance(schedule, 0, -1) == posterior_log_variance(schedule, 1, 0)
    assert posterior_log_variance(schedule, 249, -1) == posterior_log_variance(schedule, 499, 249)


def test_the_learned_variance_lies_between_its_bounds() -> None:
    schedule, t = linear_schedule(), torch.tensor([0, 500])
    bounds = [learned_log_variance(schedule, torch.full((2, 3), place), t, t - 1) for place in (-1.0, 0.0, 1.0)]
    beta = 1 - (schedule.alpha(t) / schedule.alpha(t - 1)).square()
    assert torch.allclose(bounds[0][:, 0].double(), posterior_log_variance(schedule, t, t - 1))
    assert torch.allclose(bounds[2][:, 0].double(), beta.log())
    assert torch.allclose(bounds[1], (bounds[0] + bounds[2]) / 2)


# Agreement with diffusers


def denoiser(x: Tensor, t: int) -> Tensor:
    return torch.sin(3 * x) + t / 1000


def sample(schedule: Schedule, x: Tensor, grid: Tensor, eta: float, clip: bool, noises: Tensor) -> Tensor:
    for (t, s), noise in zip(grid.unfold(0, 2, 1).tolist(), noises, strict=True):
        x0 = to_x0("eps", denoiser(x, t), x, schedule.alpha(t), schedule.sigma(t))
        x = ddim_step(schedule, x, x0.clamp(-1, 1) if clip else x0, t, s, eta, noise)
    return x


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_is_diffusers(spacing: Spacing, betas: str, eta: float, clip: bool) -> None:
    schedule = linear_schedule() if betas == "linear" else cosine_schedule()
    scheduler = diffusers.DDIMScheduler(beta_schedule=betas, timestep_spacing=spacing, clip_sample=clip)
    scheduler.set_timesteps(10)
    noises, start = random(10, 2, 3).float(), random(2, 3, seed=1).float()
    x = start
    for t, noise in zip(scheduler.timesteps.tolist(), noises, strict=True):
        # With clipping, diffusers recomputes the noise only on request.
        x = scheduler.step(
            denoiser(x, t), t, x, eta=eta, use_clipped_model_output=True, variance_noise=noise if eta else None
        ).prev_sample
    ours = sample(schedule, start, linear_schedule().grid(10, spacing), eta, clip, noises)
    assert torch.allclose(ours, x, rtol=2e-3, atol=2e-3 * float(x.std()))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 50])
def test_ancestral_sampling_is_diffusers_ddpm(spacing: Spacing, steps: int) -> None:
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing, clip_sample=True)
    scheduler.set_timesteps(steps)
    x = start = random(2, 3, seed=1).float()
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(denoiser(x, t), t, x, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(0)
    noises = torch.stack([torch.randn(2, 3, generator=generator) for _ in range(steps - 1)] + [torch.zeros(2, 3)])
    ours = sample(linear_schedule(), start, linear_schedule().grid(steps, spacing), 1.0, True, noises)
    assert torch.allclose(ours, x, rtol=1e-3, atol=1e-3)
