"""The objects of a batch as tensors of one shape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffperception.devices import to_device

PLAIN = ("boxes", "labels", "iscrowd", "area", "image_id")  # of a target; whatever else belongs to a special head


@dataclass
class PaddedTargets:
    """Objects of a batch, padded to the most crowded image.

    Attributes:
        boxes: (B, M, 4) xyxy in pixels.
        labels: (B, M) int64.
        valid: (B, M), False for pads and for objects that are not to be learned this time.
        image_sizes: (B, 4) width, height, width, height in pixels.
        present: (B, M), False for pads alone.
        counted_classes: (B, K), False where a class is left out of an image's classification loss; None counts all.
        more: whatever else targets say of each object, by name, (B, M, ...): masks are padded below and to the right.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    image_sizes: Tensor
    present: Tensor
    counted_classes: Tensor | None = None
    more: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def collate(cls, targets: Sequence[dict], image_sizes: Tensor) -> "PaddedTargets":
        """Pad torchvision detection targets, on the CPU; `iscrowd` regions are no objects to learn."""
        learned = [without_crowds(target) for target in targets]
        counts = [len(target["labels"]) for target in learned]
        columns = {
            name: _stack([target[name] for target in learned], max(1, *counts))
            for name, value in learned[0].items()
            if name in ("boxes", "labels") or (name not in PLAIN and len(value) == counts[0])
        }
        boxes, labels = columns.pop("boxes"), columns.pop("labels")
        valid = torch.arange(labels.shape[1]) < torch.tensor(counts)[:, None]
        # A pad is a box of one pixel: its geometry stays finite, and `valid` keeps it out of every result.
        boxes = torch.where(valid[..., None], boxes, torch.tensor([0.0, 0.0, 1.0, 1.0]))
        return cls(boxes, labels, valid, image_sizes.cpu(), valid, None, columns)

    def to(self, device: torch.device) -> "PaddedTargets":
        """The same objects there."""
        return self._map(lambda x: to_device(x, device))

    def repeat(self, times: int) -> "PaddedTargets":
        """The objects of the images, all of them so many times over: rows (times * B, ...)."""
        return self._map(lambda x: x.repeat(times, *[1] * (x.dim() - 1)))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PaddedTargets":
        """The same with `function` of each tensor."""
        more = {name: function(value) for name, value in self.more.items()}
        tensors = {name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors, more=more)

    def limit(self, proposals: int, generator: torch.Generator | None = None) -> "PaddedTargets":
        """At most `proposals` objects per image, chosen at random where there are more."""
        if self.valid.shape[1] <= proposals:
            return self
        order = torch.rand(self.valid.shape, generator=generator).masked_fill(~self.valid, 2.0)
        rank = order.argsort(1).argsort(1)
        return replace(self, valid=self.valid & (rank < proposals))


def image_sizes(images: Sequence[Tensor]) -> Tensor:
    """(B, 4) width, height, width, height in pixels, on the CPU."""
    return torch.tensor([[*image.shape[-2:]][::-1] * 2 for image in images], dtype=torch.float32)


def without_crowds(target: dict) -> dict[str, Tensor]:
    """The target's tensors on the CPU, without what is marked in `iscrowd`."""
    objects = len(target["labels"])
    tensors = {name: value.cpu() for name, value in target.items() if isinstance(value, Tensor)}
    tensors["boxes"] = tensors["boxes"].float().reshape(-1, 4)
    if "iscrowd" in tensors:
        keep = ~tensors["iscrowd"].bool()
        tensors = {name: x[keep] if x.shape[:1] == (objects,) else x for name, x in tensors.items()}
    return tensors


def _stack(values: Sequence[Tensor], rows: int) -> Tensor:
    """Tensors (n, ...) of one number of axes in one, padded with zeros behind to `rows` and to the largest."""
    shape = [rows, *(max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True))]
    padding = [[x for a, b in zip(value.shape, shape, strict=True) for x in (b - a, 0)][::-1] for value in values]
    return torch.stack([F.pad(value, pads) for value, pads in zip(values, padding, strict=True)])
