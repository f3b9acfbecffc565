"""What a user can set about training, besides the model."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jsonargparse import lazy_instance
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from diffperception.data import CocoDetection
from diffperception.data.batches import repeat_factors
from diffperception.data.transforms import TrainingTransforms
from diffperception.detection.inference import Protocol


@dataclass
class DataOptions:
    """Which images the detector learns from and is scored on: two COCO data sets with the same categories.

    Args:
        train_annotations: COCO JSON file to learn from; number and names of the classes come from it.
        train_images: the folder that its file names are relative to.
        val_annotations: COCO JSON file to be scored on.
        val_images: the folder that its file names are relative to.
        transforms: random changes of training images; any callable (image, target) -> (image, target), such as
            torchvision's v2 transforms.
        batch_size: images in a training batch, for each process.
        workers: processes that read images, for each process that trains.
        on_broken: what to do at an image that cannot be read: stop, naming it, or skip it with a warning; the score
            says how many images were left out.
        repeat_threshold: images with a class that is in a smaller share f of the images than this are shown
            sqrt(repeat_threshold / f) times an epoch (LVIS: 0.001); null shows each once.
    """

    train_annotations: Path
    train_images: Path
    val_annotations: Path
    val_images: Path
    transforms: Callable = field(default_factory=lambda: lazy_instance(TrainingTransforms))
    batch_size: PositiveInt = 16
    workers: NonNegativeInt = 4
    on_broken: Literal["stop", "skip"] = "stop"
    repeat_threshold: NonNegativeFloat | None = None

    def open(self) -> tuple[CocoDetection, CocoDetection]:
        """The data sets for training and for scoring; ValueError if their categories differ."""
        train = CocoDetection(self.train_annotations, self.train_images, self.transforms, self.on_broken)
        val = CocoDetection(self.val_annotations, self.val_images, on_broken=self.on_broken)
        if not len(train.boxes):
            raise ValueError(f"{self.train_annotations} holds no box with area: there is nothing to learn")
        if train.classes != val.classes:
            raise ValueError(
                f"{self.train_annotations} and {self.val_annotations} list different categories: label numbers would"
                " mean different things, so give both files the same list"
            )
        return train, val

    def repeats(self, train: CocoDetection) -> np.ndarray | None:
        """How often an epoch shows each image of the training set, on average; None for once."""
        if self.repeat_threshold is None:
            return None
        return repeat_factors(train.labels_of_images(), len(train.classes), self.repeat_threshold)


@dataclass
class OptimizerOptions:
    """How the weights are updated: AdamW with warm-up, clipping and an average of the weights.

    Args:
        lr: learning rate for a batch of `base_batch_size` images.
        base_batch_size: the learning rate is multiplied by (images a step, over all processes) / this.
        backbone_lr_factor: the learning rate of the backbone is this times the others'; below 1 for pretrained ones.
        weight_decay: of matrices and kernels; biases and normalisation have none.
        warmup_steps: steps over which the learning rate rises from a hundredth to its value.
        schedule: after the warm-up: cosine down to zero, tenfold drops at `drops`, or constant.
        drops: where the schedule `steps` drops, as fractions of all steps.
        clip_norm: the gradient is scaled down to this norm; null leaves it.
        ema_decay: what is evaluated and saved is the exponential moving average of the weights with this decay
            (smaller in the first steps); null takes the weights themselves.
    """

    lr: NonNegativeFloat = 2.5e-5
    base_batch_size: PositiveInt = 16
    backbone_lr_factor: NonNegativeFloat = 1.0
    weight_decay: NonNegativeFloat = 1e-4
    warmup_steps: NonNegativeInt = 1000
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    drops: tuple[float, ...] = (0.78, 0.93)
    clip_norm: PositiveFloat | None = 1.0
    ema_decay: ClosedUnitInterval | None = 0.999

    def lr_factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at `step` of `steps`."""
        if step < self.warmup_steps:
            return 0.01 + 0.99 * step / self.warmup_steps
        if self.schedule == "cosine":
            progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
            return (1 + math.cos(math.pi * min(1.0, progress))) / 2
        if self.schedule == "steps":
            return 0.1 ** sum(step >= drop * steps for drop in self.drops)
        return 1.0


@dataclass
class TrainerOptions:
    """How long training takes, what it runs on and how often it reports.

    Args:
        max_steps: updates of the weights until the end.
        max_minutes: end after these minutes even if steps remain; null for no limit.
        accumulate: add up the gradients of this many batches before each update.
        precision: 32-true, or bf16-mixed for less memory and time on recent GPUs.
        accelerator: cpu, gpu or auto.
        devices: processes on this machine, one for each GPU; auto takes every GPU, or what torchrun started.
        num_nodes: machines; torchrun says it by itself.
        strategy: Lightning's name of how processes share the work; auto is ddp for several.
        log_every: steps between rows of metrics.csv.
        checkpoint_every: steps between writings of last.ckpt, from which `--resume` goes on.
    """

    max_steps: PositiveInt = 10000
    max_minutes: NonNegativeFloat | None = None
    accumulate: PositiveInt = 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: str = "auto"
    devices: PositiveInt | Literal["auto"] = "auto"
    num_nodes: PositiveInt = 1
    strategy: str = "auto"
    log_every: PositiveInt = 20
    checkpoint_every: PositiveInt = 500


@dataclass
class EvaluationOptions:
    """How the detector is scored, now and then during training and at its end.

    Args:
        every: steps between evaluations during training; null for one at the end only.
        images: how many images the evaluations during training use, spread over the set; null for all. The one at the
            end uses all.
        batch_size: images in one prediction, a process. AP does not depend on it.
        max_dets: how many detections count in an image, the best first; null for the protocol's number: 100 of each
            class (coco), 300 of all (lvis).
        protocol: coco, or lvis for annotation files of LVIS; it needs the extra `lvis`.
        pictures: how many images are drawn with predictions beside ground truth.
    """

    every: PositiveInt | None = 1000
    images: PositiveInt | None = None
    batch_size: PositiveInt = 8
    max_dets: PositiveInt | None = None
    protocol: Protocol = "coco"
    pictures: NonNegativeInt = 8
