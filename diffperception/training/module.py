"""The base of all training steps: loss, seeds, optimiser and learning rate, as a LightningModule."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from diffperception.devices import to_device
from diffperception.diffusion.noise import derive_seed
from diffperception.models.base import describe
from diffperception.models.warm_start import WarmStart, warm_start

ARGUMENTS = "model_arguments"  # in a checkpoint, as JSON
CONTENTS = "contents"  # in a checkpoint, as JSON: numbers of what is learned from


class NonFiniteLossError(ValueError):
    """The loss is infinite or no number: the weights must not be updated with it, nor saved again."""


class NotedLoss(NamedTuple):
    """The loss of one batch: its step, from 1 on; its terms (n,), on the model's device; and where a fault may be."""

    step: int
    terms: Tensor
    source: str


class TrainingModule(LightningModule):
    """One step of training a model, and its optimiser. A task says what the loss is, see `loss_terms`.

    All randomness of a step is a function of (seed, rank, batch index), so a resumed run draws what the uninterrupted
    one would have drawn.

    A module that sets `automatic_optimization` to False makes its updates in a `training_step` of its own, one per
    batch, which calls `seed_batch` and `note`; its optimisers are what `configure_optimizers` gives.

    Args:
        model: what is trained.
        options: `OptimizerOptions`; or others with an `ema_decay`, by a module that overrides what reads the rest.
        seed: seed of the run.
    """

    model: nn.Module
    options: Any
    max_steps: int | None = None  # updates until the end, where the module and not the user's options say how many
    remedy = "lower optimizer.lr, raise optimizer.warmup_steps"  # where a loss is not finite

    def __init__(self, model: nn.Module, options: Any, seed: int):
        super().__init__()
        self.model, self.options, self.seed = model, options, seed
        self.frozen: list[nn.Module] = []  # parts that stay in evaluation mode, so that their statistics do not change
        self.contents: dict[str, str] = {}  # of what is learned from, as a checkpoint keeps it
        self.term_names: list[str] = []
        self.noted: list[NotedLoss] = []  # since the last row of numbers

    def start_from(self, path: Path) -> WarmStart:
        """Give the model the weights of a file that fit it, before it is trained; errors as of `warm_start`."""
        return warm_start(self.model, path)

    def layers(self, stages: bool = False) -> dict[str, int]:
        """The layer, or stage, of each parameter of what may have been trained before, by its name in the model.

        They are numbered from the images on, from 0 on. By default there is no such part.
        """
        return {}

    def freeze_stages(self) -> None:
        """Exempt what `OptimizerOptions.frozen_stages` says from training; ValueError if there are not so many stages.

        Constructors of modules that have `layers` call it.
        """
        wanted = self.options.frozen_stages
        if not wanted:
            return
        numbers = self.layers(stages=True)
        count = 1 + max(numbers.values(), default=-1)
        if not count or (wanted != "all" and wanted > count):
            raise ValueError(
                f"optimizer.frozen_stages is {wanted}, but this {type(self.model).__name__} has {count or 'no'} stages"
                " to freeze: give fewer"
            )
        for name, number in numbers.items():
            if wanted == "all" or number < wanted:
                self.model.get_parameter(name).requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(f"optimizer.frozen_stages {wanted} leaves nothing to train: give fewer")
        self.frozen = [m for m in self.model.modules() if _is_frozen(m)]

    def on_train_batch_start(self, *_: Any) -> None:
        for module in self.frozen:
            module.eval()

    def loss_terms(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """0-d tensors whose sum is the loss of the batch; all its noise comes from the generator, one of the CPU."""
        raise NotImplementedError

    def describe(self, batch: Any) -> str:
        """Where to look if the loss of a batch is not finite: by default at the files that its targets name."""
        return "the images " + ", ".join(target["path"] for target in batch[1])

    def compile_networks(self) -> None:
        """Compile what takes the time, in place; names of weights stay as they are."""
        self.model.compile()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Tensors go to the device, but targets, which are dictionaries, stay on the CPU, where losses collate them."""
        if isinstance(batch, Tensor):
            return to_device(batch, device)
        if isinstance(batch, list | tuple):
            return type(batch)(self.transfer_batch_to_device(part, device, dataloader_idx) for part in batch)
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.note(self.loss_terms(batch, self.seed_batch(batch_idx)), batch)

    def seed_batch(self, batch_idx: int) -> torch.Generator:
        """The generator of a batch's noise, on the CPU; torch's global ones are seeded alike."""
        seed = derive_seed(self.seed, self.global_rank, batch_idx)
        torch.manual_seed(seed)  # dropout and whatever else a user's model draws
        return torch.Generator().manual_seed(seed)

    def note(self, terms: dict[str, Tensor], batch: Any) -> Tensor:
        """Keep a batch's loss for the next row of numbers; returns the sum of its terms.

        On a CPU the loss must be finite. An accelerator would have to be waited for: there `require_finite` looks at
        all losses that were noted, before they are reported and before a checkpoint is written.
        """
        self.term_names = list(terms)
        values = torch.stack(list(terms.values()))
        self.noted.append(NotedLoss(self.global_step + 1, values.detach(), self.describe(batch)))
        if values.device.type == "cpu":
            self.require_finite(last=1)
        return values.sum()

    def require_finite(self, last: int = 0) -> None:
        """NonFiniteLossError, naming the samples, if one of the last noted losses (0: of all) is not finite."""
        losses = self.noted[-last:]
        finite = torch.stack([loss.terms for loss in losses]).sum(1).isfinite().tolist() if losses else []
        if all(finite):
            return
        wrong = losses[finite.index(False)]
        values = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.term_names, wrong.terms.tolist(), strict=True))
        raise NonFiniteLossError(
            f"the loss is not finite in step {wrong.step} ({values}): {self.remedy}, or look at {wrong.source}"
        )

    @property
    def grad_clip_norm(self) -> float | None:
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
        said = (
            f"{self.images_per_step} images per step, so the learning rate is {self.options.lr:g} x"
            f" {self.images_per_step} / {self.options.base_batch_size} = {self.lr:g}"
        )
        if self.options.layer_decay != 1:
            scales = [self.lr_scale(name) for name in self._layers]
            said += f"; {min(scales):.2g} to {max(scales):.2g} of that in layers from the images on"
        if self.frozen:
            frozen = sum(p.numel() for p in self.model.parameters() if not p.requires_grad)
            said += f"; {frozen / 1e6:.2f} M parameters are frozen, with the statistics of their norms"
        return said

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, its learning rate set anew for every step."""
        # Under autocast Lightning clips no gradients of a fused optimiser, which might unscale them itself.
        fused = self.device.type in ("cpu", "cuda") and "mixed" not in str(self.trainer.precision)
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.lr, fused=fused or None)
        rates = LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def on_train_start(self) -> None:
        """Take rates and decay from the options; a resumed run has those of its checkpoint, which may differ."""
        if not self.trainer.lr_scheduler_configs:
            return
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        groups = self.parameter_groups()
        config.scheduler.base_lrs = [group["lr"] for group in groups]
        factor = self.lr_factor(self.trainer.global_step)
        for old, new in zip(optimizer.param_groups, groups, strict=True):
            old |= {"lr": new["lr"] * factor, "initial_lr": new["lr"], "weight_decay": new["weight_decay"]}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the weights belong to, for a resumed run to compare."""
        checkpoint[ARGUMENTS] = json.dumps(describe(self.model)["arguments"])
        checkpoint[CONTENTS] = json.dumps(self.contents)

    def lr_factor(self, step: int) -> float:
        """What all learning rates are multiplied by at a step."""
        return self.options.lr_factor(step, self.trainer.max_steps)

    def lr_scale(self, name: str) -> float:
        """What the learning rate of the model's parameter of this name is multiplied by."""
        decay = float(self.options.layer_decay)
        numbers = {} if decay == 1 else self._layers
        if decay != 1 and max(numbers.values(), default=0) == 0:
            raise ValueError(
                f"optimizer.layer_decay is {decay:g}, but this {type(self.model).__name__} has no layers to tell apart:"
                " leave it at 1"
            )
        return decay ** (1 + max(numbers.values()) - numbers[name]) if name in numbers else 1.0

    @cached_property
    def _layers(self) -> dict[str, int]:
        return self.layers()

    def parameter_groups(self) -> list[dict[str, Any]]:
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


def _is_frozen(module: nn.Module) -> bool:
    """Whether it has parameters, and none of them is trained."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
