"""Samplers: the loops that lead a noisy sample along a grid of times to the clean end.

Each takes a denoiser, the schedule, ``x`` (B, ...) noised as at ``grid[0]``, and the descending ``grid``, on the CPU,
that ends at the clean end; each returns the signal, (B, ...). ``draw`` makes the standard normal noise of a step from a
tensor of its shape; a draw from one generator per sample makes results independent of the batch.
"""

from itertools import pairwise

import torch
from torch import Tensor

from diffperception.diffusion.denoiser import Denoiser, denoise_at
from diffperception.diffusion.noise import NoiseFn
from diffperception.diffusion.schedule import Schedule
from diffperception.diffusion.steps import (
    ddim_step,
    heun_step,
    langevin_step,
    learned_log_variance,
    posterior_mean,
    reverse_diffusion_step,
    second_order_x0,
)


@torch.no_grad()
def sample_ddim(
    denoiser: Denoiser, schedule: Schedule, x: Tensor, grid: Tensor, eta: float = 0.0, draw: NoiseFn = torch.randn_like
) -> Tensor:
    """DDIM (arXiv 2010.02502); with ``eta = 1`` ancestral sampling with the posterior's own variance. First order."""
    for t, s in pairwise(grid):
        found = denoise_at(denoiser, x, t)
        x = ddim_step(schedule, x, found.x0, t, s, eta, draw(x) if eta > 0 else None)
    return x


@torch.no_grad()
def sample_ddpm(
    denoiser: Denoiser, schedule: Schedule, x: Tensor, grid: Tensor, draw: NoiseFn = torch.randn_like
) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239), with the learned variance (arXiv 2102.09672) where there is one."""
    for t, s in pairwise(grid):
        found = denoise_at(denoiser, x, t)
        if found.variance_range is None:
            x = ddim_step(schedule, x, found.x0, t, s, 1.0, draw(x))
            continue
        std = (learned_log_variance(schedule, found.variance_range, t, s) / 2).exp()
        noise = torch.where(schedule.sigma(s) > 0, std * draw(x), 0)
        x = (posterior_mean(schedule, x, found.x0, t, s) + noise).to(x.dtype)
    return x


@torch.no_grad()
def sample_dpm_solver(denoiser: Denoiser, schedule: Schedule, x: Tensor, grid: Tensor) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order, one call of the denoiser a step."""
    before: tuple[Tensor, Tensor] | None = None  # the last step's time and signal
    for t, s in pairwise(grid):
        x0 = denoise_at(denoiser, x, t).x0
        ahead = x0 if before is None else second_order_x0(schedule, x0, before[1], before[0], t, s)
        x = ddim_step(schedule, x, ahead, t, s)
        before = (t, x0)
    return x


@torch.no_grad()
def sample_heun(denoiser: Denoiser, schedule: Schedule, x: Tensor, grid: Tensor) -> Tensor:
    """Heun's method (arXiv 2206.00364, algorithm 1): second order, two calls of the denoiser a step, but the last."""
    for t, s in pairwise(grid[:-1]):
        x0 = denoise_at(denoiser, x, t).x0
        ahead = ddim_step(schedule, x, x0, t, s)
        x = heun_step(schedule, x, x0, ahead, denoise_at(denoiser, ahead, s).x0, t, s)
    return ddim_step(schedule, x, denoise_at(denoiser, x, grid[-2]).x0, grid[-2], grid[-1])


@torch.no_grad()
def sample_predictor_corrector(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    grid: Tensor,
    snr: float = 0.16,
    draw: NoiseFn = torch.randn_like,
) -> Tensor:
    """The predictor-corrector sampler (arXiv 2011.13456, algorithm 1): Langevin dynamics, then the reverse diffusion.

    Two calls of the denoiser a step. ``snr`` is how large the score is beside the noise in a step of the corrector.
    """
    for t, s in pairwise(grid):
        x = langevin_step(schedule, x, denoise_at(denoiser, x, t).x0, t, snr, draw(x))
        x = reverse_diffusion_step(schedule, x, denoise_at(denoiser, x, t).x0, t, s, draw(x))
    return x
