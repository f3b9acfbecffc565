"""Group norm followed by a scale and a shift of each sample and by SiLU, exact and quick on the CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffperception.models.ops.convolution import is_eager_cpu


def group_norm(
    norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, activate: bool = False
) -> Tensor:
    """``norm(x) * (1 + scale) + shift``, then SiLU if asked for.

    On the CPU, where maps have their channels last, torch's own group norm takes variances as differences of large
    sums (with a mean of three standard deviations its error is 1e-4) and its gradient takes three times as long.

    Args:
        x: (B, C, H, W).
        scale, shift: (B, C), or None for the norm alone.
        activate: apply SiLU.
    """
    if is_eager_cpu(x):
        gain, bias = norm.weight.expand(x.shape[:2]), norm.bias.expand(x.shape[:2])
        if scale is not None and shift is not None:
            gain, bias = gain * (1 + scale), torch.addcmul(shift, bias, 1 + scale)
        return _GroupNorm.apply(x, gain, bias, norm.num_groups, norm.eps, activate)
    x = norm(x)
    if scale is not None and shift is not None:
        x = torch.addcmul(shift[:, :, None, None], x, 1 + scale[:, :, None, None])
    return F.silu(x) if activate else x


class _GroupNorm(torch.autograd.Function):
    """``gain * (x - mean) / std + bias``, activated or not; mean and variance of groups of channels, gain, bias (B, C).

    Kept for the backward pass is the input alone: what lies between it and the output is quicker computed than read.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, bias: Tensor, groups: int, eps: float, activate: bool) -> Tensor:
        rows = _rows(x)
        mean, variance = _moments(rows, groups)
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(x, mean, inverse, gain, bias)
        ctx.groups, ctx.activate = groups, activate
        out = _affine(rows, mean, gain[:, None] * inverse, bias)
        return _map((F.silu(out, inplace=True) if activate else out).to(x.dtype), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, gain, bias = ctx.saved_tensors
        rows, grads, factor = _rows(x), _rows(grad), gain[:, None] * inverse
        if ctx.activate:
            grads = torch.ops.aten.silu_backward(grads, _affine(rows, mean, factor, bias))
        of_bias = grads.sum(1)
        of_gain = ((grads * rows).sum(1) - mean[:, 0] * of_bias) * inverse[:, 0]
        # Normalising removes from the gradient its mean and its component along the normalised values.
        constant = _group_means(gain * of_bias / rows.shape[1], ctx.groups) * inverse
        along = _group_means(gain * of_gain / rows.shape[1], ctx.groups) * inverse.square()
        of_x = torch.addcmul(mean * along - constant, grads, factor).addcmul_(rows, -along)
        return _map(of_x.to(grad.dtype), grad), of_gain, of_bias, None, None, None


def _moments(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(B, P, C) -> mean and variance (B, 1, C), every channel with those of its group."""
    means = rows.mean(1)
    # The one kernel that takes the variance of columns by distances from their mean without writing these down.
    variances = torch.stack([torch.batch_norm_update_stats(image, None, None, 0.0)[1] for image in rows])
    mean = _group_means(means, groups)
    return mean, _group_means(variances + (means - mean[:, 0]).square(), groups)


def _affine(rows: Tensor, mean: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    return torch.addcmul(bias[:, None] - mean * factor, rows, factor)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C), of float32 or more, without a copy where channels are last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).to(torch.promote_types(x.dtype, torch.float32))


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """(B, H W, C) -> (B, C, H, W) with channels last."""
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _group_means(values: Tensor, groups: int) -> Tensor:
    """(B, C) -> (B, 1, C), every channel with the mean of its group."""
    grouped = values.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)[:, None]
