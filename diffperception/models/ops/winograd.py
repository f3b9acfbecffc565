"""3 x 3 convolutions with a quarter of the products: Winograd's F(4 x 4, 3 x 3) (arXiv 1509.09308), on the CPU.

Squares of 6 x 6 pixels of the input, which overlap by two, give squares of 4 x 4 of the output. Once input and weights
are transformed, each of the 36 positions of a square is one product of matrices: squares x channels by channels x
channels. The gradients are the adjoints of these steps.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4
# Squares transformed at a time: enough for the products of matrices, few enough for the cache.
SQUARES_AT_ONCE = 128


def winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=1)`` with errors of about 1e-5 of the output's spread.

    x (B, C, H, W), weight (C', C, 3, 3), bias (C',) -> (B, C', H, W) with channels last; float32 on the CPU, height and
    width multiples of 4.
    """
    out: Tensor = _Winograd.apply(x, weight, bias)
    return out


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        B, _, H, W = x.shape
        out, kernels = x.new_empty(B, H, W, len(weight)), _kernels(weight).transpose(1, 2)
        for images in _image_groups(x):
            squares, blocks = _squares(x[images]), _blocks(out[images])
            for rows in _row_groups(x):
                block = blocks[:, :, :, rows]
                products = torch.bmm(_transform(_INPUT, squares[:, :, :, rows]), kernels)
                torch.add(_transform(_OUTPUT, products).view_as(block), bias, out=block)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x_needed, of_weight_needed, of_bias_needed = ctx.needs_input_grad
        grads, kernels = grad.permute(0, 2, 3, 1), _kernels(weight)
        B, C, H, W = x.shape
        of_x, of_kernels = x.new_empty(B, H, W, C), torch.zeros_like(kernels)
        for images in _image_groups(x):
            squares, blocks = _squares(x[images]), _blocks(grads[images])
            of_padded = x.new_zeros(len(x[images]), H + TILE, W + TILE, C)
            for rows in _row_groups(x):
                products = _transform(_OUTPUT.T, blocks[:, :, :, rows])
                shown = squares[:, :, :, rows]
                if of_weight_needed:
                    of_kernels.baddbmm_(products.transpose(1, 2), _transform(_INPUT, shown))
                if of_x_needed:
                    _add_squares(of_padded, rows, _transform(_INPUT.T, torch.bmm(products, kernels)).view(shown.shape))
            of_x[images] = of_padded[:, 1 : H + 1, 1 : W + 1]
        return (
            of_x.permute(0, 3, 1, 2) if of_x_needed else None,
            (_WEIGHT.T @ of_kernels.flatten(1)).T.reshape(weight.shape) if of_weight_needed else None,
            grads.sum((0, 1, 2)) if of_bias_needed else None,
        )


def _powers(number: int) -> Tensor:
    """What polynomials of so many coefficients are at the six points of the algorithm, the last being infinity.

    The points are fractions that floats hold exactly, and close to 1: with 0, 1, -1, 2, -2 errors are twice as large.
    """
    finite = torch.tensor([0, 0.75, -0.75, 1.5, -1.5], dtype=torch.float64, device="cpu")
    infinite = torch.eye(number, dtype=torch.float64, device="cpu")[-1:]
    return torch.cat([finite[:, None] ** torch.arange(number, device="cpu"), infinite])


# In one dimension y = OUTPUT [(WEIGHT w) * (INPUT x)] (equation 7), the transposed product of polynomials; squares are
# transformed along both. The nine weights are few enough to be so at once.
_INPUT = torch.linalg.inv(_powers(TILE + 2)).T.float().contiguous()
_OUTPUT = _powers(TILE).T.float().contiguous()
_WEIGHT = torch.kron(_powers(3), _powers(3)).float()


def _transform(matrix: Tensor, squares: Tensor) -> Tensor:
    """Squares (p, p, ..., C) or (p p, ..., C), by the matrix (q, p) along both sides -> (q q, n, C)."""
    q, p = matrix.shape
    both = matrix @ (matrix @ squares.reshape(p, -1)).view(q, p, -1)
    return both.view(q * q, -1, squares.shape[-1])


def _image_groups(x: Tensor) -> Iterator[slice]:
    """Images of about ``SQUARES_AT_ONCE`` squares, or single ones."""
    B, _, H, W = x.shape
    at_once = max(1, SQUARES_AT_ONCE * TILE**2 // (H * W))
    yield from (slice(first, min(first + at_once, B)) for first in range(0, B, at_once))


def _row_groups(x: Tensor) -> Iterator[slice]:
    """Rows of squares of an image, about twice ``SQUARES_AT_ONCE`` squares each."""
    _, _, H, W = x.shape
    rows, at_once = H // TILE, max(1, 2 * SQUARES_AT_ONCE * TILE // W)
    yield from (slice(first, min(first + at_once, rows)) for first in range(0, rows, at_once))


def _squares(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (6, 6, B, H / 4, W / 4, C), a view of the padded input that shows some pixels several times."""
    B, C, H, W = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    image, row, pixel, _ = padded.stride()
    sizes = (TILE + 2, TILE + 2, B, H // TILE, W // TILE, C)
    return padded.as_strided(sizes, (row, pixel, image, TILE * row, TILE * pixel, 1))


def _blocks(rows: Tensor) -> Tensor:
    """(B, H, W, C) -> (4, 4, B, H / 4, W / 4, C), a view."""
    return rows.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE)).permute(2, 4, 0, 1, 3, 5)


def _add_squares(of_padded: Tensor, rows: slice, squares: Tensor) -> None:
    """Add overlapping squares to the padded pixels (B, H + 4, W + 4, C) that they show."""
    blocks, columns = _blocks(of_padded), squares.shape[4]
    for down in (0, 1):
        for right in (0, 1):
            corner = squares[TILE * down :, TILE * right :][:TILE, :TILE]
            height, width = corner.shape[:2]
            below = slice(rows.start + down, rows.stop + down)
            blocks[:height, :width, :, below, right : columns + right] += corner


def _kernels(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) -> (36, C', C)."""
    return (_WEIGHT @ weight.flatten(2).flatten(0, 1).T).unflatten(1, weight.shape[:2])
