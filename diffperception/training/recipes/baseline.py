"""Training of a UNet from scratch on the labels alone: what pixel classifiers on learned features should beat."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from diffperception.data.masks import MaskDataOptions
from diffperception.diffusion.noise import derive_seed
from diffperception.models import DiffusionModel, UNet
from diffperception.models.generator import load_generator
from diffperception.segmentation.baseline import masked_cross_entropy, predict_labels, random_crop, segmentation_unet
from diffperception.training.data import TrainingData
from diffperception.training.recipe import Parts, Recipe, size_of
from diffperception.training.recipes.segmentation import FitModule, SegmentationEvaluator

WARMUP = 0.05  # fraction of the steps in which the learning rate rises; then it falls along a half cosine


@dataclass
class BaselineOptions:
    """How the UNet learns: AdamW.

    Args:
        steps: updates of the weights.
        batch_size: crops per update and process.
        crop: side of the crops in pixels, a multiple of the UNet's stride; mirrored both ways at random.
        lr: the highest learning rate.
        weight_decay: decay of all weights.
        ema_decay: what is evaluated and saved is the exponential moving average of the weights with this decay; null
            takes the weights themselves.
    """

    steps: PositiveInt = 400
    batch_size: PositiveInt = 8
    crop: PositiveInt = 64
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 1e-2
    ema_decay: float | None = None


class CropBatches(TrainingData):
    """Random crops of labelled images: images (B, 3, side, side) and labels (B, side, side)."""

    def __init__(self, images: Sequence[Tensor], masks: Sequence[Tensor], options: BaselineOptions, seed: int) -> None:
        super().__init__(None, options.batch_size, 0, seed)
        self.images, self.masks, self.side = images, masks, options.crop

    def batches(
        self, start: int, stop: int, rank: int, world_size: int, pin_memory: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, rank) if rank else self.seed)
        for step in range(stop):
            chosen = torch.randint(len(self.images), (self.batch_size,), generator=generator).tolist()
            crops = [random_crop(self.images[i], self.masks[i], self.side, generator) for i in chosen]
            if step >= start:
                images, labels = zip(*crops, strict=True)
                yield torch.stack(images), torch.stack(labels).long()


class BaselineModule(FitModule):
    """The step of a UNet that tells the classes of pixels by cross entropy; its time is always 0."""

    model: UNet
    options: BaselineOptions
    samples = "crops per step"

    def __init__(self, model: UNet, options: BaselineOptions, seed: int) -> None:
        super().__init__(model, options, seed)
        model.check_size(options.crop, options.crop)
        self.max_steps = options.steps

    def lr_factor(self, step: int) -> float:
        warmup = max(1, round(WARMUP * self.options.steps))
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / self.options.steps)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        decay = float(self.options.weight_decay)
        return [{"params": list(self.model.parameters()), "lr": self.lr, "weight_decay": decay}]

    def loss_terms(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        images, labels = batch
        logits = self.model(2 * images - 1, torch.zeros(len(images), device=images.device)).float()
        return {"cross_entropy": masked_cross_entropy(logits, labels)}


@dataclass
class BaselineRecipe(Recipe):
    """Train a UNet from scratch on a few images with masks, and measure it on others.

    It is as large as a generator, so that their worth can be compared; the generator's weights are not used.

    Args:
        generator: the model.safetensors file of the generator, or of a UNet, that it is as large as; or such a model.
        data: what is learned from, and measured on.
        fit: how it learns.
    """

    task = "baseline"
    files: ClassVar = {
        "model.safetensors": "the UNet, for `diffperception.segmentation.baseline.predict_labels`",
        "metrics.json": "IoU on the images measured on, if there are any",
    }
    lasting = ("fit.batch_size", "fit.steps", "data.classes")

    generator: DiffusionModel | UNet | str | Path
    data: MaskDataOptions
    fit: BaselineOptions = field(default_factory=BaselineOptions)

    def prepare(self, seed: int) -> Parts:
        train_set, val_set = self.data.open(seed), self.data.open_val()
        unet = segmentation_unet(load_generator(self.generator).network, len(self.data.classes))
        return Parts(
            BaselineModule(unet, self.fit, seed),
            CropBatches(list(train_set.images), list(train_set.masks), self.fit, seed),
            SegmentationEvaluator(train_set, val_set, self.data.classes, self._predict),
            f"{size_of(unet)} learns {len(self.data.classes)} classes from {len(train_set)} images",
            [*train_set.notes, *(val_set.notes if val_set else [])],
        )

    def _predict(self, unet: UNet, image: Tensor, size: tuple[int, int]) -> Tensor:
        return predict_labels(unet, self.data.resized(image), size)
