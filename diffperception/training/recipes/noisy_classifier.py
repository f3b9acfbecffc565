"""Training of the classifier of noisy images, which guides generators."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor

from diffperception.configuration.messages import construct
from diffperception.data.batches import spread
from diffperception.data.image_folder import ImageDataOptions, ImageFolder
from diffperception.devices import to_device
from diffperception.diffusion import add_noise
from diffperception.echo import echo
from diffperception.files import OutputFolder, write_json
from diffperception.models import NoisyClassifier
from diffperception.training.data import TrainingData
from diffperception.training.module import TrainingModule
from diffperception.training.options import OptimizerOptions
from diffperception.training.recipe import Evaluator, Metrics, Parts, Recipe, size_of
from diffperception.training.recipes.generation import Batch, held_out_batches, left_out, noise_like


@dataclass
class LabelledImageOptions(ImageDataOptions):
    """Which images the classifier learns from; the folders in `images` are the classes.

    Args:
        val_images: folder with images to measure the accuracy on, in folders of the same classes; null for none.
        labelled: always true.
    """

    labelled: bool = True

    def classes(self) -> list[str]:
        """The names of the classes; ValueError if there are fewer than two, or others in `val_images`."""
        classes = super().classes()
        if classes is None:
            raise ValueError("a classifier learns from labelled images: leave data.labelled at true")
        if len(classes) < 2:
            raise ValueError(f"{self.images} holds the class {classes[0]} alone: a classifier needs two or more")
        return classes


@dataclass
class AccuracyOptions:
    """How the accuracy on data.val_images is measured, now and then during training and at its end.

    Args:
        every: steps between measurements; null for one at the end only.
        num_images: how many images those during training use, spread over the set; null for all. The one at the end
            uses all.
        num_ranges: into how many ranges of noise the path is divided; each has its own accuracy.
        batch_size: images per pass.
    """

    every: PositiveInt | None = 1000
    num_images: PositiveInt | None = 256
    num_ranges: PositiveInt = 5
    batch_size: PositiveInt = 64


class NoisyClassifierModule(TrainingModule):
    """The step of a noisy classifier: images noised at uniform times of its path, the cross entropy of its logits."""

    model: NoisyClassifier

    def __init__(self, model: NoisyClassifier, options: OptimizerOptions, seed: int):
        super().__init__(model, options, seed)
        self.freeze_stages()

    def layers(self, stages: bool = False) -> dict[str, int]:
        return self.model.layers()

    def loss_terms(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        images, targets = batch
        places = torch.rand(len(images), generator=generator)
        logits = noised_logits(self.model, torch.stack(images), places, generator)
        return {"cross_entropy": F.cross_entropy(logits, stacked_labels(targets, self.device))}


def stacked_labels(targets: list[dict[str, Any]], device: torch.device) -> Tensor:
    """The labels (B,) of a batch on the device."""
    return to_device(torch.tensor([target["label"] for target in targets]), device)


def noised_logits(model: NoisyClassifier, images: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
    """Logits (B, K) of images (B, C, H, W), 0..1, noised at places (B,) on the path, 0..1."""
    x0 = 2 * images - 1
    t = to_device(model.schedule.from_fraction(places), x0.device)
    x_t = add_noise(model.schedule, x0, t, noise_like(x0, generator))
    return model(x_t, model.schedule.conditioning(t)).to(x0.dtype)


@torch.no_grad()
def held_out_accuracy(
    model: NoisyClassifier, dataset: ImageFolder, num_images: int | None, batch_size: int, ranges: int
) -> dict[str, float]:
    """How well images are classified that are noised once in each range of the path.

    Crops, times and noise are the same in every call.

    Args:
        dataset: labelled images.
        num_images: how many of them, spread over the set; None for all.
        ranges: into how many ranges of equal length the path is divided.

    Returns:
        ``accuracy`` over all ranges; ``accuracy_0-0.2`` and so on, of each range, named by its ends on the path
        from the clean end, 0, to noise, 1; ``held_out_loss``, the mean cross entropy.
    """
    model.eval()
    chosen = spread(len(dataset), num_images)
    generator, right, loss = torch.Generator().manual_seed(0), torch.zeros(ranges), 0.0
    for images, targets in held_out_batches(dataset, chosen, batch_size, model.device):
        labels = stacked_labels(targets, model.device)
        for k in range(ranges):
            places = (k + torch.rand(len(images), generator=generator)) / ranges
            logits = noised_logits(model, images, places, generator)
            right[k] += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    by_range = {
        f"accuracy_{k / ranges:.2g}-{(k + 1) / ranges:.2g}": float(right[k]) / len(chosen) for k in range(ranges)
    }
    return {"accuracy": float(right.mean()) / len(chosen), **by_range, "held_out_loss": loss / (len(chosen) * ranges)}


class AccuracyEvaluator(Evaluator):
    """How well images that are not learned from, if there are any, are classified at each range of noise."""

    def __init__(self, dataset: ImageFolder | None, options: AccuracyOptions):
        self.dataset, self.options, self.every = dataset, options, options.every

    def evaluate(self, averaged: NoisyClassifier, raw: Any, step: int, folder: OutputFolder | None) -> Metrics:
        return self._measure(averaged, self.options.num_images)

    def finish(self, model: NoisyClassifier, folder: OutputFolder | None) -> Metrics:
        metrics = self._measure(model, None)
        echo("\n".join(f"{name:<18}{value:.3f}" for name, value in metrics.items()))
        if folder is not None and metrics:
            write_json(folder.file("metrics.json"), {"metrics": metrics})
        return metrics

    def _measure(self, model: NoisyClassifier, num_images: int | None) -> Metrics:
        if self.dataset is None:
            return {}
        return held_out_accuracy(model, self.dataset, num_images, self.options.batch_size, self.options.num_ranges)


@dataclass
class NoisyClassifierRecipe(Recipe):
    """Train a classifier of noisy images, to guide a generator, on a folder of images in folders of their classes.

    Its path, size and channels must be those of the generator it is to guide.

    Args:
        model: the classifier's class and its arguments, all but the classes, which are the folders' names.
        data: what it learns from and is measured on.
        optimizer: how the weights are updated.
        evaluation: how its accuracy is measured.
        init: training starts from the weights in this file that fit the model by name and shape, and from new ones
            elsewhere: a classifier of any classes, or a generator, whose encoder it takes.
    """

    task = "classifier"
    example = "configs/generation/classifier_shapes.yaml"
    files: ClassVar = {
        "model.safetensors": "the trained classifier, for `diffperception sample --classifier`",
        "metrics.json": "its accuracy by ranges of noise, if there are images to measure it on",
        "pictures/": "curves.png",
    }
    lasting = ("data.labelled",)

    model: Callable[[list[str]], NoisyClassifier]
    data: LabelledImageOptions
    optimizer: OptimizerOptions = field(
        default_factory=lambda: OptimizerOptions(lr=3e-4, base_batch_size=256, weight_decay=0.05)
    )
    evaluation: AccuracyOptions = field(default_factory=AccuracyOptions)
    init: Path | None = None

    def prepare(self, seed: int) -> Parts:
        model = construct(self.model, self.data.classes())
        train, val = self.data.open(model.image_size, model.in_channels)
        return Parts(
            NoisyClassifierModule(model, self.optimizer, seed),
            TrainingData(train, self.data.batch_size, self.data.workers, seed),
            AccuracyEvaluator(val, self.evaluation),
            f"{size_of(model)} learns {len(model.classes)} classes from {len(train)} images{left_out(train, val)}",
        )
