"""Timestep grids and the steps between their points: pure functions, stateless, for any Gaussian path."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffperception.diffusion.parameterization import scale
from diffperception.diffusion.schedule import Schedule, Time

Spacing = Literal["leading", "trailing", "linspace", "diffusiondet"]


def timestep_grid(num_timesteps: int, steps: int, spacing: Spacing) -> Tensor:
    """Times from the noisiest to -1, the clean end; consecutive pairs are the steps.

    ``leading``, ``trailing`` and ``linspace`` are named as in diffusers (arXiv 2305.08891, table 2); ``diffusiondet``
    is the integers of linspace(-1, T-1, steps + 1) (arXiv 2211.09788).

    Returns:
        (steps + 1,) int64, descending, on the CPU.

    Raises:
        ValueError: if ``steps`` is not in 1..``num_timesteps`` or the spacing is unknown.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"Take between 1 and {num_timesteps} steps on this schedule, not {steps}.")
    last = num_timesteps - 1
    if spacing == "leading":
        times = np.arange(steps) * (num_timesteps // steps)
    elif spacing == "trailing":
        times = np.round(np.arange(1, steps + 1) * (num_timesteps / steps)) - 1
    elif spacing == "linspace":
        times = np.round(np.linspace(0, last, steps))
    elif spacing == "diffusiondet":
        times = torch.linspace(-1, last, steps + 1)[1:].numpy()
    else:
        raise ValueError(f"A spacing is one of leading, trailing, linspace, diffusiondet, not {spacing!r}.")
    return torch.tensor([*times[::-1].astype(int), -1])


def add_noise(schedule: Schedule, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
    """``x_t = alpha(t) x0 + sigma(t) noise``, in x0's dtype.

    Args:
        x0: (B, ...) signal.
        t: time, one or one per sample: () or (B,).
        noise: standard normal, of x0's shape.
    """
    return (scale(schedule.alpha(t), x0) + scale(schedule.sigma(t), noise)).to(x0.dtype)


def ddim_step(
    schedule: Schedule,
    x_t: Tensor,
    x0: Tensor,
    t: Time,
    s: Time,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """From time ``t`` to the cleaner time ``s`` (DDIM, arXiv 2010.02502, eq. 12, on any Gaussian path).

    The noise in ``x_t`` is recomputed from ``x0``, which may therefore have been clipped. ``eta = 1`` draws from the
    ancestral posterior q(x_s | x_t, x0), DDPM's step; ``eta = 0`` is deterministic.

    Args:
        x_t: (B, ...) sample at ``t``.
        x0: (B, ...) predicted signal.
        t, s: times, one or one per sample: () or (B,).
        eta: fraction of the posterior's standard deviation that is drawn anew, in 0..1.
        noise: standard normal, of x_t's shape; needed where ``eta`` is above 0.

    Returns:
        (B, ...) sample at ``s``, in x_t's dtype.

    Raises:
        ValueError: if ``eta`` is above 0 and there is no noise.
    """
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    tau = eta * posterior_std(schedule, t, s)
    kept = (sigma_s.square() - tau.square()).clamp(min=0).sqrt() / sigma_t
    x_s = scale(alpha_s - kept * alpha_t, x0) + scale(kept, x_t)
    if eta > 0:
        if noise is None:
            raise ValueError(f"A step with eta = {eta} draws new noise; give it as `noise`.")
        x_s = x_s + scale(tau, noise)
    return x_s.to(x_t.dtype)


def posterior_std(schedule: Schedule, t: Time, s: Time) -> Tensor:
    """Standard deviation of q(x_s | x_t, x0), of the shape of ``t``; 0 where ``s`` is the clean end."""
    sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(s)
    added = sigma_t.square() - (schedule.alpha(t) / schedule.alpha(s) * sigma_s).square()
    return sigma_s / sigma_t * added.clamp(min=0).sqrt()
