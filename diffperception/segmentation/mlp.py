"""The members of an ensemble of pixel classifiers, computed together by batched matrix products."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from diffperception.diffusion.noise import derive_seed

MANY_CLASSES = 30  # from here on the hidden layers are wider (arXiv 2112.03126)
WEIGHT_STD = 0.02


def hidden_widths(num_classes: int) -> tuple[int, int]:
    """The widths of the reference's hidden layers."""
    return (128, 32) if num_classes < MANY_CLASSES else (256, 128)


class EnsembleLinear(nn.Module):
    """A linear layer a member: (M, N, inputs) -> (M, N, outputs)."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(members, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(members, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class EnsembleBatchNorm(nn.Module):
    """``nn.BatchNorm1d`` a member: (M, N, C) -> (M, N, C), with statistics over N."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, members: int, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(members, channels))
        self.bias = nn.Parameter(torch.zeros(members, channels))
        self.register_buffer("running_mean", torch.zeros(members, channels))
        self.register_buffer("running_var", torch.ones(members, channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).flatten(1)  # (N, M C): every member's channels are channels of one norm
        mean, var, weight, bias = (v.view(-1) for v in (self.running_mean, self.running_var, self.weight, self.bias))
        rows = F.batch_norm(rows, mean, var, weight, bias, self.training, self.momentum, self.eps)
        return rows.unflatten(1, self.weight.shape).transpose(0, 1)

    def as_affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (M, C) of the norm in evaluation."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - scale * self.running_mean


class PixelMLPs(nn.Module):
    """M classifiers of pixels: D -> hidden -> hidden -> K, with ReLU and then batch norm after the hidden layers.

    Layers are numbered as the reference's. Weights are drawn on the CPU from N(0, 0.02), each member's with a seed of
    its own that follows from `seed`.
    """

    def __init__(self, members: int, channels: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        first, second = hidden_widths(num_classes)
        self.layers = nn.Sequential(
            EnsembleLinear(members, channels, first),
            nn.ReLU(),
            EnsembleBatchNorm(members, first),
            EnsembleLinear(members, first, second),
            nn.ReLU(),
            EnsembleBatchNorm(members, second),
            EnsembleLinear(members, second, num_classes),
        )
        for member in range(members):
            generator = torch.Generator().manual_seed(derive_seed(seed, member))
            for layer in self.linears:
                drawn = torch.empty(layer.weight.shape[1:], device="cpu").normal_(0, WEIGHT_STD, generator=generator)
                layer.weight.data[member] = drawn

    @property
    def linears(self) -> list[EnsembleLinear]:
        return [layer for layer in self.layers if isinstance(layer, EnsembleLinear)]

    @property
    def norms(self) -> list[EnsembleBatchNorm]:
        return [layer for layer in self.layers if isinstance(layer, EnsembleBatchNorm)]

    def forward(self, x: Tensor) -> Tensor:
        """What the layers after the first, which is applied elsewhere, make of its output (M, N, hidden): (M, N, K)."""
        return self.layers[1:](x)

    def folded(self) -> list[tuple[Tensor, Tensor]]:
        """Weights (M, out, in) and biases (M, out) of three linear layers with ReLU between them and nothing else.

        They equal the classifiers in evaluation: the linear layer after a norm takes its scale and shift over.
        """
        first, *others = self.linears
        folded: list[tuple[Tensor, Tensor]] = [(first.weight, first.bias)]
        for norm, linear in zip(self.norms, others, strict=True):
            scale, shift = norm.as_affine()
            bias = torch.baddbmm(linear.bias[..., None], linear.weight, shift[..., None])[..., 0]
            folded.append((linear.weight * scale[:, None], bias))
        return folded
