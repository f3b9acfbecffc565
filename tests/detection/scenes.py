"""Small inputs for the detection tests."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from diffperception.detection import DiffusionDet, DynamicHead, HeadOutput, SetCriterion
from diffperception.detection.criterion import Matches, classification_loss, giou_loss, l1_loss
from diffperception.detection.targets import PaddedTargets

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
    """A real DiffusionDet of few weights, in evaluation mode; options may be those of its head and criterion too."""
    torch.manual_seed(seed)
    sizes = {"width": 32, "dynamic_width": 8, "ffn_width": 32, "num_heads": 4, "stages": 2}
    head = {name: options.pop(name, size) for name, size in sizes.items()}
    criterion = {name: options.pop(name) for name in ("matcher", "federated_classes") if name in options}
    arguments = {
        "classes": CLASSES,
        "backbone": "test_resnet",
        "head": partial(DynamicHead, **head),
        "criterion": SetCriterion(**criterion),
        "num_boxes": 20,
        "min_size": None,
        "strides": (4, 8, 16),
    }
    return DiffusionDet(**arguments | options).eval()


def set_losses(
    logits: Tensor, boxes: Tensor, targets: PaddedTargets, matches: Tensor, class_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """The unweighted terms at every stage, of given matches (S, B, N)."""
    terms = {"classification": classification_loss, "l1": l1_loss, "giou": giou_loss}
    targets = replace(targets, counted_classes=class_mask)
    return {name: term(HeadOutput(logits, boxes), targets, Matches(matches)) for name, term in terms.items()}


def assert_same_detections(a: list[dict], b: list[dict], pixels: float = 1e-2) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x["labels"], y["labels"])
        torch.testing.assert_close(x["scores"], y["scores"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(x["boxes"], y["boxes"], atol=pixels, rtol=1e-4)
