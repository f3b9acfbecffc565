"""The base of all training steps: loss, seeds, optimiser and learning rate, as a LightningModule."""

import json
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from diffperception.models.base import describe
from diffperception.training.options import OptimizerOptions

ARGUMENTS = "model_arguments"  # in a checkpoint, as JSON


class NonFiniteLossError(ValueError):
    """The loss is infinite or no number: the weights must not be updated with it, nor saved again."""


class Task(LightningModule, ABC):
    """One step of training a model, and its optimiser.

    All randomness of a step is a function of (seed, rank, batch index), so a resumed run draws what the uninterrupted
    one would have drawn.

    Args:
        model: what is trained.
        options: of the optimiser.
        seed: of the run.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, options: OptimizerOptions, seed: int):
        super().__init__()
        self.model = model
        self.options = options
        self.seed = seed
        self.terms: dict[str, Tensor] = {}  # of the last batch's loss

    @abstractmethod
    def loss_terms(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """0-d tensors whose sum is the loss of the batch; all its noise comes from the generator, one of the CPU."""

    @abstractmethod
    def describe(self, batch: Any) -> str:
        """The samples of a batch, for the complaint that their loss is not finite, and what could be wrong there."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of one batch, a 0-d tensor."""
        seed = batch_seed(self.seed, self.global_rank, batch_idx)
        torch.manual_seed(seed)  # dropout and whatever else a user's model draws
        terms = self.loss_terms(batch, torch.Generator().manual_seed(seed))
        loss = torch.stack(list(terms.values())).sum()
        self.terms = {name: value.detach() for name, value in terms.items()}
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} {value:.4g}" for name, value in self.terms.items())
            raise NonFiniteLossError(
                f"the loss is not finite in step {self.global_step + 1} ({values}): lower optimizer.lr, raise"
                f" optimizer.warmup_steps, or look at {self.describe(batch)}"
            )
        return loss

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

    def on_train_start(self) -> None:
        """Take rates and decay from the options; a resumed run has those of its checkpoint, which may differ."""
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        groups = self._groups()
        config.scheduler.base_lrs = [group["lr"] for group in groups]
        factor = self.options.lr_factor(self.trainer.global_step, self.trainer.max_steps)
        for old, new in zip(optimizer.param_groups, groups, strict=True):
            old |= {"lr": new["lr"] * factor, "initial_lr": new["lr"], "weight_decay": new["weight_decay"]}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the weights belong to, for a resumed run to compare."""
        checkpoint[ARGUMENTS] = json.dumps(describe(self.model)["arguments"])

    def lr_scale(self, name: str) -> float:
        """What the learning rate of the model's parameter of this name is multiplied by."""
        return 1.0

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters in groups of one learning rate and one decay: vectors, such as biases, have none."""
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                decayed = parameter.ndim > 1 and not name.endswith("relative_position_bias_table")
                groups.setdefault((self.lr_scale(name), decayed), []).append(parameter)
        decay = float(self.options.weight_decay)  # as jsonargparse gives it no checkpoint could be loaded safely
        return [
            {"params": parameters, "lr": self.lr * scale, "weight_decay": decay if decayed else 0.0}
            for (scale, decayed), parameters in groups.items()
        ]


def batch_seed(seed: int, rank: int, batch_idx: int) -> int:
    """The seed of a batch's randomness in one process, a function of the three numbers alone."""
    return int(np.random.SeedSequence([seed, rank, batch_idx]).generate_state(1, np.uint64)[0] >> 1)
