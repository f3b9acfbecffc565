"""Feature maps of an image at their native resolutions, and what bilinear upsampling makes of them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

BAND = 64  # rows of pixels whose features are upsampled at once


@dataclass(frozen=True)
class FeatureMaps:
    """The features of one image, kept small: upsampled, they would be ``D x H x W`` numbers.

    A pixel's feature is what bilinear upsampling (align_corners=False) of each map has there, all maps in turn. They
    are (C_i, h_i, w_i) with h_i * strides[i] >= H, for the image of `size` (H, W) was padded right and below; those of
    one stride are of one size.
    """

    maps: list[Tensor]
    strides: list[int]  # in pixels
    size: tuple[int, int]

    def to(self, target: torch.device | torch.dtype) -> "FeatureMaps":
        return replace(self, maps=[m.to(target) for m in self.maps])

    def stored(self, dtype: torch.dtype, name: str) -> "FeatureMaps":
        """In another type; ValueError, naming the image, if that cannot hold one of the values."""
        extremes = torch.stack([extreme for cells in self.maps for extreme in cells.aminmax()])
        if not bool((extremes.abs() <= torch.finfo(dtype).max).all()):
            raise ValueError(f"a feature of {name} is not finite in {dtype}: store the features as float32")
        return self.to(dtype)

    def at_points(self, points: Tensor) -> Tensor:
        """(N, D) features of pixels (N, 2), int64 rows and columns; ValueError if one lies outside the image."""
        height, width = self.size
        if bool(((points < 0) | (points >= points.new_tensor(self.size))).any()):
            raise ValueError(f"the points must be rows 0 to {height - 1} and columns 0 to {width - 1} of the image")
        features = []
        for cells, stride in zip(self.maps, self.strides, strict=True):
            index, weights = taps(points[:, 0], points[:, 1], stride, *cells.shape[1:])
            features.append((cells.flatten(1)[:, index] * weights.to(cells.dtype)).sum(-1).T)  # (C, N, 4) -> (N, C)
        return torch.cat(features, 1)

    def directions(self, points: Tensor) -> Tensor:
        """(N, D) features of pixels, as :meth:`at_points`, those of each map of unit length, and all together too.

        Their products are mean cosines over the maps.
        """
        parts = self.at_points(points).split([len(cells) for cells in self.maps], 1)
        return torch.cat([F.normalize(part, dim=1) for part in parts], 1) / len(parts) ** 0.5

    def cosines(self, directions: Tensor) -> Tensor:
        """(N, H, W) mean cosines, over the maps, of every pixel's features and of N :meth:`directions`."""
        (height, width), total = self.size, 0.0
        for cells, stride, part in zip(
            self.maps, self.strides, directions.split([len(cells) for cells in self.maps], 1), strict=True
        ):
            band = BAND // stride * stride or stride
            rows = []
            for first in range(0, height, band):
                last = min(first + band, cells.shape[1] * stride)
                upsampled = upsample_rows(cells[None, :, rows_around(first, last, stride)], stride, first, last)[0]
                rows.append(torch.einsum("nc,chw->nhw", part, F.normalize(upsampled, dim=0)))
            total = total + torch.cat(rows, 1)[:, :height, :width] / len(self.maps) ** 0.5
        assert isinstance(total, Tensor)
        return total

    def cropped(self) -> "FeatureMaps":
        """Without the cells in which nothing of the image lies."""
        height, width = self.size
        return replace(
            self, maps=[m[:, : -(-height // s), : -(-width // s)] for m, s in zip(self.maps, self.strides, strict=True)]
        )

    def centred(self) -> "FeatureMaps":
        """Without what all cells of a map have in common, their mean."""
        return replace(self, maps=[m - m.mean((1, 2), keepdim=True) for m in self.maps])

    def dense(self) -> Tensor:
        """(D, H, W): every pixel's features. Rarely needed, and large."""
        height, width = self.size
        upsampled = [upsample(m[None], s)[0] for m, s in zip(self.maps, self.strides, strict=True)]
        return torch.cat([m[:, :height, :width] for m in upsampled])


def covered(maps: Sequence[Tensor], strides: Sequence[int]) -> tuple[int, int]:
    """How many rows and columns of pixels every one of some maps (..., h, w) has cells for."""
    rows, columns = (min(m.shape[axis] * stride for m, stride in zip(maps, strides, strict=True)) for axis in (-2, -1))
    return rows, columns


def by_stride(strides: Sequence[int]) -> dict[int, list[int]]:
    """Which of some maps have each stride, in ascending order."""
    return {stride: [i for i, other in enumerate(strides) if other == stride] for stride in sorted(set(strides))}


def upsample(maps: Tensor, stride: int) -> Tensor:
    """(B, C, h, w) -> (B, C, h * stride, w * stride), bilinear between the centres of cells."""
    return F.interpolate(maps, scale_factor=stride, mode="bilinear", align_corners=False)


def rows_around(first: int, last: int, stride: int) -> slice:
    """The rows of cells that pixel rows ``first`` to ``last`` - 1, multiples of the stride, depend on."""
    return slice(max(first // stride - 1, 0), last // stride + 1)


def upsample_rows(cells: Tensor, stride: int, first: int, last: int) -> Tensor:
    """Pixel rows ``first`` to ``last`` - 1 of :func:`upsample`, from the cells that :func:`rows_around` names."""
    above = stride * min(first // stride, 1)  # pixels of the row of cells before the band, where there is one
    return upsample(cells, stride)[:, :, above : above + last - first]


def taps(
    rows: Tensor, columns: Tensor, stride: int, height: Tensor | int, width: Tensor | int
) -> tuple[Tensor, Tensor]:
    """The four cells whose weighted sum is a pixel's value: (N, 4) int64, row by row, and weights (N, 4) float32.

    Args:
        rows, columns: (N,) int64 pixels.
        height, width: sides of the map in cells; numbers, or (N,) where pixels are of different images.
    """
    top, below, down = _taps(rows, stride, height)
    left, right, across = _taps(columns, stride, width)
    cells = torch.stack([top * width + left, top * width + right, below * width + left, below * width + right], -1)
    weights = torch.stack([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], -1)
    return cells, weights


def _taps(pixels: Tensor, stride: int, cells: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """The cell before and after each pixel of one axis, and how far it is between them."""
    last = torch.as_tensor(cells, device=pixels.device) - 1
    place = ((pixels + 0.5) / stride - 0.5).clamp(min=0)
    before = torch.minimum(place.floor().long(), last)
    return before, torch.minimum(before + 1, last), place - before


@dataclass(frozen=True)
class Windows:
    """Overlapping windows that cover an image, and the blending of what was computed in each.

    Height and width of the image and the overlap of neighbours are multiples of every map's stride.
    """

    height: int
    width: int
    side: int  # of a window; an image that is smaller is one window
    overlap: int

    @property
    def places(self) -> list[tuple[slice, slice]]:
        """Rows and columns of each window; the last of an axis ends where the image ends."""
        return list(product(self._along(self.height), self._along(self.width)))

    def blend(self, parts: Iterable[Sequence[Tensor]], strides: Sequence[int]) -> list[Tensor]:
        """One map of the image for each that the windows have: their mean, weighted less towards a window's borders.

        Args:
            parts: for each of :attr:`places` in turn, (C_i, h_i, w_i) maps; they are added up as they come.
            strides: pixels a cell of each map.
        """
        if self.side >= max(self.height, self.width):
            (maps,) = parts
            return list(maps)
        sums: list[tuple[Tensor, Tensor, Tensor]] = []  # of each map and of its weights, and the weights of a window
        for place, maps in zip(self.places, parts, strict=True):
            sums = sums or [self._empty(part, stride) for part, stride in zip(maps, strides, strict=True)]
            for part, stride, (total, weights, weight) in zip(maps, strides, sums, strict=True):
                rows, columns = (slice(pixels.start // stride, pixels.stop // stride) for pixels in place)
                total[:, rows, columns] += weight * part
                weights[:, rows, columns] += weight
        return [total.div_(weights) for total, weights, _ in sums]

    def _along(self, length: int) -> list[slice]:
        last = max(length - self.side, 0)
        starts = [*range(0, last, self.side - self.overlap), last]
        return [slice(start, min(start + self.side, length)) for start in starts]

    def _empty(self, part: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """Zeros for the sums of a map and of its weights; and the weights (h, w) of a window; all are of one size.

        They rise over the overlap at all sides, so that those of neighbours sum to 1.
        """
        total = part.new_zeros(len(part), self.height // stride, self.width // stride)
        step = max(self.overlap // stride, 0.5)
        rises = [(torch.arange(cells, device=part.device) + 0.5) / step for cells in part.shape[1:]]
        down, across = (torch.minimum(rise, rise.flip(0)).clamp(max=1).to(part.dtype) for rise in rises)
        return total, torch.zeros_like(total[:1]), down[:, None] * across


def padded_side(side: int, multiple: int) -> int:
    return math.ceil(side / multiple) * multiple


def pad(image: Tensor, multiple: int) -> Tensor:
    """(1, C, H, W), sides multiples: an image (C, h, w) and its last pixels, right and below."""
    below, right = (padded_side(side, multiple) - side for side in image.shape[1:])
    return F.pad(image[None], (0, right, 0, below), mode="replicate")
