"""Denoisers, what samplers work on: made of a network, or of other denoisers by clipping and guidance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffperception.diffusion.prediction import Prediction, broadcast_mul, target, to_eps, to_x0
from diffperception.diffusion.schedule import Schedule, precise


class DenoiserOutput(NamedTuple):
    """What a denoiser makes of a noisy sample."""

    x0: Tensor  # (B, ...) expected signal
    variance_range: Tensor | None = None  # (B, ...) learned place of the log variance between its bounds, -1..1


Network = Callable[[Tensor, Tensor], Tensor]
Denoiser = Callable[[Tensor, Tensor], DenoiserOutput]


@dataclass(eq=False)
class NetworkDenoiser:
    """A network and a schedule as a denoiser: (x_t (B, C, ...), t (B,)) -> :class:`DenoiserOutput`.

    Args:
        network: (x_t, ``schedule.conditioning(t)``) -> prediction (B, C, ...), or (B, 2C, ...) with a learned range.
        schedule: the path the network was trained on.
        prediction: what the network predicts.
        learned_range: whether the second half of the network's channels is the variance's place between its bounds.
    """

    network: Network
    schedule: Schedule
    prediction: Prediction = "eps"
    learned_range: bool = False

    def __call__(self, x_t: Tensor, t: Tensor) -> DenoiserOutput:
        raw = self.network(x_t, self.schedule.conditioning(t))
        prediction, variance_range = split_range(raw, self.learned_range)
        x0 = to_x0(self.prediction, prediction, x_t, self.schedule.alpha(t), self.schedule.sigma(t))
        return DenoiserOutput(x0, variance_range)


def denoise_at(denoiser: Denoiser, x_t: Tensor, t: Tensor) -> DenoiserOutput:
    """What a denoiser makes of samples (B, ...) that are all at one time (), on the CPU, as grids of samplers are."""
    # Filled in on the device: a copy of the grid's time to it would wait until all that is queued there is done.
    dtype = precise(x_t.device) if t.is_floating_point() else t.dtype
    return denoiser(x_t, torch.full((len(x_t),), t.item(), dtype=dtype, device=x_t.device))


def split_range(output: Tensor, learned_range: bool) -> tuple[Tensor, Tensor | None]:
    """A network's output as prediction and learned range: two (B, C, ...) of (B, 2C, ...), or all of it and None."""
    if not learned_range:
        return output, None
    prediction, variance_range = output.chunk(2, dim=1)
    return prediction, variance_range


def clip(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """The denoiser with every signal kept in ``low``..``high``; goes around guidance, not inside it."""

    def clipped(x_t: Tensor, t: Tensor) -> DenoiserOutput:
        output = denoiser(x_t, t)
        return output._replace(x0=output.x0.clamp(low, high))

    return clipped


def threshold(denoiser: Denoiser, fraction: float) -> Denoiser:
    """Dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3), instead of :func:`clip`, around guidance too.

    Each sample's signal is clipped to ``-s..s`` and divided by s, its ``fraction``-quantile of absolute values, where
    that is above 1: strong guidance then saturates fewer values.
    """

    def thresholded(x_t: Tensor, t: Tensor) -> DenoiserOutput:
        output = denoiser(x_t, t)
        x0 = output.x0.flatten(1).float()
        limit = torch.quantile(x0.abs(), fraction, dim=1, keepdim=True).clamp(min=1)
        kept = x0.clamp(-limit, limit) / limit
        return output._replace(x0=kept.view_as(output.x0).to(output.x0.dtype))

    return thresholded


@dataclass(eq=False)
class GuidanceRescale:
    """Brings guided predictions back to the spread of those that are not (arXiv 2305.08891, section 3.4).

    Args:
        factor: phi, how much of the way; 0.7 there.
        schedule: the path of the denoisers.
        prediction: what the network predicts, for of that the spread is measured.
    """

    factor: float
    schedule: Schedule
    prediction: Prediction

    def __call__(self, guided: Tensor, plain: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Signals (B, ...) of both, and the noisy samples and times that they were found at -> signals (B, ...)."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        y, kept = (
            target(self.prediction, x0, to_eps("x0", x0, x_t, alpha, sigma), alpha, sigma) for x0 in (guided, plain)
        )
        ratio = kept.flatten(1).std(1) / y.flatten(1).std(1)
        return to_x0(self.prediction, broadcast_mul(1 + self.factor * (ratio - 1), y), x_t, alpha, sigma)


def classifier_free_guidance(
    conditional: Denoiser, unconditional: Denoiser, weight: float, rescale: GuidanceRescale | None = None
) -> Denoiser:
    """``unconditional + weight * (conditional - unconditional)`` (arXiv 2207.12598); more than 1 exaggerates.

    Signals mix as noises do: at a given x_t each is linear in the other. A learned variance is the conditional one.
    """

    def guided(x_t: Tensor, t: Tensor) -> DenoiserOutput:
        with_condition, without = conditional(x_t, t), unconditional(x_t, t)
        x0 = torch.lerp(without.x0, with_condition.x0, weight)
        if rescale is not None:
            x0 = rescale(x0, with_condition.x0, x_t, t)
        return with_condition._replace(x0=x0)

    return guided


def classifier_guidance(
    denoiser: Denoiser, log_probability: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, weight: float
) -> Denoiser:
    """The denoiser of p(x) p(y | x_t)^weight (ADM, arXiv 2105.05233, algorithm 2, on any Gaussian path).

    Args:
        denoiser: of p(x), or of p(x | y).
        log_probability: (x_t (B, ...), t (B,)) -> (B,) log p(y | x_t) of the classes wanted, differentiable in x_t.
        schedule: the path of both.
        weight: how hard to pull; 0 leaves the denoiser as it is.
    """

    def guided(x_t: Tensor, t: Tensor) -> DenoiserOutput:
        # Samplers run without gradients; the classifier's is needed here alone.
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(log_probability(x, t).sum(), x)
        output = denoiser(x_t, t)
        # Tweedie: x0 = (x_t + sigma^2 score) / alpha, and the scores of p(x_t) and p(y | x_t) add up.
        # Where x_t is noise alone it tells nothing of the class: no shift, and not infinity times zero.
        alpha = schedule.alpha(t)
        strength = torch.where(alpha > 0, weight * schedule.sigma(t).square() / alpha, 0)
        shift = broadcast_mul(strength, gradient)
        return output._replace(x0=output.x0 + shift)

    return guided
