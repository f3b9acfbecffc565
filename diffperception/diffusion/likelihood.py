"""The density of samples by the probability-flow ODE of a denoiser (score SDEs, arXiv 2011.13456, section 4.3)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffperception.diffusion.denoiser import Denoiser, denoise_at
from diffperception.diffusion.schedule import Schedule, precise


def log_density(
    denoiser: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, probes: Sequence[Tensor] | None = None
) -> Tensor:
    """Log density in nats, (B,), of noisy samples at the cleanest of some times.

    Heun's method from there to the noisiest, whose samples are taken for noise of the variance that signals of unit
    variance have there. Divided by alpha + sigma every Gaussian path is the straight one of u = sigma / (alpha +
    sigma), finite at pure noise too: dz/du = (z - x0) / u. So d log p(z) / d log u = div x0 - D, between 0 and -D
    for Gaussians, which is taken as linear in u from one time to the next: exact where signals hardly vary, as in most
    directions of images, and where they vary much.

    Args:
        denoiser: without clipping or guidance, which make it none of a density; differentiable in the samples.
        schedule: the path.
        x: (B, ...) samples at ``times[-1]``.
        times: (steps + 1,) descending, on the CPU, without the clean end: a grid of samplers but for its last.
        probes: tensors (B, ...) of independent entries of mean 0 and variance 1, such as signs, for Hutchinson's
            unbiased estimate of the divergence, each a backward pass a step; without any it is exact, in as many
            backward passes as a sample has entries.

    Raises:
        ValueError: the times are fewer than two, do not descend or reach the clean end.
    """
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    total, places = alpha + sigma, (sigma / (alpha + sigma)).flip(0).tolist()  # from the cleanest on
    if len(places) < 2 or any(b <= a for a, b in pairwise([0.0, *places])):
        raise ValueError(
            "The density is that of samples with noise: give two or more times that descend to such a one."
        )
    ode = _Flow(denoiser, times.flip(0), total.flip(0).tolist(), places)
    z = x / ode.totals[0]
    slope, before = ode.slope_and_loss(z, 0, probes)
    lost = torch.zeros_like(before)
    for k, (a, b) in enumerate(pairwise(places), 1):
        with torch.no_grad():
            z = z + (b - a) / 2 * (slope + ode.slope(z + (b - a) * slope, k))
        slope, after = ode.slope_and_loss(z, k, probes)
        later = 1 - a * math.log(b / a) / (b - a)  # of (log u_b - log u_a): the integral of (u - a) / (b - a) d log u
        lost, before = lost + (math.log(b / a) - later) * before + later * after, after
    variance = float(alpha[0] ** 2 + sigma[0] ** 2)
    entries, ratio = z[0].numel(), ode.totals[-1] / ode.totals[0]
    squares = (ode.totals[-1] * z).to(precise(x.device)).square().flatten(1).sum(1)
    prior = -(squares / variance + entries * math.log(2 * math.pi * variance)) / 2
    return prior + entries * math.log(ratio) + lost


class _Flow:
    """The ODE at the places of a grid: its slope, and the slope's divergence, at any sample."""

    def __init__(self, denoiser: Denoiser, times: Tensor, totals: list[float], places: list[float]) -> None:
        self.denoiser, self.times, self.totals, self.places = denoiser, times, totals, places

    def slope(self, z: Tensor, k: int) -> Tensor:
        x0 = denoise_at(self.denoiser, self.totals[k] * z, self.times[k]).x0
        return (z - x0.to(z.dtype)) / self.places[k]

    def slope_and_loss(self, z: Tensor, k: int, probes: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        """The slope (B, ...) and u times its divergence (B,), what the log density loses as log u grows."""
        with torch.inference_mode(False), torch.enable_grad():
            z = z.detach().clone().requires_grad_()
            slope = self.slope(z, k)
            if probes is None:
                trace = _trace(slope, z)
            else:
                # v^T J v for each probe v: its mean is the trace of J.
                products = [torch.autograd.grad(slope, z, v, retain_graph=True)[0] * v for v in probes]
                trace = torch.stack(products).to(precise(z.device)).flatten(2).sum(2).mean(0)
        return slope.detach(), self.places[k] * trace


def _trace(slope: Tensor, z: Tensor) -> Tensor:
    """(B,) the trace of the Jacobian of each sample's slope, an entry at a time."""
    trace = torch.zeros(len(z), dtype=precise(z.device), device=z.device)
    for i in range(z[0].numel()):
        (row,) = torch.autograd.grad(slope.flatten(1)[:, i].sum(), z, retain_graph=True)
        trace += row.flatten(1)[:, i]
    return trace
