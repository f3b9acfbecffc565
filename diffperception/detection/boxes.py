"""Box geometry as pure functions, and the map between boxes and the space they are diffused in."""

import math

import torch
from torch import Tensor
from torchvision.ops import box_convert

CENTRE_WEIGHT = 2.0  # the deltas of width and height have weight 1
MAX_LOG_SCALE = math.log(100_000 / 16)  # one refinement enlarges a box at most 6250 times


def encode_boxes(boxes: Tensor, image_sizes: Tensor, scale: float) -> Tensor:
    """Boxes (B, N, 4; xyxy pixels) to diffusion space: cxcywh in 0..1 of the image, then (2b - 1) * scale.

    Image sizes are (B, 4): width, height, width, height of the unpadded images in pixels.
    """
    normalised = box_convert(boxes, "xyxy", "cxcywh") / image_sizes[:, None]
    return (2 * normalised - 1) * scale


def decode_boxes(z: Tensor, image_sizes: Tensor, scale: float) -> Tensor:
    """Diffusion space to boxes: clamp to +-scale, then invert `encode_boxes`. (B, N, 4) -> (B, N, 4) xyxy in pixels."""
    normalised = (z.clamp(-scale, scale) / scale + 1) / 2
    return box_convert(normalised * image_sizes[:, None], "cxcywh", "xyxy")


def clamp_min_size(boxes: Tensor, min_size: float = 1.0) -> Tensor:
    """Widen boxes (..., 4; xyxy pixels) about their centre to at least `min_size` pixels a side.

    Noise clamps about 4.5 % of decoded boxes to zero width or height. Refinement multiplies sizes, so such a box would
    stay without area through every stage.
    """
    centres, sizes = box_convert(boxes, "xyxy", "cxcywh").split(2, dim=-1)
    half = sizes.clamp(min=min_size) / 2
    return torch.where((sizes < min_size).any(-1, keepdim=True), torch.cat([centres - half, centres + half], -1), boxes)


def apply_deltas(deltas: Tensor, boxes: Tensor) -> Tensor:
    """Refine boxes (..., 4; xyxy pixels) by deltas (arXiv 1311.2524, appendix C) with weights (2, 2, 1, 1)."""
    boxes = boxes.to(deltas.dtype)
    dx, dy, dw, dh = deltas.unbind(-1)
    cx, cy, w, h = box_convert(boxes, "xyxy", "cxcywh").unbind(-1)
    cx, cy = cx + dx / CENTRE_WEIGHT * w, cy + dy / CENTRE_WEIGHT * h
    w, h = w * dw.clamp(max=MAX_LOG_SCALE).exp(), h * dh.clamp(max=MAX_LOG_SCALE).exp()
    return box_convert(torch.stack([cx, cy, w, h], dim=-1), "cxcywh", "xyxy")


def paired_giou(a: Tensor, b: Tensor, eps: float = 1e-7) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv 1902.09630) of boxes that broadcast against each other: (..., 4) xyxy."""
    intersection = _area((torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0))
    hull = _area(torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2]))
    union = _area(a[..., 2:] - a[..., :2]) + _area(b[..., 2:] - b[..., :2]) - intersection
    iou = intersection / (union + eps)
    return iou, iou - (hull - union) / (hull + eps)


def _area(sizes: Tensor) -> Tensor:
    """Width times height (..., 2). The gradient of `prod` looks for zeros first, which waits for a GPU."""
    return sizes.prod(-1) if sizes.device.type == "cpu" else sizes[..., 0] * sizes[..., 1]
