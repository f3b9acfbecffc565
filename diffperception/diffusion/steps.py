"""The steps between two times and the Gaussian q(x_s | x_t, x0) behind them: pure functions, for any Gaussian path."""

import torch
from torch import Tensor

from diffperception.diffusion.prediction import broadcast_mul
from diffperception.diffusion.schedule import Schedule, Time


def add_noise(schedule: Schedule, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
    """``x_t = alpha(t) x0 + sigma(t) noise`` (B, ...), in x0's dtype, for a time () or times (B,)."""
    return (broadcast_mul(schedule.alpha(t), x0) + broadcast_mul(schedule.sigma(t), noise)).to(x0.dtype)


def noise_further(schedule: Schedule, x_s: Tensor, s: Time, t: Time, noise: Tensor) -> Tensor:
    """From time ``s`` to the noisier time ``t``: a draw of q(x_t | x_s) (B, ...) by standard normal ``noise``."""
    kept = broadcast_mul(schedule.alpha(t) / schedule.alpha(s), x_s)
    return (kept + broadcast_mul(_added_variance(schedule, t, s).sqrt(), noise)).to(x_s.dtype)


def ddim_step(
    schedule: Schedule, x_t: Tensor, x0: Tensor, t: Time, s: Time, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """From time ``t`` to the cleaner time ``s`` (DDIM, arXiv 2010.02502, eq. 12, on any Gaussian path).

    The noise in ``x_t`` is recomputed from ``x0``, which may therefore have been clipped. ``eta = 1`` draws from the
    ancestral posterior q(x_s | x_t, x0), DDPM's step; ``eta = 0`` is deterministic. Returns x_s in x_t's dtype.

    Args:
        x_t, x0: (B, ...) sample at ``t``, and the signal predicted from it.
        t, s: times, one or one per sample: () or (B,).
        eta: fraction of the posterior's standard deviation that is drawn anew, in 0..1.
        noise: standard normal, of x_t's shape; ValueError if it is missing where ``eta`` is above 0.
    """
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    tau = eta * posterior_std(schedule, t, s)
    kept = (sigma_s.square() - tau.square()).clamp(min=0).sqrt() / sigma_t
    x_s = broadcast_mul(alpha_s - kept * alpha_t, x0) + broadcast_mul(kept, x_t)
    if eta > 0:
        if noise is None:
            raise ValueError(f"A step with eta = {eta} draws new noise; give it as `noise`.")
        x_s = x_s + broadcast_mul(tau, noise)
    return x_s.to(x_t.dtype)


def second_order_x0(schedule: Schedule, x0: Tensor, x0_before: Tensor, before: Time, t: Time, s: Time) -> Tensor:
    """The signal that makes a DDIM step from ``t`` to ``s`` one of DPM-Solver++(2M) (arXiv 2211.01095, eq. 21).

    Args:
        x0, x0_before: (B, ...) signals predicted at ``t`` and at ``before``, where the last step began.
        before, t, s: times, () or (B,), ever cleaner. A step to the clean end stays first order.
    """
    # Half the log signal-to-noise ratio, the time of that paper.
    at_before, at_t, at_s = ((schedule.alpha(time) / schedule.sigma(time)).log() for time in (before, t, s))
    ratio = (at_s - at_t) / (at_t - at_before)
    ahead = torch.where(ratio.isfinite(), ratio / 2, 0)
    return broadcast_mul(1 + ahead, x0) - broadcast_mul(ahead, x0_before)


def heun_step(schedule: Schedule, x_t: Tensor, x0_t: Tensor, x_s: Tensor, x0_s: Tensor, t: Time, s: Time) -> Tensor:
    """From ``t`` to ``s`` with the mean of the slopes at both (Heun; arXiv 2206.00364, algorithm 1).

    Divided by alpha + sigma every Gaussian path is the straight one, whose slope ``eps - x0`` is finite everywhere,
    pure noise included; there the two slopes are averaged.

    Args:
        x_t, x0_t: (B, ...) sample at ``t``, and the signal predicted from it.
        x_s, x0_s: (B, ...) sample at ``s`` after a DDIM step, and the signal predicted from it.
        t, s: times, () or (B,); ``s`` is cleaner, but not the clean end.
    """
    sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(s)
    total_t, total_s = schedule.alpha(t) + sigma_t, schedule.alpha(s) + sigma_s
    half = (sigma_s / total_s - sigma_t / total_t) / 2
    slopes = broadcast_mul(1 / sigma_t, x_t) - broadcast_mul(total_t / sigma_t, x0_t)
    slopes = slopes + broadcast_mul(1 / sigma_s, x_s) - broadcast_mul(total_s / sigma_s, x0_s)
    return (broadcast_mul(total_s / total_t, x_t) + broadcast_mul(total_s * half, slopes)).to(x_t.dtype)


def reverse_diffusion_step(schedule: Schedule, x_t: Tensor, x0: Tensor, t: Time, s: Time, noise: Tensor) -> Tensor:
    """From ``t`` to ``s`` by the reverse SDE as the forward one was discretised (arXiv 2011.13456, eq. 46).

    The mean is the posterior's, the noise all that the path adds from ``s`` to ``t``; none where ``s`` is the clean
    end. The arguments are as for :func:`ddim_step`.
    """
    std = torch.where(schedule.sigma(s) > 0, _added_variance(schedule, t, s).sqrt(), 0)
    return (posterior_mean(schedule, x_t, x0, t, s) + broadcast_mul(std, noise)).to(x_t.dtype)


def langevin_step(schedule: Schedule, x_t: Tensor, x0: Tensor, t: Time, snr: float, noise: Tensor) -> Tensor:
    """A step of Langevin dynamics at time ``t`` (arXiv 2011.13456, algorithm 4): other samples of the same noise level.

    The step is that which makes the score ``snr`` times as large as the noise, in each sample for itself.

    Args:
        x_t, x0: (B, ...) samples at ``t``, and the signals predicted from them.
        snr: r of the paper.
        noise: standard normal, of x_t's shape.
    """
    sigma = schedule.sigma(t)
    score = broadcast_mul(schedule.alpha(t) / sigma.square(), x0) - broadcast_mul(1 / sigma.square(), x_t)
    norms = (each.flatten(1).norm(dim=1) for each in (noise, score))
    ratio = snr * next(norms) / next(norms)
    # 2 ratio^2 of the score, and the root of twice that of the noise.
    return (x_t + broadcast_mul(2 * ratio.square(), score) + broadcast_mul(2 * ratio, noise)).to(x_t.dtype)


def posterior_mean(schedule: Schedule, x_t: Tensor, x0: Tensor, t: Time, s: Time) -> Tensor:
    """Mean of q(x_s | x_t, x0) (DDPM, arXiv 2006.11239, eq. 7, between any two times of any Gaussian path).

    ``x_t`` (B, ...) is the sample at ``t``, ``x0`` the signal; times are () or (B,), ``s`` the cleaner.
    """
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
    kept = alpha_t / alpha_s * (schedule.sigma(s) / schedule.sigma(t)).square()
    return broadcast_mul(alpha_s - kept * alpha_t, x0) + broadcast_mul(kept, x_t)


def posterior_std(schedule: Schedule, t: Time, s: Time) -> Tensor:
    """Standard deviation of q(x_s | x_t, x0), of the shape of ``t``; 0 where ``s`` is the clean end."""
    return schedule.sigma(s) / schedule.sigma(t) * _added_variance(schedule, t, s).sqrt()


def posterior_log_variance(schedule: Schedule, t: Time, s: Time) -> Tensor:
    """Log variance of q(x_s | x_t, x0), of the shape of ``t``.

    Where ``s`` is the clean end the variance is 0; that of the step before, of equal length, stands in for it (Improved
    DDPM, arXiv 2102.09672, section 3.1).
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
