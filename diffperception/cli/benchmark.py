"""`diffperception benchmark`."""

from typing import Literal

import torch

from diffperception.benchmarks import detection
from diffperception.benchmarks.timing import Row, ratio_table
from diffperception.cli import say


def benchmark(suite: Literal["detection"], /, threads: int = 2, repeats: int = 3) -> None:
    """Measure speeds as ratios to a well-known unit in the same run.

    detection: DiffusionDet with ResNet-50, 300 boxes, 480 x 640 pixels, float32; the unit is one forward pass of
    torchvision's resnet50_fpn. Close other programs first: they disturb even ratios.

    Args:
        suite: what to measure.
        threads: of the CPU.
        repeats: the best of so many runs counts.
    """
    torch.set_num_threads(threads)

    def progress(row: Row) -> None:
        say(f"measured: {row.name}")

    say(ratio_table(*detection.measure(repeats, progress)))
