"""`diffperception benchmark`."""

from typing import Literal

import torch

from diffperception.benchmarks.detection import time_detector
from diffperception.benchmarks.generation import time_unet
from diffperception.benchmarks.segmentation import time_pixel_classifiers
from diffperception.devices import pick_device
from diffperception.echo import echo

SUITES = {"detection": time_detector, "segmentation": time_pixel_classifiers, "generation": time_unet}


def command(
    suite: Literal["detection", "segmentation", "generation"],
    /,
    device: str = "cpu",
    threads: int = 2,
    repeats: int = 3,
) -> None:
    """Measure speeds as ratios to a well-known unit in the same run.

    detection: DiffusionDet with ResNet-50, 300 boxes, 480 x 640 pixels, float32; the unit is one forward pass of
    torchvision's resnet50_fpn. Close other programs first: they disturb even ratios. With onnxruntime, one step of the
    exported detector is measured too.

    segmentation: ten pixel classifiers on 8448 random features at the sizes of the reference, against the dense way;
    and their peak memory. Takes about 14 GB for the dense way where the machine has 28.

    generation: the UNet's forward pass and training step, 21 M parameters, 8 images of 64 x 64 pixels, float32; the
    units are those of diffusers' UNet2DModel of the same layout, which must be installed.

    Args:
        suite: what to measure.
        device: cpu, cuda, cuda:1, ... or auto.
        threads: threads of the CPU.
        repeats: the best of so many runs counts.
    """
    torch.set_num_threads(threads)
    echo(SUITES[suite](repeats, lambda what: echo(f"measuring {what}"), pick_device(device)))
