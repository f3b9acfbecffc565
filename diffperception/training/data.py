"""Training batches as a LightningDataModule."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from diffperception.data.batches import SeededSamples, StepBatchSampler, collate
from diffperception.data.images import ignore_interrupts


class TrainingData(LightningDataModule):
    """The batches of a run, from whatever step it starts at.

    Args:
        dataset: samples to learn from; None for a subclass that makes its `batches` of something else.
        batch_size: samples per batch and process.
        workers: processes that read samples.
        seed: of the order of samples and of their transforms.
        repeats: how often an epoch shows each sample, on average; once by default.
    """

    def __init__(
        self, dataset: Dataset[Any] | None, batch_size: int, workers: int, seed: int, repeats: np.ndarray | None = None
    ):
        super().__init__()
        self.dataset, self.batch_size, self.workers = dataset, batch_size, workers
        self.seed, self.repeats = seed, repeats
        self.loader: TimedLoader | None = None

    def batches(self, start: int, stop: int, rank: int, world_size: int, pin_memory: bool) -> Iterable[Any]:
        """The batches of numbers start..stop-1 for one of the processes."""
        assert self.dataset is not None
        samples = len(self.dataset) if self.repeats is None else self.repeats  # type: ignore[arg-type]
        return DataLoader(
            SeededSamples(self.dataset),
            batch_sampler=StepBatchSampler(samples, self.batch_size, stop, self.seed, rank, world_size, start),
            num_workers=self.workers,
            collate_fn=collate,
            worker_init_fn=ignore_interrupts,
            pin_memory=pin_memory,
        )

    def train_dataloader(self) -> Iterable[Any]:
        trainer = self.trainer
        assert trainer is not None
        start, stop = (steps * trainer.accumulate_grad_batches for steps in (trainer.global_step, trainer.max_steps))
        pin = trainer.strategy.root_device.type == "cuda"
        self.loader = TimedLoader(self.batches(start, stop, trainer.global_rank, trainer.world_size, pin))
        return self.loader


class TimedLoader:
    """Hands on the batches of a loader and counts the seconds that were spent waiting for them.

    It has no length: after a resume Lightning would compare the length of what is left with the number of all batches.
    """

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader
        self.waited = 0.0

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - began
            yield batch
