"""The dynamic head of DiffusionDet (arXiv 2211.09788; stages after Sparse R-CNN, arXiv 2011.12450)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from diffperception.detection.boxes import apply_deltas
from diffperception.models import Model
from diffperception.models.ops.convolution import is_eager_cpu
from diffperception.models.ops.pooling import FeaturePyramid

CPU_PROPOSALS = 320  # most proposals whose dynamic weights exist at one time on a CPU
PRIOR_PROBABILITY = 0.01  # of an object at initialisation, so that the focal loss starts small (arXiv 1708.02002)


@dataclass
class HeadOutput:
    """What a head says of proposals, at S stages; a step of sampling has the last alone, without that axis.

    Yours may derive from it and add tensors with the same leading axes: they pass through sampling and the selection
    of detections, and are in the predictions by their names.

    Attributes:
        logits: (S, B, N, K) of the classes.
        boxes: (S, B, N, 4) xyxy in pixels.
    """

    logits: Tensor
    boxes: Tensor

    @classmethod
    def last_stage(cls, outputs: "Sequence[HeadOutput]") -> "HeadOutput":
        """The last stage, of several batches as of one, (B, N, ...), in float32."""
        last = {name: torch.cat([vars(output)[name][-1] for output in outputs]) for name in vars(outputs[0])}
        return type(outputs[0])(**{name: x.float() if x.is_floating_point() else x for name, x in last.items()})


class Head(Model, ABC):
    """From a pyramid and noisy boxes to classes and better boxes; yours may derive from it.

    Attributes:
        width: channels of the pyramid that it wants.
        gives_masks: whether what `finish` gives has `masks` (n, H, W), bool or 0..1.
    """

    width: int
    gives_masks: bool = False

    @abstractmethod
    def forward(self, pyramid: FeaturePyramid, boxes: Tensor, t: Tensor, last_only: bool = False) -> HeadOutput:
        """Classify and refine noisy boxes (B, N, 4; xyxy pixels), each image's of a diffusion time t (B,).

        With `last_only` the result has the last stage alone (S = 1), as prediction needs no other.
        """

    def terms(self) -> dict[str, Any]:
        """By name, the further terms (`Term`) that a SetCriterion must have for all of the head to learn."""
        return {}

    def revisit(
        self, detections: list[dict[str, Tensor]], pyramid: FeaturePyramid, seen: Tensor, sizes: Tensor
    ) -> list[dict[str, Tensor]]:
        """The detections that are left of each image, with what a second look at its features adds; by default nothing.

        Boxes are in pixels of the images, whose sizes, and those in which the pyramid sees them, are (B, 4): width,
        height, width, height. `finish` comes after it.
        """
        return detections

    def finish(self, detections: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
        """The detections of an image of this size, boxes in its pixels, with what the head added as users want it."""
        return detections


class DynamicHead(Head):
    """A series of stages, each refining the boxes of the one before.

    Args:
        num_classes: K.
        stages: S.
        width: d, channels of the pyramid and of a proposal's feature.
        pool_size: bins per side of RoIAlign.
        pool_samples: points per bin and axis of RoIAlign, which are averaged; 1 trains a little faster.
        dynamic_width: inner channels of the dynamic convolution.
        ffn_width: inner channels of the feed-forward network.
        num_heads: heads of the self-attention over proposals.
        box_layers: depth of the box tower.
    """

    class_layers: ClassVar = {"stages.*.class_logits": 0}

    def __init__(
        self,
        num_classes: int,
        stages: int = 6,
        width: int = 256,
        pool_size: int = 7,
        pool_samples: int = 2,
        dynamic_width: int = 64,
        ffn_width: int = 2048,
        num_heads: int = 8,
        box_layers: int = 3,
    ):
        super().__init__()
        if stages < 1:
            raise ValueError(f"stages is {stages}: a head has one at least")
        if num_heads < 1 or width % num_heads:
            raise ValueError(
                f"the head's width is {width}, but it must be a multiple of num_heads, which is {num_heads}"
            )
        self.width = width
        self.time_embedding = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 4 * width))
        self.stages = nn.ModuleList(
            HeadStage(num_classes, width, pool_size, pool_samples, dynamic_width, ffn_width, num_heads, box_layers)
            for _ in range(stages)
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, pyramid: FeaturePyramid, boxes: Tensor, t: Tensor, last_only: bool = False) -> HeadOutput:
        """See `Head.forward`. With `last_only` no other stage classifies."""
        return HeadOutput(*map(torch.stack, self.refine(pyramid, boxes, t, last_only)[:2]))

    def refine(
        self, pyramid: FeaturePyramid, boxes: Tensor, t: Tensor, last_only: bool = False
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits (B, N, K), boxes (B, N, 4) and features (B, N, d) of each stage, or of the last; see `forward`."""
        time = self.time_embedding(sinusoidal_embedding(t, self.width).to(next(self.parameters()).dtype))
        features, shown = None, []
        for stage in self.stages:
            show = not last_only or stage is self.stages[-1]
            logits, boxes, features = stage(pyramid, boxes.detach(), features, time, show)
            shown += [(logits, boxes, features)] if show else []
        of_stages = zip(*shown, strict=True)
        return list(next(of_stages)), list(next(of_stages)), list(next(of_stages))


class HeadStage(nn.Module):
    """Self-attention between proposals, dynamic convolution with each one's RoI, then a class and a box tower."""

    def __init__(
        self,
        num_classes: int,
        width: int,
        pool_size: int,
        pool_samples: int,
        dynamic_width: int,
        ffn_width: int,
        num_heads: int,
        box_layers: int,
    ):
        super().__init__()
        self.pool_size = pool_size
        self.pool_samples = pool_samples
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(width)
        self.interaction = DynamicConv(width, dynamic_width, pool_size**2)
        self.interaction_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_width), nn.ReLU(inplace=True), nn.Linear(ffn_width, width))
        self.ffn_norm = nn.LayerNorm(width)
        self.time_modulation = nn.Sequential(nn.SiLU(), nn.Linear(4 * width, 2 * width))
        self.class_tower = _tower(width, 1)
        self.box_tower = _tower(width, box_layers)
        self.class_logits = nn.Linear(width, num_classes)
        self.box_deltas = nn.Linear(width, 4)
        nn.init.constant_(self.class_logits.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        nn.init.zeros_(self.box_deltas.bias)

    def forward(
        self, pyramid: FeaturePyramid, boxes: Tensor, features: Tensor | None, time: Tensor, classify: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """boxes (B, N, 4), features (B, N, d) or None at the first stage, time (B, 4d) -> logits, boxes, features."""
        rois = pyramid.pool(boxes, self.pool_size, self.pool_samples)  # (B, N, P, d)
        if features is None:
            features = rois.mean(2)
        attended = self.attention(features, features, features, need_weights=False)[0]
        features = self.attention_norm(features + attended)
        features = self.interaction_norm(features + self.interaction(features, rois))
        features = self.ffn_norm(features + self.ffn(features))

        # The time modulates what the towers see, not what the next stage receives.
        scale, shift = self.time_modulation(time)[:, None].chunk(2, dim=-1)
        modulated = features * (1 + scale) + shift
        logits = self.class_logits(self.class_tower(modulated)) if classify else modulated
        with torch.autocast(boxes.device.type, enabled=False):  # pixels need more than bfloat16's 8 bits
            deltas = self.box_deltas(self.box_tower(modulated.to(self.box_deltas.weight.dtype)))
            return logits, apply_deltas(deltas.float(), boxes.float()), features


class DynamicConv(nn.Module):
    """Two 1x1 convolutions over a RoI whose weights come from its proposal's feature."""

    def __init__(self, width: int, dynamic_width: int, positions: int):
        super().__init__()
        self.generate = nn.Linear(width, 2 * width * dynamic_width)
        self.norm1 = nn.LayerNorm(dynamic_width)
        self.norm2 = nn.LayerNorm(width)
        self.out = nn.Linear(width * positions, width)
        self.out_norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """features (B, N, d), rois (B, N, P, d) -> (B, N, d).

        The weights of one proposal take 2 * d * dynamic_width numbers. On a CPU, a chunk of proposals at a time, and
        one of the two convolutions at a time, keeps them in the cache: 20 % faster.
        """
        flat = features.flatten(0, 1), rois.flatten(0, 1)
        count = math.ceil(len(flat[0]) / CPU_PROPOSALS) if is_eager_cpu(features) else 1
        chunks = zip(*(x.chunk(count) for x in flat), strict=True) if count > 1 else [flat]
        interacted = torch.cat([self.out(self._convolve(f, x).flatten(1)) for f, x in chunks])
        return F.relu(self.out_norm(interacted.view(features.shape)))

    def _convolve(self, features: Tensor, rois: Tensor) -> Tensor:
        """features (n, d), rois (n, P, d) -> (n, P, d)."""
        first, second = zip(self.generate.weight.chunk(2), self.generate.bias.chunk(2), strict=True)
        x = F.relu(self.norm1(_dynamic_product(rois, features, *first)), inplace=True)
        return F.relu(self.norm2(_dynamic_product(x, features, *second)), inplace=True)


def _dynamic_product(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (n, P, k) times one matrix (k, m) each, which a linear layer makes of features (n, d): (n, P, m)."""
    return torch.bmm(x, F.linear(features, weight, bias).view(x.shape[0], x.shape[-1], -1))


def sinusoidal_embedding(t: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of t at width / 2 frequencies from 1 to 1/10000 (arXiv 1706.03762). (B,) -> (B, width)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / (half - 1)))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _tower(width: int, layers: int) -> nn.Sequential:
    blocks = ((nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU(inplace=True)) for _ in range(layers))
    return nn.Sequential(*(module for block in blocks for module in block))
