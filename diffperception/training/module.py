"""The base of all training steps: loss, seeds, optimiser and learning rate, as a LightningModule."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from diffperception.diffusion.noise import derive_seed
from diffperception.models.base import describe
from diffperception.models.ops.transfer import to_device
from diffperception.training.options import OptimizerOptions

ARGUMENTS = "model_arguments"  # in a checkpoint, as JSON


class NonFiniteLossError(ValueError):
    """The loss is infinite or no number: the weights must not be updated with it, nor saved again."""


@dataclass
class NotedLoss:
    """The loss of one batch.

    Attributes:
        step: that it is a part of, from 1 on.
        terms: (n,) terms whose sum it is, on the model's device.
        source: the samples of the batch, and what could be wrong there.
    """

    step: int
    terms: Tensor
    source: str


class TrainingModule(LightningModule, ABC):
    """One step of training a model, and its optimiser.

    All randomness of a step is a function of (seed, rank, batch index), so a resumed run draws what the uninterrupted
    one would have drawn.

    A module that sets `automatic_optimization` to False makes its updates in a `training_step` of its own, one per
    batch, which calls `seed_batch` and `note`; its optimisers are what `configure_optimizers` gives.

    Args:
        model: what is trained.
        options: of the optimiser.
        seed: of the run.

    Attributes:
        term_names: of the terms of the loss.
        noted: losses of the batches since the last row of numbers.
        max_steps: updates until the end, where not the user's options say how many; None where they do.
    """

    model: nn.Module
    max_steps: int | None = None

    def __init__(self, model: nn.Module, options: OptimizerOptions, seed: int):
        super().__init__()
        self.model = model
        self.options = options
        self.seed = seed
        self.term_names: list[str] = []
        self.noted: list[NotedLoss] = []

    @abstractmethod
    def loss_terms(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """0-d tensors whose sum is the loss of the batch; all its noise comes from the generator, one of the CPU."""

    @abstractmethod
    def describe(self, batch: Any) -> str:
        """The samples of a batch, for the complaint that their loss is not finite, and what could be wrong there."""

    def compile_networks(self) -> None:
        """Compile what takes the time, in place; names of weights stay as they are."""
        self.model.compile()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Images go to the device, while what is said of them stays on the CPU, where losses collate it."""
        images, targets = batch
        return [to_device(image, device) for image in images], targets

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The loss of one batch, a 0-d tensor."""
        return self.note(self.loss_terms(batch, self.seed_batch(batch_idx)), batch)

    def seed_batch(self, batch_idx: int) -> torch.Generator:
        """The generator of a batch's noise, on the CPU; torch's global ones are seeded alike."""
        seed = derive_seed(self.seed, self.global_rank, batch_idx)
        torch.manual_seed(seed)  # dropout and whatever else a user's model draws
        return torch.Generator().manual_seed(seed)

    def note(self, terms: dict[str, Tensor], batch: Any) -> Tensor:
        """Keep a batch's loss for the next row of numbers; returns the sum of its terms.

        Raises:
            NonFiniteLossError: on a CPU. An accelerator would have to be waited for: there `require_finite` looks at
                all losses that were noted, before they are reported and before a checkpoint is written.
        """
        self.term_names = list(terms)
        values = torch.stack(list(terms.values()))
        self.noted.append(NotedLoss(self.global_step + 1, values.detach(), self.describe(batch)))
        if values.device.type == "cpu":
            self.require_finite(last=1)
        return values.sum()

    def require_finite(self, last: int = 0) -> None:
        """NonFiniteLossError, naming the samples, if one of the last noted losses is infinite or no number; 0: all."""
        losses = self.noted[-last:]
        finite = torch.stack([loss.terms for loss in losses]).sum(1).isfinite().tolist() if losses else []
        if all(finite):
            return
        wrong = losses[finite.index(False)]
        values = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.term_names, wrong.terms.tolist(), strict=True))
        raise NonFiniteLossError(
            f"the loss is not finite in step {wrong.step} ({values}): lower optimizer.lr, raise"
            f" optimizer.warmup_steps, or look at {wrong.source}"
        )

    @property
    def ema_decay(self) -> float | None:
        """Of the average of the weights; None where none is kept."""
        return self.options.ema_decay

    @property
    def grad_clip_norm(self) -> float | None:
        """What Lightning scales gradients down to; None for modules that update by themselves."""
        return self.options.grad_clip_norm if self.automatic_optimization else None

    @property
    def images_per_step(self) -> int:
        """How many images an update of the weights sees, over all processes."""
        trainer = self.trainer
        return trainer.datamodule.batch_size * trainer.accumulate_grad_batches * trainer.world_size  # type: ignore[attr-defined]

    @property
    def lr(self) -> float:
        """The learning rate for the real number of images per step, after the warm-up."""
        return self.options.lr * self.images_per_step / self.options.base_batch_size

    def rate_in_words(self) -> str:
        """How the learning rate follows from the options."""
        return (
            f"{self.images_per_step} images per step, so the learning rate is {self.options.lr:g} x"
            f" {self.images_per_step} / {self.options.base_batch_size} = {self.lr:g}"
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, its learning rate set anew for every step."""
        # Lightning clips no gradients of a fused optimiser that unscales them itself.
        fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(self._groups(), lr=self.lr, fused=fused or None)
        rates = LambdaLR(optimizer, lambda step: self.options.lr_factor(step, self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def on_train_start(self) -> None:
        """Take rates and decay from the options; a resumed run has those of its checkpoint, which may differ."""
        if not self.trainer.lr_scheduler_configs:
            return
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
