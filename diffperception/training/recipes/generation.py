"""Training of a generator of images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from diffperception.data.batches import SeededSamples
from diffperception.data.image_folder import ImageFolder, class_folders
from diffperception.diffusion import (
    DiscreteSchedule,
    LossSecondMoment,
    Schedule,
    TimeSampler,
    UniformTimes,
)
from diffperception.models.generator import DiffusionModel
from diffperception.training.module import Task
from diffperception.training.options import OptimizerOptions

Batch = tuple[list[Tensor], list[dict[str, Any]]]


@dataclass
class ImageDataOptions:
    """Which images the generator learns from.

    Args:
        images: folder with pictures, in folders of their classes if `labelled`.
        annotations: COCO JSON file; only the pictures it lists are used.
        val_images: folder with pictures to measure the loss on during training; null for none.
        val_annotations: COCO JSON file with the pictures to use of `val_images`.
        short_side: pictures are first resized to this short side, then a random part is cut out; null resizes them
            until they are as small as holds the part.
        labelled: the folders in `images` are the classes; the model must have as many.
        horizontal_flip: share of images mirrored left to right.
        vertical_flip: share of images mirrored top to bottom; for scenes without an up and a down.
        batch_size: images in a training batch, for each process.
        workers: processes that read pictures, for each process that trains.
        on_broken: what to do at a picture that cannot be read or is too small: stop, naming it, or take the next one.
        cached: how many pictures each worker keeps in memory, resized.
    """

    images: Path
    annotations: Path | None = None
    val_images: Path | None = None
    val_annotations: Path | None = None
    short_side: PositiveInt | None = None
    labelled: bool = False
    horizontal_flip: ClosedUnitInterval = 0.5
    vertical_flip: ClosedUnitInterval = 0.0
    batch_size: PositiveInt = 32
    workers: NonNegativeInt = 2
    on_broken: Literal["stop", "skip"] = "stop"
    cached: NonNegativeInt = 0

    def classes(self) -> list[str] | None:
        """The names of the classes, None without labels."""
        return class_folders(self.images) if self.labelled else None

    def open(self, image_size: tuple[int, int], channels: int) -> tuple[ImageFolder, ImageFolder | None]:
        """The images to learn from, and those to measure on; ValueError if their folders are of other classes."""

        def folder(images: Path, annotations: Path | None) -> ImageFolder:
            return ImageFolder(
                images,
                image_size,
                self.short_side,
                annotations,
                self.labelled,
                channels,
                self.horizontal_flip,
                self.vertical_flip,
                self.on_broken,
                self.cached,
            )

        train = folder(self.images, self.annotations)
        val = None if self.val_images is None else folder(self.val_images, self.val_annotations)
        if val is not None and val.classes != train.classes:
            raise ValueError(
                f"{self.images} and {self.val_images} hold folders of different names: they are the classes, so give"
                " both the same"
            )
        return train, val


@dataclass
class ObjectiveOptions:
    """What the generator learns at which times.

    Args:
        times: uniform, or loss_second_moment: in proportion to how large their losses have been, which quiets the
            gradients of a learned variance (arXiv 2102.09672).
        min_snr: weigh the loss of x0 by the signal-to-noise ratio, at most this (arXiv 2303.09556; 5 there); null
            weighs the loss of the prediction by 1.
        label_dropout: share of images whose label is replaced by the absent one, for classifier-free guidance; the
            model needs an absent label.
    """

    times: Literal["uniform", "loss_second_moment"] = "uniform"
    min_snr: PositiveFloat | None = None
    label_dropout: ClosedUnitInterval = 0.0

    def sampler(self, model: DiffusionModel) -> TimeSampler:
        """What draws the times of a batch; ValueError if the model's path does not have such times."""
        if isinstance(model.schedule, DiscreteSchedule):
            kind = UniformTimes if self.times == "uniform" else LossSecondMoment
            return kind(model.schedule.num_timesteps)
        if self.times != "uniform":
            raise ValueError("objective.times loss_second_moment needs a schedule of discrete steps: take uniform")
        return UniformTimes()


class GenerationTask(Task):
    """The step of a generator: noised images, and the loss of what the network makes of them.

    Args:
        objective: what is learned.
    """

    model: DiffusionModel

    def __init__(
        self,
        model: DiffusionModel,
        options: OptimizerOptions,
        seed: int,
        objective: ObjectiveOptions = ObjectiveOptions(),  # noqa: B008 (not changed)
    ):
        super().__init__(model, options, seed)
        if objective.label_dropout and not model.absent_label:
            raise ValueError("objective.label_dropout needs model.absent_label: true, and a label more in the UNet")
        self.times = objective.sampler(model)
        self.objective = model.objective(objective.min_snr)
        self.label_dropout = objective.label_dropout

    def loss_terms(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        x0, labels = to_signal(batch, self.device)
        if labels is not None and self.label_dropout:
            dropped = torch.rand(len(labels), generator=generator) < self.label_dropout
            labels = torch.where(dropped.to(labels.device), self.model.absent, labels)
        t, weights = (x.to(x0.device) for x in self.times.sample(len(x0), generator))
        losses = noised_losses(self.model, self.objective, x0, labels, t, generator)
        self._learn_times(t, losses)
        return {name: (weights * values).mean() for name, values in losses.items()}

    @torch.no_grad()
    def _learn_times(self, t: Tensor, losses: dict[str, Tensor]) -> None:
        """Tell the sampler of times what all processes have found."""
        total = torch.stack(list(losses.values())).sum(0)
        if dist.is_initialized() and isinstance(self.times, LossSecondMoment):
            t, total = (self.all_gather(values).flatten() for values in (t, total))  # type: ignore[union-attr]
        self.times.update(t, total)

    def describe(self, batch: Batch) -> str:
        return "the pictures " + ", ".join(target["path"] for target in batch[1])


def to_signal(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Images (0..1) and targets as x0 (B, C, H, W), -1..1, and labels (B,), if there are any."""
    images, targets = batch
    x0 = torch.stack(images).to(device) * 2 - 1
    labels = [target["label"] for target in targets]
    return x0, None if labels[0] is None else torch.tensor(labels, device=device)


def noised_losses(
    model: DiffusionModel, objective: Any, x0: Tensor, labels: Tensor | None, t: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """The terms of each image's loss, (B,), with noise from a generator of the CPU."""
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    return objective(lambda x, time: model.unet(x, time, labels), x0, t, noise)


def time_at(schedule: Schedule, places: Tensor) -> Tensor:
    """The times (B,) of places (B,) on a path, from 0, its clean end, to 1, excluded."""
    return (places * schedule.num_timesteps).long() if isinstance(schedule, DiscreteSchedule) else places


@torch.no_grad()
def held_out_loss(model: DiffusionModel, dataset: ImageFolder, images: int, batch_size: int) -> float:
    """The mean loss over images and evenly spaced times, with the same crops, noise and times in every call."""
    model.eval()
    objective, samples = model.objective(), SeededSamples(dataset)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for start in range(0, images, batch_size):
        chosen = range(start, min(start + batch_size, images))
        pictures, targets = zip(*(samples[i % len(dataset), i] for i in chosen), strict=True)
        x0, labels = to_signal((list(pictures), list(targets)), model.device)
        t = time_at(model.schedule, (torch.tensor(chosen, device=x0.device) + 0.5) / images)
        losses = noised_losses(model, objective, x0, labels, t, generator)
        total += float(torch.stack(list(losses.values())).sum())
    return total / images
