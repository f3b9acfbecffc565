"""Training of a detector as a LightningModule."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from diffperception.detection import Detector
from diffperception.models import TimmBackbone
from diffperception.tasks.options import OptimizerOptions


class NonFiniteLossError(ValueError):
    """The loss is infinite or no number: the weights must not be updated with it, nor saved again."""


class DetectionTask(LightningModule):
    """One step of training a detector, and its optimiser.

    All randomness of a step is a function of (seed, rank, batch index), so a resumed run draws what the uninterrupted
    one would have drawn.

    Args:
        detector: what is trained.
        options: of the optimiser.
        seed: of the run.
    """

    def __init__(self, detector: Detector, options: OptimizerOptions, seed: int):
        super().__init__()
        self.detector = detector
        self.options = options
        self.seed = seed
        self.terms: dict[str, Tensor] = {}  # of the last batch's loss

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Any]]], batch_idx: int) -> Tensor:
        """The loss of one batch of images and targets, a 0-d tensor."""
        images, targets = batch
        seed = batch_seed(self.seed, self.global_rank, batch_idx)
        torch.manual_seed(seed)  # dropout and whatever else a user's model draws
        terms = self.detector.loss(images, targets, generator=torch.Generator().manual_seed(seed))
        loss = torch.stack(list(terms.values())).sum()
        self.terms = {name: value.detach() for name, value in terms.items()}
        if not torch.isfinite(loss):
            raise NonFiniteLossError(self._complaint([target["image_id"] for target in targets]))
        return loss

    def _complaint(self, image_ids: Sequence[int]) -> str:
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.terms.items())
        return (
            f"the loss is not finite in step {self.global_step + 1} ({values}) for the images with ids"
            f" {', '.join(map(str, image_ids))}: lower optimizer.lr, raise optimizer.warmup_steps, or look at"
            " their boxes with `diffperception check`"
        )

    @property
    def images_per_step(self) -> int:
        """How many images an update of the weights sees, over all processes."""
        trainer = self.trainer
        return trainer.datamodule.batch_size * trainer.accumulate_grad_batches * trainer.world_size  # type: ignore[attr-defined]

    @property
    def lr(self) -> float:
        """The learning rate for the real number of images a step, after the warm-up."""
        return self.options.lr * self.images_per_step / self.options.base_batch_size

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, its learning rate set anew for every step."""
        optimizer = torch.optim.AdamW(self._groups(), lr=self.lr)
        rates = LambdaLR(optimizer, lambda step: self.options.lr_factor(step, self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters in up to four groups: of a timm backbone or not, decayed or not."""
        backbones = [module for module in self.detector.modules() if isinstance(module, TimmBackbone)]
        of_backbone = {id(parameter) for module in backbones for parameter in module.parameters()}
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for parameter in self.detector.parameters():
            if parameter.requires_grad:
                groups.setdefault((id(parameter) in of_backbone, parameter.ndim > 1), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": self.lr * (self.options.backbone_lr_factor if in_backbone else 1.0),
                "weight_decay": self.options.weight_decay if decayed else 0.0,
            }
            for (in_backbone, decayed), parameters in groups.items()
        ]


def batch_seed(seed: int, rank: int, batch_idx: int) -> int:
    """The seed of a batch's randomness in one process, a function of the three numbers alone."""
    return int(np.random.SeedSequence([seed, rank, batch_idx]).generate_state(1, np.uint64)[0] >> 1)
