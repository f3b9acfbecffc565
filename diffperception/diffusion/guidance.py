"""Guidance: denoisers made of denoisers, pulled towards a class."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffperception.diffusion.denoiser import Denoiser, DenoiserOutput
from diffperception.diffusion.prediction import broadcast_mul
from diffperception.diffusion.schedule import Schedule


def classifier_free_guidance(conditional: Denoiser, unconditional: Denoiser, weight: float) -> Denoiser:
    """``unconditional + weight * (conditional - unconditional)`` (arXiv 2207.12598).

    A weight of 0 leaves the unconditional denoiser, 1 the conditional one, more exaggerates the condition. Signals
    mix as noises do, since both are linear in one another at a given x_t. A learned variance is the conditional one.
    """

    def guided(x_t: Tensor, t: Tensor) -> DenoiserOutput:
        with_condition, without = conditional(x_t, t), unconditional(x_t, t)
        return with_condition._replace(x0=torch.lerp(without.x0, with_condition.x0, weight))

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
