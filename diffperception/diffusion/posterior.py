"""The Gaussian q(x_s | x_t, x0) of a cleaner sample, and the variance a network may learn in its place."""

import torch
from torch import Tensor

from diffperception.diffusion.prediction import broadcast_mul
from diffperception.diffusion.schedule import Schedule, Time


def posterior_mean(schedule: Schedule, x_t: Tensor, x0: Tensor, t: Time, s: Time) -> Tensor:
    """Mean of q(x_s | x_t, x0) (DDPM, arXiv 2006.11239, eq. 7, between any two times of any Gaussian path).

    Args:
        x_t: (B, ...) sample at ``t``.
        x0: (B, ...) signal.
        t, s: times, () or (B,), ``s`` the cleaner.
    """
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
    kept = alpha_t / alpha_s * (schedule.sigma(s) / schedule.sigma(t)).square()
    return broadcast_mul(alpha_s - kept * alpha_t, x0) + broadcast_mul(kept, x_t)


def posterior_std(schedule: Schedule, t: Time, s: Time) -> Tensor:
    """Standard deviation of q(x_s | x_t, x0), of the shape of ``t``; 0 where ``s`` is the clean end."""
    return schedule.sigma(s) / schedule.sigma(t) * _added_variance(schedule, t, s).sqrt()


def posterior_log_variance(schedule: Schedule, t: Time, s: Time) -> Tensor:
    """Log variance of q(x_s | x_t, x0), of the shape of ``t``.

    Where ``s`` is the clean end there is no variance; that of the step before, of equal length, stands in for it
    (Improved DDPM, arXiv 2102.09672, section 3.1).
    """
    t, s = torch.as_tensor(t), torch.as_tensor(s)
    before = (2 * t - s).clamp(max=schedule.require_discrete("a learned variance") - 1)
    return 2 * posterior_std(schedule, torch.where(s < 0, before, t), torch.where(s < 0, t, s)).log()


def learned_log_variance(schedule: Schedule, variance_range: Tensor, t: Time, s: Time) -> Tensor:
    """Log variance (B, ...) between the posterior's (-1) and that of the noise added from ``s`` to ``t`` (1).

    Args:
        variance_range: (B, ...) what the network learned, -1..1 (Improved DDPM, arXiv 2102.09672, eq. 15).
        t, s: times, () or (B,), ``s`` the cleaner.
    """
    lowest = posterior_log_variance(schedule, t, s)
    highest = _added_variance(schedule, t, s).log()
    fraction = (variance_range + 1) / 2
    return broadcast_mul(highest, fraction) + broadcast_mul(lowest, 1 - fraction)


def _added_variance(schedule: Schedule, t: Time, s: Time) -> Tensor:
    """Variance of q(x_t | x_s): beta_t where ``s`` is t - 1 on a variance-preserving path."""
    kept = schedule.alpha(t) / schedule.alpha(s) * schedule.sigma(s)
    return (schedule.sigma(t).square() - kept.square()).clamp(min=0)
