"""RoIAlign over all pyramid levels and all images in one gather."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from diffperception.devices import to_device

CANONICAL_LEVEL = 4  # the level that pools a box of CANONICAL_SIZE pixels (arXiv 1612.03144, eq. 1): stride 16
CANONICAL_SIZE = 224


class FeaturePyramid:
    """Feature maps of all levels and images as one table with a row per position; images may differ in size.

    Bilinear interpolation and averaging are linear, so a pooled bin is a weighted sum of rows: `embedding_bag`. On a
    CPU this is an order of magnitude faster than torchvision's `roi_align`, forward and backward, with equal results.

    Args:
        rows: (R, C), the table.
        places: (3, B, L) int64, where each image's level begins in the table, and its height and width in cells.
        strides: pixels per cell, one per level; powers of two, each twice the one before.
    """

    def __init__(self, rows: Tensor, places: Tensor, strides: list[int]):
        self.rows, self.places, self.strides = rows, places, strides

    @classmethod
    def from_maps(
        cls, batches: Sequence[Sequence[Tensor]], strides: list[int], order: Sequence[int] | None = None
    ) -> "FeaturePyramid":
        """From one (B, C, H_l, W_l) tensor per level, finest first, of each of several batches.

        Image i is the ``order[i]``-th of all batches' images one after another; by default they stay as they are.
        """
        places, offset = [], 0
        for maps in batches:
            batch = len(maps[0])
            height, width = torch.tensor([m.shape[-2:] for m in maps]).unbind(-1)
            cells = height * width
            start = offset + (cells.cumsum(0) - cells) * batch + torch.arange(batch)[:, None] * cells
            places.append(torch.stack([x.expand(batch, -1) for x in (start, height, width)]))
            offset += sum(m[:, 0].numel() for m in maps)
        rows = torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for maps in batches for m in maps])
        joined = torch.cat(places, 1)
        return cls(rows, to_device(joined if order is None else joined[:, list(order)], rows.device), strides)

    def split(self, size: int) -> "list[FeaturePyramid]":
        """Pyramids of this many images each (fewer in the last), over the same table."""
        return [FeaturePyramid(self.rows, places, self.strides) for places in self.places.split(size, 1)]

    def maps_of(self, image: int) -> list[Tensor]:
        """The feature maps of one image, (1, C, H_l, W_l) a level."""
        parts = [(start, height, width) for start, height, width in self.places[:, image].T.tolist()]
        rows = [
            self.rows[start : start + height * width].unflatten(0, (height, width)) for start, height, width in parts
        ]
        return [level.permute(2, 0, 1)[None] for level in rows]

    def repeat(self, times: int) -> "FeaturePyramid":
        """The pyramid of the images, all of them so many times over, on the same table."""
        return FeaturePyramid(self.rows, self.places.repeat(1, times, 1), self.strides)

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Index of the level that pools each box, by its size (..., 4) -> (...)."""
        area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
        level = torch.floor(CANONICAL_LEVEL + torch.log2(area.sqrt() / CANONICAL_SIZE + 1e-8))
        # A box that is no number must not read beyond the table; what it pools is no number either.
        return (level - math.log2(self.strides[0])).clamp(0, len(self.strides) - 1).nan_to_num(0).long()

    def pool(self, boxes: Tensor, size: int, samples: int = 2) -> Tensor:
        """RoIAlign (arXiv 1703.06870), aligned to the centres of cells -> (B, N, size * size, C), bins row by row.

        Args:
            boxes: (B, N, 4) xyxy in pixels.
            size: bins per side.
            samples: points per bin and axis; cost grows with their square.
        """
        batch, count = boxes.shape[:2]
        boxes = boxes.detach().float()
        level = self.assign_levels(boxes)
        stride = self.strides[0] * 2.0**level
        x1, y1, x2, y2 = (boxes / stride[..., None] - 0.5).unbind(-1)  # a cell's value sits at its centre
        start, height, width = (x.gather(1, level) for x in self.places)
        rows, row_weights = _bilinear_taps(y1, y2, size, samples, height)
        columns, column_weights = _bilinear_taps(x1, x2, size, samples, width)
        taps = 2 * samples
        # (B, N, size, 1, taps, 1) against (B, N, 1, size, 1, taps): every pair of a row tap and a column tap
        index = (rows * width[..., None, None] + start[..., None, None])[:, :, :, None, :, None]
        index = index + columns[:, :, None, :, None, :]
        weight = row_weights[:, :, :, None, :, None] * column_weights[:, :, None, :, None, :]
        weight = weight.reshape(-1, taps * taps).to(self.rows.dtype)
        pooled = _weighted_sums(self.rows, index.reshape(-1, taps * taps), weight)
        return pooled.view(batch, count, size * size, pooled.shape[1])


class PyramidOfMaps(FeaturePyramid):
    """The same from maps (B, C, H_l, W_l) of images of one size, pooled by torchvision's operator, which ONNX knows."""

    def __init__(self, maps: Sequence[Tensor], strides: list[int]):
        self.maps, self.strides = maps, strides

    def pool(self, boxes: Tensor, size: int, samples: int = 2) -> Tensor:
        """See `FeaturePyramid.pool`."""
        batch, count = boxes.shape[:2]
        level = self.assign_levels(boxes).flatten()
        image = torch.arange(batch, device=boxes.device).repeat_interleave(count)[:, None]
        rois = torch.cat([image.to(boxes), boxes.flatten(0, 1)], 1)
        pooled = self.maps[0].new_zeros(batch * count, self.maps[0].shape[1], size, size)
        for number, (m, stride) in enumerate(zip(self.maps, self.strides, strict=True)):
            own = torch.where(level == number)[0]
            found = roi_align(m, rois[own].to(m.dtype), size, 1 / stride, samples, aligned=True)
            pooled = pooled.index_put((own,), found)
        return pooled.flatten(2).transpose(1, 2).unflatten(0, (batch, count))


def _weighted_sums(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sums of the rows (R, C) that each index (n, k) names, times their weights (n, k): (n, C)."""
    if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
        # Exported: ONNX knows no bags, and would loop over them.
        return (rows[index] * weight[..., None]).sum(1)
    return F.embedding_bag(index, rows, per_sample_weights=weight, mode="sum")


def _bilinear_taps(start: Tensor, end: Tensor, bins: int, samples: int, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Cells (int64) and their weights that interpolate and average one axis, both (B, N, bins, 2 * samples).

    Args:
        start, end: (B, N) of each box, in cells.
        cells: (B, N) length of the axis; points beyond it by more than a cell count as zero.
    """
    index = torch.arange(bins * samples, device=start.device)
    bin_size = ((end - start) / bins)[..., None]
    # Summed in torchvision's order, so that the points are the same to the last bit.
    points = start[..., None] + index // samples * bin_size + (index % samples + 0.5) * bin_size / samples
    last = cells[..., None] - 1
    inside = (points >= -1) & (points <= cells[..., None])
    points = torch.minimum(points.clamp(min=0), last)
    low = points.floor()
    fraction = points - low
    index = torch.stack([low, torch.minimum(low + 1, last)], dim=-1).nan_to_num(0).long()
    weight = torch.stack([1 - fraction, fraction], dim=-1) * inside[..., None] / samples
    shape = (*start.shape, bins, 2 * samples)
    return index.view(shape), weight.view(shape)
