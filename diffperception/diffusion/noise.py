"""Noise as a function of a sample's seed alone, so that results depend neither on the batch nor on the device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sample_seed(seed: int, index: int) -> int:
    """The seed of the noise of sample number `index` in a run with this seed, independent of batch and process."""
    return int(np.random.SeedSequence([seed, abs(index), int(index < 0)]).generate_state(1, np.uint64)[0] >> 1)


class SampleNoise:
    """Standard normal draws for a batch, each sample's from a CPU generator of its own.

    Args:
        seeds: one a sample.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """Noise of the shape (B, ...), dtype and device of ``like``; a :data:`Draw` for samplers."""
        shape = like.shape[1:]
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators]).to(like)
