"""All seeds and draws of the project, functions of numbers that are passed in: results do not depend on batches.

Draws are made on the CPU by default, so that every device starts from the same numbers. A generator of another device
draws there instead, which saves the copy and gives other numbers.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

SPREAD_MARGIN = 1e-7  # of evenly spread points from 0 and 1, where the normal quantile is infinite
NoiseFn = Callable[[Tensor], Tensor]  # standard normal noise of a tensor's shape, dtype and device


def derive_seed(*numbers: int) -> int:
    """A seed that is a function of these non-negative numbers alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def sample_seed(seed: int, index: int) -> int:
    """The seed of the noise of sample, or image, number ``index`` in a run with this seed: the same in any batch."""
    return derive_seed(seed, abs(index), int(index < 0))


def name_seed(seed: int, name: str) -> int:
    """The seed of the noise of an image that is known by its file's name alone."""
    return sample_seed(seed, zlib.crc32(name.encode()))


def spread_noise(seeds: Sequence[int], count: int, axes: int) -> Tensor:
    """Points that are standard normal each and fill the space evenly together, (B, count, axes), on the CPU.

    They are scrambled Sobol points (Owen, Journal of Complexity 14, 1998), of each sample by a seed of its own.
    """
    engines = [torch.quasirandom.SobolEngine(axes, scramble=True, seed=seed) for seed in seeds]
    points = torch.stack([engine.draw(count, dtype=torch.float64) for engine in engines])
    return torch.special.ndtri(points.clamp(SPREAD_MARGIN, 1 - SPREAD_MARGIN)).float()


class SampleNoise:
    """Standard normal draws for a batch, each sample's from a generator of its own seed, on ``device``."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """Noise of the shape (B, ...), dtype and device of ``like``."""
        noise = torch.stack([torch.randn(like.shape[1:], generator=g, device=g.device) for g in self.generators])
        if noise.device.type == "cpu" and like.device.type == "cuda":
            noise = noise.pin_memory()  # a copy from other memory waits until the GPU has done all that it was given
        return noise.to(like, non_blocking=True)
