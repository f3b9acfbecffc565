"""Pictures of labels and of how uncertain they are.

Images come in as float32 (3, H, W), RGB, 0..1.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffperception.data.masks import IGNORE_INDEX
from diffperception.visualization.draw import GREY, PAPER, class_colour, paint, stack, titled

OPACITY = 0.55
MOST_UNCERTAIN = math.log(2)  # half of the members are sure of one class, and half of another
LEGEND_COLUMNS = 10


def mask_overlay(image: Tensor, labels: Tensor) -> Tensor:
    """The image (3, H, W) with the colours of its labels (H, W) laid over it: none over class 0, grey over 255."""
    colours = torch.zeros(256, 3)
    colours[:IGNORE_INDEX] = torch.tensor([class_colour(k) for k in range(IGNORE_INDEX)]) / 255
    colours[IGNORE_INDEX] = torch.tensor(GREY) / 255
    opacity = OPACITY * (labels.cpu() > 0)
    return torch.lerp(image.cpu(), colours[labels.cpu().long()].permute(2, 0, 1), opacity[None])


def uncertainty_map(uncertainty: Tensor) -> Tensor:
    """(H, W) in nats as colours (3, H, W), from black at 0 to yellow at ln 2 and above."""
    from matplotlib import colormaps

    colours = colormaps["inferno"]((uncertainty.cpu() / MOST_UNCERTAIN).clamp(0, 1).numpy())
    return torch.from_numpy(colours[..., :3]).float().permute(2, 0, 1)


def segmentation_panels(
    image: Tensor,
    labels: Tensor,
    uncertainty: Tensor,
    classes: Sequence[str],
    truth: Tensor | None = None,
    side: int | None = None,
) -> Image.Image:
    """Image, true labels if given, predicted labels and their uncertainty, beside each other over the class names.

    Args:
        image: (3, H, W).
        labels, truth: (H, W), 0..K-1; truth may be 255.
        uncertainty: (H, W) in nats.
        side: long side of each in pixels; by default about that of the image.
    """
    panels = {"image": image}
    if truth is not None:
        panels["truth"] = mask_overlay(image, truth)
    panels["prediction"] = mask_overlay(image, labels)
    panels["uncertainty"] = uncertainty_map(uncertainty)
    row = stack([titled(paint(panel, [], side), name) for name, panel in panels.items()])
    return stack([row, legend(classes)], vertical=True)


def legend(classes: Sequence[str]) -> Image.Image:
    """The names of classes over their colours."""
    swatches = [
        titled(Image.new("RGB", (90, 12), class_colour(k) if k else PAPER), name) for k, name in enumerate(classes)
    ]
    rows = [stack(swatches[i : i + LEGEND_COLUMNS]) for i in range(0, len(swatches), LEGEND_COLUMNS)]
    return stack(rows, vertical=True)


def contact_sheet(panels: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Pictures in rows of so many."""
    rows = [stack(panels[i : i + columns], gap=24) for i in range(0, len(panels), columns)]
    return stack(rows, vertical=True, gap=24)
