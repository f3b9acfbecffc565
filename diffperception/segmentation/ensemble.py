"""An ensemble of pixel classifiers on feature maps (arXiv 2112.03126), without ever upsampling the features."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffperception.data.masks import IGNORE_INDEX
from diffperception.models import Model
from diffperception.models.convert.ddpm_segmentation import read_members
from diffperception.segmentation.maps import FeatureMaps, by_stride, covered, rows_around, upsample_rows
from diffperception.segmentation.mlp import PixelMLPs, hidden_widths

CPU_BAND_PIXELS = 2**13  # at once through the layers after the first: small enough for the processor's cache
ACCELERATOR_BAND_PIXELS = 2**18  # large enough that the arithmetic takes longer than asking for it
FINE_STRIDE = 2  # maps up to this stride go through the first layer in bands, not whole: their sums would be large


@dataclass(frozen=True)
class Segmentation:
    """What the members make of an image (H, W); (h, w) is the size that the classifiers worked at.

    Args:
        labels: (H, W) int64, the class with most votes, the lowest of several.
        uncertainty: (H, W) float32, entropy of the mean minus mean entropy of the members' probabilities, in nats.
        votes: (K, h, w) uint8, members for each class.
        probabilities: (K, h, w) float32, mean over the members; None where not asked for.
    """

    labels: Tensor
    uncertainty: Tensor
    votes: Tensor
    probabilities: Tensor | None = None

    @property
    def score(self) -> float:
        """How uncertain the image is: the mean of the most uncertain tenth of its pixels, of one at least."""
        values = self.uncertainty.flatten()
        return float(values.topk(max(1, len(values) // 10)).values.mean())

    def resized(self, height: int, width: int) -> "Segmentation":
        """Labels and uncertainty for the image at another size: interpolated, and the labels follow the votes.

        Votes and probabilities stay as they are; at a photograph's full size they would take gigabytes.
        """
        if self.labels.shape == (height, width):
            return self
        most = resize(self.votes[0], height, width)
        labels = torch.zeros_like(most, dtype=torch.int64)
        for label in range(1, len(self.votes)):
            votes = resize(self.votes[label], height, width)
            labels.masked_fill_(votes > most, label)
            most = torch.maximum(most, votes)
        return replace(self, labels=labels, uncertainty=resize(self.uncertainty, height, width))


def resize(values: Tensor, height: int, width: int) -> Tensor:
    """(h, w) -> (height, width) float32, bilinear."""
    return F.interpolate(values[None, None].float(), (height, width), mode="bilinear")[0, 0]


class PixelEnsemble(Model):
    """Members that classify pixels by their features, trained and applied together.

    Bilinear upsampling is linear and acts on each channel alone, so the first linear layer commutes with it: it is
    applied at the maps' native resolutions, and its few outputs are upsampled instead of the many features.

    Args:
        channels: D, the features of a pixel.
        num_classes: K, 2 to 255, else ValueError.
        members: M, 1 to 255, else ValueError.

    Attributes:
        band_pixels: how many pixels go at once through the layers after the first; None for what suits the device.
    """

    class_layers: ClassVar = {"mlps.layers.6": 1}  # after the axis of the members

    def __init__(self, channels: int, num_classes: int, members: int = 10) -> None:
        super().__init__()
        if not 1 <= members <= torch.iinfo(torch.uint8).max:  # votes are counted in bytes
            raise ValueError(f"there must be 1 to 255 members, not {members}")
        if not 2 <= num_classes <= IGNORE_INDEX:
            raise ValueError(f"there must be 2 to {IGNORE_INDEX} classes, not {num_classes}")
        self.channels, self.num_classes, self.members = channels, num_classes, members
        self.band_pixels: int | None = None
        self.mlps = PixelMLPs(members, channels, num_classes).eval()

    @classmethod
    def from_reference(cls, paths: Sequence[str | Path]) -> "PixelEnsemble":
        """The ensemble of ddpm-segmentation's files, one per member, in evaluation mode. Nothing in a file is run.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file holds something else, or members differ.
        """
        channels, num_classes, state = read_members(paths)
        width, known = state["layers.0.weight"].shape[1], hidden_widths(num_classes)[0]
        if width != known:
            raise ValueError(
                f"{paths[0]} has {num_classes} classes and a first layer {width} wide; the reference makes it {known}"
                " wide for so many classes"
            )
        with torch.device("meta"):
            ensemble = cls(channels, num_classes, len(paths))
        ensemble.mlps.load_state_dict(state, assign=True)
        return ensemble.eval()

    @torch.no_grad()
    def segment(self, maps: FeatureMaps, probabilities: bool = False) -> Segmentation:
        """Labels, uncertainty and votes of an image's pixels, and the classes' probabilities where asked for."""
        weight = self.mlps.linears[0].weight
        labels = torch.empty(maps.size, dtype=torch.int64, device=weight.device)
        uncertainty = torch.empty_like(labels, dtype=weight.dtype)
        votes = labels.new_empty(self.num_classes, *maps.size, dtype=torch.uint8)
        mean = torch.empty_like(votes, dtype=weight.dtype) if probabilities else None
        bottom = 0
        for logits in self._bands(maps):
            rows = slice(bottom, bottom := bottom + logits.shape[1])
            labels[rows], uncertainty[rows], band_mean, band_votes = combine_members(logits)
            votes[:, rows] = band_votes.permute(2, 0, 1)
            if mean is not None:
                mean[:, rows] = band_mean.permute(2, 0, 1)
        return Segmentation(labels, uncertainty, votes, mean)

    @torch.no_grad()
    def logits(self, maps: FeatureMaps) -> Tensor:
        """(M, K, H, W) of every member."""
        return torch.cat(list(self._bands(maps)), 1).permute(0, 3, 1, 2)

    def _bands(self, maps: FeatureMaps) -> Iterator[Tensor]:
        """The members' logits (M, rows, W, K) of one band of the image after the other."""
        if (channels := sum(len(m) for m in maps.maps)) != self.channels:
            raise ValueError(
                f"this classifier takes {self.channels} features a pixel, but the extractor gives {channels}: use the"
                " blocks and timesteps that it was built for"
            )
        height, width = maps.size
        (weight, bias), (weight2, bias2), (weight3, bias3) = self.mlps.folded()
        grouped = _joined(maps.to(weight.dtype).to(weight.device), weight)
        whole = {s: _first_layer(cells, w) for s, (cells, w) in grouped.items() if s > FINE_STRIDE}
        step = math.lcm(*maps.strides)
        down, across = covered(maps.maps, maps.strides)  # the same for all, or the images' alone
        pixels = self.band_pixels or (CPU_BAND_PIXELS if weight.device.type == "cpu" else ACCELERATOR_BAND_PIXELS)
        rows = step * max(1, pixels // (step * width))
        for top in range(0, height, rows):
            bottom = min(top + rows, -(-height // step) * step)
            bands = []
            for stride, (cells, w) in grouped.items():
                around = rows_around(top, bottom, stride)
                native = whole[stride][around] if stride in whole else _first_layer(cells[:, around], w)
                bands.append((native, stride))
            logits = []
            for m in range(self.members):  # one by one: what a member makes of a band stays in the processor's cache
                parts = (upsample_rows(native[:, :, m].permute(2, 0, 1)[None], s, top, bottom) for native, s in bands)
                shared = (part[:, :, : down - top, :across] for part in parts)
                first = reduce(Tensor.add_, shared)[0].permute(1, 2, 0)  # (rows, W, hidden)
                second = F.linear((first + bias[m]).relu_(), weight2[m], bias2[m])
                logits.append(F.linear(second.relu_(), weight3[m], bias3[m]))
            yield torch.stack(logits)[:, : height - top, :width]


def _joined(maps: FeatureMaps, weight: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Maps of equal stride joined, (C, h, w), with their part of the first layer, (M, hidden, C)."""
    parts = weight.split([len(m) for m in maps.maps], 2)
    return {
        stride: (torch.cat([maps.maps[i] for i in group]), torch.cat([parts[i] for i in group], 2))
        for stride, group in by_stride(maps.strides).items()
    }


def _first_layer(cells: Tensor, weight: Tensor) -> Tensor:
    """(C, h, w) cells and (M, hidden, C) weights -> (h, w, M, hidden)."""
    outputs = cells.flatten(1).T @ weight.flatten(0, 1).T
    return outputs.view(*cells.shape[1:], *weight.shape[:2])


def combine_members(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(M, rows, W, K) -> labels and uncertainty (rows, W), mean probabilities and votes (rows, W, K)."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(0)
    uncertainty = torch.special.entr(mean).sum(-1) + (p * log_p).sum(-1).mean(0)
    choices = logits.argmax(-1).movedim(0, -1)  # (rows, W, M)
    votes = torch.zeros_like(mean, dtype=torch.int64).scatter_add_(-1, choices, torch.ones_like(choices))
    return votes.argmax(-1), uncertainty.clamp(min=0), mean, votes
