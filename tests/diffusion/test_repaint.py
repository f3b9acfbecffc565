"""Inpainting against diffusers' scheduler and against conditional Gaussians known in closed form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffperception.diffusion import (
    DenoiserOutput,
    FlowSchedule,
    cosine_schedule,
    linear_schedule,
    noise_further,
    sample_repaint,
    to_x0,
)
from diffperception.diffusion.repaint import resampled

STORED = Path(__file__).parents[1] / "parity" / "repaint.npz"


def test_steps_and_jumps_are_those_of_diffusers() -> None:
    """Against what diffusers' RePaintScheduler has made of the same start, noise and predictions."""
    stored = {name: torch.from_numpy(value) for name, value in np.load(STORED).items()}
    schedule = linear_schedule(20, 0.005, 0.3)
    assert list(resampled(20, 5, 3)) == [20, *stored["times"].tolist()]

    def denoiser(x: Tensor, t: Tensor) -> DenoiserOutput:
        eps = torch.sin(3 * x) + t[0] / 20
        return DenoiserOutput(to_x0("eps", eps, x, schedule.alpha(t), schedule.sigma(t)))

    noises = iter(stored["noises"])
    found = sample_repaint(
        *(denoiser, schedule, stored["start"], schedule.grid(20), stored["known"], stored["mask"].bool()),
        *(5, 3, 0.0, lambda x: next(noises)),
    )
    torch.testing.assert_close(found, stored["final"], atol=1e-4, rtol=1e-4)
    assert next(noises, None) is None


@pytest.mark.parametrize("schedule", [cosine_schedule(), FlowSchedule()], ids=["cosine", "flow"])
def test_what_is_drawn_hangs_on_what_is_known(schedule: FlowSchedule) -> None:
    """Pairs of correlated Gaussians, one known: the other's mean and spread are the conditional ones."""
    rho, count = 0.8, 4000
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)

    def denoiser(x: Tensor, t: Tensor) -> DenoiserOutput:
        alpha, sigma = float(schedule.alpha(t[0])), float(schedule.sigma(t[0]))
        noised = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        return DenoiserOutput(x @ torch.linalg.solve(noised, alpha * covariance))

    torch.manual_seed(0)
    start = torch.randn(count, 2, dtype=torch.float64)
    signal, known = torch.full((count, 2), 1.5, dtype=torch.float64), torch.tensor([True, False])
    found = sample_repaint(denoiser, schedule, start, schedule.grid(50), signal, known, 5, 10)
    assert (found[:, 0] == 1.5).all()
    assert found[:, 1].mean().item() == pytest.approx(1.5 * rho, abs=0.1)
    assert found[:, 1].std().item() == pytest.approx((1 - rho**2) ** 0.5, abs=0.1)
    # Without going back the unknown part does not listen enough, as the paper says.
    once = sample_repaint(denoiser, schedule, start, schedule.grid(50), signal, known, 5, 1)
    assert (once[:, 1].mean() - 1.5 * rho).abs() > (found[:, 1].mean() - 1.5 * rho).abs()


def test_all_known_is_the_signal_and_one_time_all_is_seen() -> None:
    signal = torch.rand(2, 3, 4, 4)
    seen: list[float] = []

    def denoiser(x: Tensor, t: Tensor) -> DenoiserOutput:
        seen.append(float(t[0]))
        return DenoiserOutput(torch.zeros_like(x))

    grid = linear_schedule().grid(7)
    found = sample_repaint(denoiser, linear_schedule(), torch.randn(2, 3, 4, 4), grid, signal, torch.tensor(True), 3, 1)
    assert torch.equal(found, signal)
    assert seen == grid[:-1].tolist()
    with pytest.raises(ValueError, match="1 or more, not 0 and 2"):
        list(resampled(4, 0, 2))


def test_noising_in_two_steps_is_noising_at_once() -> None:
    schedule = cosine_schedule()
    torch.manual_seed(0)
    x = torch.full((100_000,), 0.5, dtype=torch.float64)
    between = noise_further(schedule, x, -1, 300, torch.randn_like(x))
    found = noise_further(schedule, between, 300, 600, torch.randn_like(x))
    assert found.mean().item() == pytest.approx(0.5 * schedule.alpha(600).item(), abs=0.01)
    assert found.std().item() == pytest.approx(schedule.sigma(600).item(), rel=0.01)
