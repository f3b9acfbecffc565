"""Small inputs for the detection tests."""

import torch
from torch import Tensor

from diffperception.detection import DiffusionDet

CLASSES = ["circle", "square", "star"]


def random_boxes(count: int, width: float, height: float, seed: int = 0) -> Tensor:
    """(count, 4) xyxy inside a width x height image, at least 2 pixels a side."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height])
    extent = 2 + torch.rand(count, 2, generator=generator) * (size / 2 - 2)
    low = torch.rand(count, 2, generator=generator) * (size - extent)
    return torch.cat([low, low + extent], 1)


def random_image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def random_target(count: int, height: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CLASSES), (count,), generator=generator)
    return {"boxes": random_boxes(count, width, height, seed), "labels": labels}


def tiny_detector(seed: int = 0, **options) -> DiffusionDet:
    """A real DiffusionDet of few weights, in evaluation mode."""
    torch.manual_seed(seed)
    sizes = {"backbone": "test_resnet", "width": 32, "dynamic_width": 8, "ffn_width": 32, "num_heads": 4, "stages": 2}
    arguments = {"classes": CLASSES, "num_boxes": 20, "min_size": None, "strides": (4, 8, 16)} | sizes | options
    return DiffusionDet(**arguments).eval()
