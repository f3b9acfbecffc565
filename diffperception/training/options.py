"""What a user can set about training, whatever is trained."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

LoggerName = Literal["csv", "tensorboard", "wandb"]


@dataclass
class OptimizerOptions:
    """How the weights are updated: AdamW with warm-up, clipping and an average of the weights.

    Args:
        lr: learning rate for a batch of `base_batch_size` images.
        base_batch_size: the learning rate is multiplied by (images per step, over all processes) / this.
        backbone_lr_factor: the learning rate of the backbone is this times the others'; below 1 for pretrained ones.
        layer_decay: the learning rate of each layer of the backbone, or of the diffusion network, is this times that of
            the next one towards the output (0.65 to 0.9 where it is pretrained); 1 for one rate for all.
        frozen_stages: so many of its first stages are not trained, statistics of their norms included: 1 is the stem,
            2 the stem and the first stage, all the whole of it; of a diffusion network each block is one.
        weight_decay: decay of matrices and kernels; biases and normalisation have none.
        warmup_steps: steps over which the learning rate rises from a hundredth to its value.
        schedule: after the warm-up, cosine goes down to zero, steps drops tenfold at `milestones`, constant stays.
        milestones: where the schedule `steps` drops, as fractions of all steps.
        grad_clip_norm: the gradient is scaled down to this norm; null leaves it.
        ema_decay: what is evaluated and saved is the exponential moving average of the weights with this decay
            (smaller in the first steps); null takes the weights themselves.
    """

    lr: NonNegativeFloat = 2.5e-5
    base_batch_size: PositiveInt = 16
    backbone_lr_factor: NonNegativeFloat = 1.0
    layer_decay: PositiveFloat = 1.0
    frozen_stages: NonNegativeInt | Literal["all"] = 0
    weight_decay: NonNegativeFloat = 1e-4
    warmup_steps: NonNegativeInt = 1000
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.78, 0.93)
    grad_clip_norm: PositiveFloat | None = 1.0
    ema_decay: ClosedUnitInterval | None = 0.999

    def lr_factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at `step` of `steps`."""
        if step < self.warmup_steps:
            return 0.01 + 0.99 * step / self.warmup_steps
        if self.schedule == "cosine":
            progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
            return (1 + math.cos(math.pi * min(1.0, progress))) / 2
        if self.schedule == "steps":
            return 0.1 ** sum(step >= milestone * steps for milestone in self.milestones)
        return 1.0


@dataclass
class TrainerOptions:
    """How long training takes, what it runs on and how often it reports.

    Args:
        max_steps: updates of the weights until the end.
        max_minutes: training ends after these minutes even if steps remain; null for no limit.
        accumulate: the gradients of this many batches are added up before each update.
        precision: 32-true; bf16-mixed for less memory and time on recent GPUs; 16-mixed on GPUs without fast bf16.
        accelerator: cpu, gpu or auto.
        devices: processes on this machine, one for each GPU; auto takes every GPU, or what torchrun started.
        num_nodes: number of machines; torchrun says it by itself.
        strategy: Lightning's name of how processes share the work, such as ddp; auto is ddp for several.
        sync_batchnorm: batch norm takes its statistics over all processes.
        deterministic: only operations that repeat their result bit for bit are used; they are slower on a GPU.
        benchmark: cuDNN tries which algorithm is fastest for each size of images; good where all have one size.
        compile: the networks are compiled with torch.compile, which takes minutes at the start.
        logger: where numbers go: csv (metrics.csv), tensorboard (tensorboard/), wandb (Weights & Biases).
        log_every: steps between rows of numbers.
        checkpoint_every: steps between writings of last.ckpt, from which `--resume` goes on.
    """

    max_steps: PositiveInt = 10000
    max_minutes: NonNegativeFloat | None = None
    accumulate: PositiveInt = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: str = "auto"
    devices: PositiveInt | Literal["auto"] = "auto"
    num_nodes: PositiveInt = 1
    strategy: str = "auto"
    sync_batchnorm: bool = False
    deterministic: bool = False
    benchmark: bool = False
    compile: bool = False
    logger: LoggerName | list[LoggerName] = field(default_factory=lambda: ["csv", "tensorboard"])
    log_every: PositiveInt = 20
    checkpoint_every: PositiveInt = 500


@dataclass
class RunOptions:
    """Where a run goes and how it is carried out.

    Args:
        output: the folder for everything that the run writes.
        trainer: how long, on what, and how often it reports.
        seed: seed of the weights, the order of samples, their changes and the noise.
        resume: go on from last.ckpt in the output folder, or begin if there is none.
        overwrite: replace the run that the output folder holds.
    """

    output: Path | None = None
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    seed: NonNegativeInt = 0
    resume: bool = False
    overwrite: bool = False
