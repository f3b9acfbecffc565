"""Training of the classifier of noisy images, which guides generators."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffperception.data.batches import SeededSamples
from diffperception.data.image_folder import ImageFolder
from diffperception.diffusion import add_noise
from diffperception.models import NoisyClassifier
from diffperception.training.module import Task
from diffperception.training.recipes.generation import Batch, ImageDataOptions, time_at, to_signal


@dataclass
class LabelledImageOptions(ImageDataOptions):
    """Which images the classifier learns from; the folders in `images` are the classes.

    Args:
        val_images: folder with pictures to measure the accuracy on, in folders of the same classes; null for none.
        labelled: always true.
    """

    labelled: bool = True

    def classes(self) -> list[str]:
        """The names of the classes; ValueError if there are fewer than two, or others in `val_images`."""
        classes = super().classes()
        if classes is None:
            raise ValueError("a classifier learns from labelled pictures: leave data.labelled at true")
        if len(classes) < 2:
            raise ValueError(f"{self.images} holds the class {classes[0]} alone: a classifier needs two or more")
        return classes


class ClassificationTask(Task):
    """The step of a noisy classifier: images noised at uniform times of its path, and the cross entropy of its logits.

    Attributes:
        model: what is trained.
    """

    model: NoisyClassifier

    def loss_terms(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        x0, labels = to_signal(batch, self.device)
        logits = noised_logits(self.model, x0, torch.rand(len(x0), generator=generator), generator)
        assert labels is not None
        return {"cross_entropy": F.cross_entropy(logits, labels)}

    def describe(self, batch: Batch) -> str:
        return "the pictures " + ", ".join(target["path"] for target in batch[1])


def noised_logits(model: NoisyClassifier, x0: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
    """Logits (B, K) of images (B, C, H, W), -1..1, noised at places (B,) on the path, 0..1."""
    t = time_at(model.schedule, places).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    return model(add_noise(model.schedule, x0, t, noise), model.schedule.conditioning(t)).to(x0.dtype)


@torch.no_grad()
def held_out_accuracy(
    model: NoisyClassifier, dataset: ImageFolder, images: int | None, batch_size: int, ranges: int
) -> dict[str, float]:
    """How well images are classified that are noised once in each range of the path.

    Crops, times and noise are the same in every call.

    Args:
        dataset: labelled images.
        images: how many of them, spread over the set; None for all.
        ranges: into how many ranges of equal length the path is divided.

    Returns:
        ``accuracy`` over all ranges; ``accuracy_0.0-0.2`` and so on, of each range, named by its ends on the path
        from the clean end, 0, to noise, 1; ``held_out_loss``, the mean cross entropy.
    """
    model.eval()
    count = min(images or len(dataset), len(dataset))
    samples, generator = SeededSamples(dataset), torch.Generator().manual_seed(0)
    right, loss = torch.zeros(ranges), 0.0
    for start in range(0, count, batch_size):
        chosen = [i * len(dataset) // count for i in range(start, min(start + batch_size, count))]
        pictures, targets = zip(*(samples[i, i] for i in chosen), strict=True)
        x0, labels = to_signal((list(pictures), list(targets)), model.stem.weight.device)
        assert labels is not None
        for k in range(ranges):
            places = (k + torch.rand(len(x0), generator=generator)) / ranges
            logits = noised_logits(model, x0, places, generator)
            right[k] += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    by_range = {f"accuracy_{k / ranges:.2g}-{(k + 1) / ranges:.2g}": float(right[k]) / count for k in range(ranges)}
    return {"accuracy": float(right.mean()) / count, **by_range, "held_out_loss": loss / (count * ranges)}
