"""Training of a detector."""

from typing import Any

import torch
from torch import Tensor

from diffperception.detection import Detector
from diffperception.models import Backbone
from diffperception.training.module import Task
from diffperception.training.options import OptimizerOptions

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class DetectionTask(Task):
    """The step of a detector: its own loss, and a learning rate of its own for the backbone."""

    model: Detector

    def __init__(self, model: Detector, options: OptimizerOptions, seed: int):
        super().__init__(model, options, seed)
        self.backbones = [name + "." for name, module in model.named_modules() if isinstance(module, Backbone)]

    def loss_terms(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        images, targets = batch
        return self.model.loss(images, targets, generator=generator)

    def describe(self, batch: Batch) -> str:
        ids = ", ".join(str(target["image_id"]) for target in batch[1])
        return f"the boxes of the images with ids {ids} with `diffperception check`"

    def lr_scale(self, name: str) -> float:
        return self.options.backbone_lr_factor if name.startswith(tuple(self.backbones)) else 1.0
