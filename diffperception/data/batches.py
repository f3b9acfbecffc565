"""Which samples a training step sees, as a function of the seed and the step alone; and how often rare ones come."""

from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

Seeded = tuple[int, int]  # index of a sample, seed of its random transforms


@dataclass(eq=False)
class StepBatchSampler(Sampler[list[Seeded]]):
    """Batches of an endless stream of shuffled epochs; each item is `(index, seed)`, as `SeededSamples` takes them.

    The batch of step k is a function of (seed, k, rank, world_size), so that training resumes at any step. The batches
    of all ranks, one after another, are the single batch of one process with batch size `batch_size * world_size`.
    Within an epoch no sample comes twice, on whatever rank, unless its weight asks for it.

    Args:
        samples: how many samples there are, or a weight for each: sample i comes weights[i] times per epoch on average,
            rounded up or down at random each epoch (repeat-factor sampling, LVIS, arXiv 1908.03195); 0 leaves it out.
    """

    samples: InitVar[int | Sequence[float] | np.ndarray]
    batch_size: int  # per process
    total_steps: int  # the last step is total_steps - 1
    seed: int = 0
    rank: int = 0  # of this process, 0..world_size-1
    world_size: int = 1
    start_step: int = 0  # the first that is yielded

    def __post_init__(self, samples: int | Sequence[float] | np.ndarray) -> None:
        weights = np.ones(samples) if isinstance(samples, int) else np.asarray(samples, dtype=np.float64)
        if weights.sum() <= 0 or weights.min() < 0:
            raise ValueError("there is nothing to draw batches from: the data set is empty or no weight is positive")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        self.epoch_length = max(1, round(weights.sum()))
        self.weights = weights * (self.epoch_length / weights.sum())
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[list[Seeded]]:
        for step in range(self.start_step, self.total_steps):
            yield self.batch(step)

    def batch(self, step: int) -> list[Seeded]:
        """What this rank sees at `step`."""
        first = (step * self.world_size + self.rank) * self.batch_size
        return [self._sample(position) for position in range(first, first + self.batch_size)]

    def _sample(self, position: int) -> Seeded:
        epoch, offset = divmod(position, self.epoch_length)
        if epoch != self._epoch[0]:
            self._epoch = (epoch, self._shuffled(epoch))
        seed = np.random.SeedSequence((self.seed, 1, position)).generate_state(1)
        return int(self._epoch[1][offset]), int(seed[0])

    def _shuffled(self, epoch: int) -> np.ndarray:
        """(epoch_length,) the indices of an epoch.

        Systematic sampling over a random order: index i fills a stretch of length weights[i] on a line, and is taken
        once for every whole number (shifted at random) in it. All epochs thus have the same length.
        """
        rng = np.random.default_rng((self.seed, 0, epoch))
        order = rng.permutation(len(self.weights))
        ends = np.floor(np.cumsum(self.weights[order]) + rng.uniform()).astype(np.int64)
        ends[-1] = self.epoch_length
        return rng.permutation(order.repeat(np.diff(ends, prepend=0)))


def images_per_class(labels: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """(K,) in how many images each class occurs; `labels` are those of each image's objects."""
    occurring = [np.unique(of_image) for of_image in labels]
    return np.bincount(np.concatenate([np.empty(0, np.int64), *occurring]), minlength=num_classes)


def repeat_factors(labels: Sequence[np.ndarray], num_classes: int, threshold: float) -> np.ndarray:
    """How often an epoch shows each image, on average, so that rare classes are seen more (LVIS, arXiv 1908.03195).

    A class in a fraction f of the images asks for max(1, sqrt(threshold / f)); an image is shown as often as the rarest
    of its classes asks for, and once if it has none.

    Args:
        labels: labels of each image's objects, in 0..num_classes-1.
        threshold: classes in a smaller fraction of the images than this are repeated; in 0..1, else ValueError.

    Returns: (images,) weights for `StepBatchSampler`.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"repeat_threshold is {threshold}: it is a fraction of the images, above 0 and at most 1")
    fractions = images_per_class(labels, num_classes).clip(min=1) / len(labels)
    factors = np.maximum(1, np.sqrt(threshold / fractions))
    return np.array([factors[of_image].max(initial=1.0) for of_image in labels])


def spread(total: int, wanted: int | None) -> list[int]:
    """`wanted` of the indices 0..total-1, evenly spread; all if None."""
    count = total if wanted is None else min(total, wanted)
    return [i * total // count for i in range(count)]


class SeededSamples(Dataset[Any]):
    """A data set indexed by `(index, seed)`: torch's random draws inside `dataset[index]` are a function of the seed.

    A sample is then the same in whatever worker process it is made, and in whatever order.
    """

    def __init__(self, dataset: Dataset[Any]):
        self.dataset = dataset

    def __getitem__(self, item: Seeded) -> Any:
        index, seed = item
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the accelerators, which fork_rng does not restore here.
            torch.default_generator.manual_seed(seed)
            return self.dataset[index]


def collate(samples: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """A batch: the list of images, which differ in size, and the list of targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
