"""Instance masks: each proposal makes the weights of a small network that runs on what lies in its box.

The idea is CondInst's (arXiv 2003.05664). There the network runs on the whole image; here it runs on a grid over the
box, so that cost and memory do not depend on the size of the image, small objects are seen as finely as large ones,
and one gather serves images of any sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception.detection.boxes import paired_giou
from diffperception.detection.criterion import Matches, Term
from diffperception.detection.heads.boxes import DynamicHead, Head, HeadOutput
from diffperception.detection.targets import PaddedTargets
from diffperception.models.ops.pooling import FeaturePyramid

REACH = 1.25  # sides of the grid in those of the box: what a box misses of its object has a mask too
SAMPLES = 3  # points per cell and axis at which an object's mask is looked up for learning
PASTED_AT_ONCE = 2**24  # pixels of masks that exist as numbers at one time


@dataclass
class FeaturedOutput(HeadOutput):
    """Besides, the features of the proposals, (S, B, N, d)."""

    features: Tensor


@dataclass
class MaskOutput(FeaturedOutput):
    """In training: `masks_of` gives the mask logits (B, K, M, M) of proposals at the last stage.

    Its arguments are the proposals, (B, K) int64, and their boxes, (B, K, 4) xyxy in pixels.
    """

    masks_of: Callable[[Tensor, Tensor], Tensor]


class DynamicMaskHead(Head):
    """Boxes by a DynamicHead, and a mask of each, which the feature of its proposal and the pyramid tell.

    It learns by the term `MaskLoss` of the criterion. In prediction only what NMS leaves gets a mask.

    Args:
        num_classes: K.
        boxes: makes the head of the boxes for a number of classes, such as DynamicHead with some of its arguments; or
            such a head.
        mask_size: M, cells per side of the grid on a box.
        mask_channels: of what is pooled there.
        mask_layers: convolutions of 3x3 on what is pooled.
        mask_width: inner channels of each proposal's own network, which has three layers.
    """

    gives_masks = True

    def __init__(
        self,
        num_classes: int,
        boxes: Callable[[int], DynamicHead] = DynamicHead,
        mask_size: int = 28,
        mask_channels: int = 16,
        mask_layers: int = 1,
        mask_width: int = 8,
    ):
        super().__init__()
        if min(mask_size, mask_channels, mask_width) < 1:
            raise ValueError(
                f"mask_size, mask_channels and mask_width must be at least 1, not {mask_size}, {mask_channels} and"
                f" {mask_width}"
            )
        self.boxes = boxes if isinstance(boxes, DynamicHead) else boxes(num_classes)
        self.record(boxes=self.boxes)
        self.width = self.boxes.width
        self.mask_size = mask_size
        self.reduce = nn.Linear(self.width, mask_channels)
        self.convolutions = nn.Sequential(
            *(
                layer
                for _ in range(mask_layers)
                for layer in (nn.Conv2d(mask_channels, mask_channels, 3, padding=1), nn.ReLU(inplace=True))
            )
        )
        self.widths = [mask_channels + 2, mask_width, mask_width, 1]
        self.generate = nn.Linear(self.width, sum((a + 1) * b for a, b in pairwise(self.widths)))
        self._initialise()

    def _initialise(self) -> None:
        """Let every proposal begin with much the same network, and that with those of plain layers (He, 1502.01852)."""
        nn.init.normal_(self.generate.weight, std=0.01)
        nn.init.zeros_(self.generate.bias)
        with torch.no_grad():
            for weight, _ in split_layers(self.generate.bias[None], self.widths):
                nn.init.kaiming_normal_(weight[0].T, nonlinearity="relu")

    def forward(self, pyramid: FeaturePyramid, boxes: Tensor, t: Tensor, last_only: bool = False) -> HeadOutput:
        """See `Head.forward`."""
        output = FeaturedOutput(*map(torch.stack, self.boxes.refine(pyramid, boxes, t, last_only)))
        if last_only:
            return output
        reduced, image = self._reduced(pyramid), torch.arange(len(boxes), device=boxes.device)[:, None]

        def masks_of(proposals: Tensor, boxes: Tensor) -> Tensor:
            return self._masks(reduced, boxes, output.features[-1][image, proposals])

        return MaskOutput(output.logits, output.boxes, output.features, masks_of)

    def terms(self) -> dict[str, Term]:
        """See `Head.terms`: that of the masks."""
        return {"mask": MaskLoss()}

    def _reduced(self, pyramid: FeaturePyramid) -> FeaturePyramid:
        return FeaturePyramid(self.reduce(pyramid.rows), pyramid.places, pyramid.strides)

    def _masks(self, reduced: FeaturePyramid, boxes: Tensor, features: Tensor) -> Tensor:
        """Mask logits (B, K, M, M), of boxes (B, K, 4) with features (B, K, d)."""
        batch, count = boxes.shape[:2]
        pooled = reduced.pool(enlarge(boxes), self.mask_size, samples=1).flatten(0, 1)
        grid = pooled.transpose(1, 2).unflatten(2, (self.mask_size, self.mask_size))
        seen = self.convolutions(grid).flatten(2).transpose(1, 2)
        place = coordinates(self.mask_size).to(seen).expand(len(seen), -1, -1)
        generated = self.generate(features.flatten(0, 1))
        logits = dynamic_layers(torch.cat([seen, place], 2), generated, self.widths)
        return logits.view(batch, count, self.mask_size, self.mask_size)

    def revisit(
        self, detections: list[dict[str, Tensor]], pyramid: FeaturePyramid, seen: Tensor, sizes: Tensor
    ) -> list[dict[str, Tensor]]:
        """See `Head.revisit`: mask logits on the grids of the boxes, (n, M, M)."""
        reduced = self._reduced(pyramid)
        parts = zip(detections, reduced.split(1), seen / sizes, strict=True)
        return [
            {name: value for name, value in found.items() if name != "features"}
            | {"masks": self._masks(part, (found["boxes"] * scale)[None], found["features"].to(part.rows)[None])[0]}
            for found, part, scale in parts
        ]

    def finish(self, detections: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
        """See `Head.finish`: `masks` (n, height, width), bool."""
        return detections | {"masks": paste(detections["masks"].float(), detections["boxes"], height, width)}


@dataclass
class MaskLoss(Term):
    """Cross-entropy and dice loss (arXiv 1606.04797) of masks on the grids of matched boxes at the last stage.

    Per pair that counts: of each image the `pairs` that fit their objects best, every object's best first. Objects
    whose mask has nothing in the box are left out.
    """

    needs_masks = True

    pairs: int = 32

    def __call__(self, output: HeadOutput, targets: PaddedTargets, matches: Matches) -> Tensor:
        if not isinstance(output, MaskOutput):
            raise ValueError(
                f"MaskLoss learns the masks of a DynamicMaskHead, but the head gave {type(output).__name__}"
            )
        if "masks" not in targets.more:
            raise ValueError("MaskLoss learns from masks, but the targets have none: set data.masks: true")
        boxes = torch.minimum(output.boxes[-1].detach().float().clamp(min=0), targets.image_sizes[:, None])
        proposals, objects = best_pairs(matches.index[-1], boxes, targets, self.pairs)
        boxes = boxes.gather(1, proposals[..., None].expand(-1, -1, 4))
        grids = output.masks_of(proposals, boxes).float()
        cells = look_up(targets.more["masks"], objects.clamp(min=0), enlarge(boxes), grids.shape[-1])
        logits, wanted = grids.flatten(2), cells.flatten(2)
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(2)
        p = logits.sigmoid()
        dice = 1 - (2 * (p * wanted).sum(2) + 1) / ((p * p).sum(2) + (wanted * wanted).sum(2) + 1)
        counted = (objects >= 0) & (wanted.sum(2) > 0)
        value = torch.where(counted, entropy + dice, 0).sum() / counted.sum().clamp(min=1)
        return F.pad(value[None], (len(output.logits) - 1, 0))


def dynamic_layers(x: Tensor, generated: Tensor, widths: list[int]) -> Tensor:
    """Layers with ReLU between them whose weights each row of `generated` has: x (n, P, widths[0]) -> (n, P, last)."""
    for number, (weight, bias) in enumerate(split_layers(generated, widths)):
        x = torch.baddbmm(bias, F.relu(x) if number else x, weight)
    return x


def split_layers(generated: Tensor, widths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Of rows (n, sum of (a + 1) * b) the weights (n, a, b) and biases (n, 1, b) of layers from width a to b."""
    sizes = [size for a, b in pairwise(widths) for size in (a * b, b)]
    weights, biases = generated.split(sizes, 1)[::2], generated.split(sizes, 1)[1::2]
    shapes = pairwise(widths)
    return [(w.unflatten(1, shape), b[:, None]) for w, b, shape in zip(weights, biases, shapes, strict=True)]


def coordinates(size: int) -> Tensor:
    """(size * size, 2) x and y of the cells of a grid, row by row, from -1 to 1 between its borders."""
    centres = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], 2).flatten(0, 1)


def enlarge(boxes: Tensor) -> Tensor:
    """The grids of boxes (..., 4; xyxy): REACH times as wide and high, about the same centres."""
    low, high = boxes.split(2, -1)
    more = (high - low) * (REACH - 1) / 2
    return torch.cat([low - more, high + more], -1)


def best_pairs(index: Tensor, boxes: Tensor, targets: PaddedTargets, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` matched proposals of each image, every object's best first: they and their objects, (B, K).

    An object is -1 where there are fewer. Boxes are (B, N, 4), and index (B, N) is as of `Matches`.
    """
    own = Matches(index[None]).of(targets.boxes)[0]
    iou = paired_giou(boxes, own)[0].nan_to_num(0.0)
    same = index[:, :, None] == index[:, None]
    rank = (same & (iou[:, None] > iou[:, :, None])).sum(2)  # among the proposals of the same object
    order = (rank - iou).masked_fill(index < 0, torch.inf).argsort(stable=True, dim=1)[:, :count]
    return order, index.gather(1, order)


def look_up(masks: Tensor, objects: Tensor, boxes: Tensor, size: int) -> Tensor:
    """How much of each cell of grids on boxes (B, K, 4) is inside their objects (B, K): (B, K, size, size), 0..1.

    Masks are (B, M, H, W), 1 inside; beyond them nothing is.
    """
    most, height, width = masks.shape[1:]
    steps = (torch.arange(size * SAMPLES, device=boxes.device) + 0.5) / (size * SAMPLES)
    low, sides = boxes[..., None, :2], boxes[..., None, 2:] - boxes[..., None, :2]
    points = (low + steps[:, None] * sides).floor().nan_to_num(-1.0)  # (B, K, points, 2)
    column, row = (points[..., axis].clamp(-1, end).long() for axis, end in enumerate((width, height)))
    inside = ((row >= 0) & (row < height))[..., :, None] & ((column >= 0) & (column < width))[..., None, :]
    image = torch.arange(len(masks), device=boxes.device)[:, None]
    start = ((image * most + objects) * height)[..., None] + row.clamp(0, height - 1)
    index = (start * width)[..., :, None] + column.clamp(0, width - 1)[..., None, :]
    values = masks.flatten()[index].float() * inside
    return values.unflatten(3, (size, SAMPLES)).unflatten(2, (size, SAMPLES)).mean((3, 5))


def paste(logits: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks (n, height, width), bool, of logits (n, M, M) on the grids of boxes (n, 4; xyxy in pixels).

    Logits are interpolated linearly between the centres of cells, and what is above 0 is inside. As this is linear in
    rows and in columns, it is a product with a matrix for either.
    """
    masks = [torch.zeros(0, height, width, dtype=torch.bool, device=logits.device)]
    count = max(1, PASTED_AT_ONCE // (height * width))
    for part, (x1, y1, x2, y2) in zip(logits.split(count), (b.T for b in enlarge(boxes).split(count)), strict=True):
        rows, columns = (_interpolation(*ends, part.shape[-1]) for ends in ((y1, y2, height), (x1, x2, width)))
        masks.append(rows @ part @ columns.transpose(1, 2) > 0)
    return torch.cat(masks)


def _interpolation(start: Tensor, end: Tensor, pixels: int, cells: int) -> Tensor:
    """(n, pixels, cells): weights of the cells between start and end (n,) at the centres of pixels, 0 outside."""
    centres = torch.arange(pixels, device=start.device) + 0.5
    place = (centres - start[:, None]) / (end - start)[:, None] * cells
    away = (place - 0.5).clamp(0, cells - 1)[..., None] - torch.arange(cells, device=start.device)
    return (1 - away.abs()).clamp(min=0) * ((place > 0) & (place < cells))[..., None]
