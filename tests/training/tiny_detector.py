"""A detector as a user may write one: batch norm, dropout and noise, so that every kind of state and draw is there."""

import os
import signal
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception.detection import BoxSampler, Detector, DiffusionDet, DynamicHead


class TinyDetector(Detector):
    """Predicts one box an image, from the image's mean colours and noise.

    Args:
        classes: names of the classes.
        width: of the hidden layer.
        die_at: call of `loss` in which the process kills itself without a word, as a lack of memory or power would.
        raise_at: call of `loss` that raises an error.
        interrupt_at: call of `loss` in which Ctrl-C comes.
        nan_at: call of `loss` that is not finite.
    """

    def __init__(
        self,
        classes: Sequence[str],
        width: int = 8,
        die_at: int | None = None,
        raise_at: int | None = None,
        interrupt_at: int | None = None,
        nan_at: int | None = None,
    ):
        super().__init__(classes)
        self.record(die_at=None, raise_at=None, interrupt_at=None, nan_at=None)  # of a run, not of the weights
        self.die_at, self.raise_at, self.interrupt_at, self.nan_at = die_at, raise_at, interrupt_at, nan_at
        self.calls = 0
        self.hidden = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2))
        self.box = nn.Linear(width, 4)
        self.label = nn.Linear(width, len(self.classes))

    def loss(
        self, images: list[Tensor], targets: list[dict], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        self._misbehave()
        noise = torch.randn(len(images), 3, generator=generator)
        boxes, logits = self._forward(images, noise.to(self.device))
        wanted = torch.stack([_first(t["boxes"], torch.zeros(4)) for t in targets]).to(boxes) / 32
        labels = torch.stack([_first(t["labels"], torch.tensor(0)) for t in targets]).to(boxes.device)
        scale = float("nan") if self.calls == self.nan_at else 1.0
        return {"box": F.l1_loss(boxes, wanted) * scale, "label": F.cross_entropy(logits, labels)}

    @torch.no_grad()
    def predict(
        self, images: list[Tensor], seeds: Sequence[int] | None = None, sampler: BoxSampler | None = None
    ) -> list[dict[str, Tensor]]:
        seeds = [0] * len(images) if seeds is None else seeds
        noise = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        boxes, logits = self._forward(images, noise.to(self.device))
        scores, labels = logits.softmax(1).max(1)
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:].abs() + 0.1], dim=1) * 32
        return [
            {"boxes": box[None], "scores": score[None], "labels": label[None]}
            for box, score, label in zip(corners, scores, labels, strict=True)
        ]

    def _forward(self, images: list[Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        colours = torch.stack([image.to(self.device).mean((1, 2)) for image in images])
        hidden = self.hidden(torch.cat([colours, noise], dim=1))
        return self.box(hidden), self.label(hidden)

    def _misbehave(self) -> None:
        self.calls += 1
        if self.calls == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == self.raise_at:
            raise ValueError("this detector raises an error here")
        if self.calls == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)


def _first(values: Tensor, otherwise: Tensor) -> Tensor:
    return values[0] if len(values) else otherwise


class PowerCut(BaseException):
    """Ends the program where it stands, for all that the program can tell."""


class UnpluggedDetector(TinyDetector):
    """Ends with PowerCut where its parent would kill the process."""

    def _misbehave(self) -> None:
        self.calls += 1
        if self.calls == self.die_at:
            raise PowerCut


class UnpluggedDiffusionDet(DiffusionDet):
    """A small DiffusionDet that ends with PowerCut in call `die_at` of `loss`."""

    def __init__(self, classes: Sequence[str], die_at: int | None = None):
        super().__init__(
            classes,
            "resnet10t",
            partial(DynamicHead, stages=2, width=16, dynamic_width=8, ffn_width=16, num_heads=2),
            strides=(4, 8),
            fpn_norm=True,
            num_boxes=6,
            min_size=None,
        )
        self.record(die_at=None)
        self.die_at = die_at
        self.calls = 0

    def loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.die_at:
            raise PowerCut
        return super().loss(*args, **kwargs)
