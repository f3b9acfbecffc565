"""What a denoiser predicts, and how to read the signal and the noise from it, in alpha and sigma alone.

Every prediction is a mixture ``y = a x0 + b eps``; with ``x_t = alpha x0 + sigma eps`` that is two equations for the
two unknowns x0 and eps.

==========  =======  =======  ==========================================
kind        a        b        source
==========  =======  =======  ==========================================
``x0``      1        0
``eps``     0        1        DDPM, arXiv 2006.11239
``v``       -sigma   alpha    progressive distillation, arXiv 2202.00512
``flow``    -1       1        flow matching, arXiv 2210.02747
==========  =======  =======  ==========================================
"""

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["x0", "eps", "v", "flow"]


def target(kind: Prediction, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The value a denoiser of this kind should predict.

    Args:
        x0, eps: (B, ...) signal and standard normal noise.
        alpha, sigma: () or (B,) factor of the signal and standard deviation of the noise.
    """
    a, b, _ = _mixture(kind, alpha, sigma)
    return broadcast_mul(a, x0) + broadcast_mul(b, eps)


def to_x0(kind: Prediction, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The signal that a prediction implies; shapes as in :func:`target`. Infinite for ``eps`` where alpha is 0."""
    if kind == "x0":
        return prediction
    _, b, determinant = _mixture(kind, alpha, sigma)
    return broadcast_mul(b / determinant, x_t) - broadcast_mul(sigma / determinant, prediction)


def to_eps(kind: Prediction, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a prediction implies; shapes as in :func:`target`. Infinite for ``x0`` where sigma is 0."""
    if kind == "eps":
        return prediction
    a, _, determinant = _mixture(kind, alpha, sigma)
    return broadcast_mul(alpha / determinant, prediction) - broadcast_mul(a / determinant, x_t)


def broadcast_mul(coefficient: Tensor, x: Tensor) -> Tensor:
    """``coefficient * x`` with one coefficient, or one per sample: () or (B,) times (B, ...), at least in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    aligned = coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim if coefficient.ndim else 0))
    return aligned.to(dtype) * x.to(dtype)


def _mixture(kind: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a and b of the table, and the determinant of the two equations."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    mixtures = {"x0": (one, zero), "eps": (zero, one), "v": (-sigma, alpha), "flow": (-one, one)}
    if kind not in mixtures:
        raise ValueError(f"A denoiser predicts one of {', '.join(mixtures)}, not {kind!r}.")
    a, b = mixtures[kind]
    return a, b, alpha * b - sigma * a
