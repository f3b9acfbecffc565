"""Training batches as a LightningDataModule."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from diffperception.data.batches import SeededSamples, StepBatchSampler, collate
from diffperception.detection.inference import ignore_interrupts


class TrainingData(LightningDataModule):
    """The batches of a run, from whatever step it starts at.

    Args:
        dataset: samples to learn from.
        batch_size: samples a batch and process.
        workers: processes that read samples.
        seed: of the order of samples and of their transforms.
        repeats: how often an epoch shows each sample, on average; once by default.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, workers: int, seed: int, repeats: np.ndarray | None = None
    ):
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self.repeats = repeats
        self.loader: TimedLoader | None = None

    def train_dataloader(self) -> Iterable[Any]:
        assert self.trainer is not None
        batches = self.trainer.accumulate_grad_batches
        sampler = StepBatchSampler(
            len(self.dataset) if self.repeats is None else self.repeats,  # type: ignore[arg-type]
            self.batch_size,
            total_steps=self.trainer.max_steps * batches,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start_step=self.trainer.global_step * batches,
        )
        self.loader = TimedLoader(
            DataLoader(
                SeededSamples(self.dataset),
                batch_sampler=sampler,
                num_workers=self.workers,
                collate_fn=collate,
                worker_init_fn=ignore_interrupts,
                pin_memory=self.trainer.strategy.root_device.type == "cuda",
            )
        )
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
