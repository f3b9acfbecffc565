"""Training of pixel classifiers on features that stay at their native resolutions."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffperception.data.masks import IGNORE_INDEX
from diffperception.segmentation.features import FeatureExtractor
from diffperception.segmentation.maps import FeatureMaps, check_storable, taps
from diffperception.segmentation.mlp import PixelMLPs

NAMED = 3  # in a message; the others are counted
# What numbers of FitOptions may be; batch norm needs two pixels.
LEAST = {
    "batch_size": 2,
    "epochs": 1,
    "early_stopping_start": 0,
    "patience": 1,
    "max_minibatches": 1,
    "min_pixels": 0,
    "seed": 0,
}


@dataclass
class FitOptions:
    """The recipe of arXiv 2112.03126.

    Args:
        batch_size: pixels a minibatch; every member has its own.
        lr: learning rate of Adam.
        epochs: most passes over the labelled pixels.
        early_stopping_start: passes after which a member may stop early.
        patience: a member stops once so many minibatches have not improved on the best one's loss since.
        max_minibatches: most minibatches a member, whatever the passes; null for no such limit.
        min_pixels: a class with fewer pixels in an image is ignored there.
        seed: of weights and minibatches.
        feature_dtype: of the features while training; half precision takes half the memory.
    """

    batch_size: int = 64
    lr: float = 1e-3
    epochs: int = 100
    early_stopping_start: int = 4
    patience: int = 50
    max_minibatches: int | None = None
    min_pixels: int = 20
    seed: int = 0
    feature_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.feature_dtype not in ("float16", "float32"):
            raise ValueError(f"features are stored as float16 or float32, not {self.feature_dtype!r}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")


def member_seed(seed: int, member: int) -> int:
    """The seed of a member's weights and minibatches, whatever the number of members."""
    return int(np.random.SeedSequence([seed, member]).generate_state(1, np.uint64)[0]) >> 1


def checked_masks(
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    num_classes: int,
    min_pixels: int,
    names: Sequence[str],
    classes: Sequence[str] | None = None,
) -> tuple[list[Tensor], list[str]]:
    """The masks without classes that have too few pixels, as uint8, and sentences that say what was left out.

    Args:
        images: whose masks they are; none is fetched.
        masks: (H, W) whole numbers, 0..K-1 or 255.
        names: of the images, for messages.
        classes: names of 0..K-1, for messages; by default their numbers.

    Raises:
        ValueError: if a mask has other values or another shape, or nothing at all is labelled.
    """
    if not len(images) == len(masks) == len(names):
        raise ValueError(f"there are {len(images)} images and {len(masks)} masks: every image needs its mask")
    classes = classes or [str(label) for label in range(num_classes)]
    small: list[str] = []
    checked = [_checked_mask(*pair, classes, min_pixels, small) for pair in zip(masks, names, strict=True)]
    present = torch.zeros(256, dtype=torch.bool)
    for mask in checked:
        present[mask.unique().long()] = True
    notes = small[:NAMED]
    if len(small) > NAMED:
        notes.append(f"likewise in {len(small) - NAMED} more cases.")
    if not present[:num_classes].any():
        raise ValueError(" ".join(["all pixels of the masks are ignored: label some.", *notes]))
    absent = [classes[label] for label in (~present[:num_classes]).nonzero()[:, 0].tolist()]
    if absent:
        others = f" and {len(absent) - NAMED} other classes" if len(absent) > NAMED else ""
        notes.append(
            f"no image has pixels of class {', '.join(absent[:NAMED])}{others}, which will hardly be predicted."
        )
    return checked, notes


def _checked_mask(mask: Tensor, name: str, classes: Sequence[str], min_pixels: int, notes: list[str]) -> Tensor:
    if mask.dim() != 2 or mask.is_floating_point():
        raise ValueError(f"the mask of {name} must be whole numbers of shape (height, width), not {tuple(mask.shape)}")
    values, counts = mask.unique(return_counts=True)
    unknown = [v for v in values.tolist() if v != IGNORE_INDEX and not 0 <= v < len(classes)]
    if unknown:
        raise ValueError(
            f"the mask of {name} has the values {unknown}; the classes are 0 to {len(classes) - 1}, ignored is"
            f" {IGNORE_INDEX}"
        )
    mask = mask.to(torch.uint8, copy=True)
    for label, count in zip(values.tolist(), counts.tolist(), strict=True):
        if label != IGNORE_INDEX and count < min_pixels:
            mask[mask == label] = IGNORE_INDEX
            notes.append(
                f"{name} has only {count} pixel{'s' * (count > 1)} of class {classes[label]}; they are ignored."
            )
    return mask


def check_size(image: Tensor, mask: Tensor, name: str) -> None:
    """Raise a ValueError if a mask is not of its image's size."""
    if image.shape[1:] != mask.shape:
        sizes = [f"{height} x {width}" for height, width in (mask.shape, image.shape[1:])]
        raise ValueError(f"the mask of {name} has {sizes[0]} pixels, the image {sizes[1]}: they must be alike")


class LabelledPixels:
    """The labelled pixels of images, and the native feature maps from which each pixel's features are gathered.

    Maps of equal stride lie in one table with a row a cell, so that a minibatch costs one gather a stride.

    Args:
        features: where the maps come from.
        images: (3, H, W) each, 0..1.
        masks: (H, W) uint8 each, as :func:`checked_masks` gives them.
        storage: of the tables.
        names: of the images, for messages.

    Raises:
        ValueError: if a mask is not of its image's size, or a feature is too large for the storage.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        images: Sequence[Tensor],
        masks: Sequence[Tensor],
        storage: torch.dtype,
        names: Sequence[str],
    ) -> None:
        device = features.device
        self.strides = sorted(set(features.strides))
        self.groups = [[i for i, s in enumerate(features.strides) if s == stride] for stride in self.strides]
        sizes = torch.tensor([features.map_sizes(*mask.shape) for mask in masks]).transpose(0, 1)  # (maps, images, 2)
        self.sizes = sizes[[group[0] for group in self.groups]].to(device)  # (strides, images, 2)
        cells = self.sizes.prod(-1)
        self.starts = cells.cumsum(1) - cells  # (strides, images), each image's first row in the tables
        widths = [sum(features.info[i].channels for i in group) for group in self.groups]
        shapes = zip(cells.sum(1).tolist(), widths, strict=True)
        self.tables = [torch.empty(shape, dtype=storage, device=device) for shape in shapes]
        labelled = [(mask.flatten() != IGNORE_INDEX).nonzero()[:, 0] for mask in masks]
        self.places = torch.cat([place.int() for place in labelled]).to(device)
        self.labels = torch.cat([m.flatten()[p] for m, p in zip(masks, labelled, strict=True)]).to(device)
        self.ends = torch.tensor([len(place) for place in labelled], device=device).cumsum(0)
        self.widths = torch.tensor([mask.shape[1] for mask in masks], device=device)
        for index, name in enumerate(tqdm(names, desc="features", unit="image", leave=False, disable=None)):
            image = images[index]
            check_size(image, masks[index], name)
            self._store(index, features.maps(image), name)

    def __len__(self) -> int:
        return len(self.places)

    def channel_order(self, channels: Sequence[int]) -> Tensor:
        """(D,) the extractor's channel that each gathered one is, for maps with so many channels."""
        numbers = torch.arange(sum(channels)).split(list(channels))
        return torch.cat([numbers[i] for group in self.groups for i in group])

    def gather(self, pixels: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features and labels of some pixels: (N,) numbers below len(self) -> (N, D), (N,) int64.

        Channels lie by stride, see :meth:`channel_order`.

        Args:
            out: (N, D), to be written over; by default new, float32 where the storage is no wider.
        """
        image = torch.searchsorted(self.ends, pixels, right=True)
        place, width = self.places[pixels].long(), self.widths[image]
        rows, columns = place // width, place % width
        if out is None:
            dtype = torch.promote_types(self.tables[0].dtype, torch.float32)
            out = torch.empty(len(pixels), sum(t.shape[1] for t in self.tables), dtype=dtype, device=pixels.device)
        parts = out.split([table.shape[1] for table in self.tables], 1)
        tables = zip(self.tables, self.strides, self.sizes, self.starts, parts, strict=True)
        for table, stride, sizes, starts, part in tables:
            height, width = sizes[image].unbind(-1)
            cells, weights = taps(rows, columns, stride, height, width)
            cells = cells + starts[image][:, None]
            part.copy_(F.embedding_bag(cells, table, per_sample_weights=weights.to(table.dtype), mode="sum"))
        return out, self.labels[pixels].long()

    def _store(self, index: int, maps: FeatureMaps, name: str) -> None:
        for table, group, starts in zip(self.tables, self.groups, self.starts, strict=True):
            column = 0
            for i in group:
                cells = maps.maps[i].flatten(1).T
                check_storable(cells, table.dtype, name)
                table[starts[index] : starts[index] + len(cells), column : column + cells.shape[1]] = cells
                column += cells.shape[1]


def minibatches(count: int, batch_size: int, seeds: Sequence[int]) -> Iterator[Tensor]:
    """Endless (M, batch_size) pixel numbers below ``count``, drawn on the CPU with each member's seed.

    With replacement: the permutations that the reference draws would take 8 bytes a pixel and member.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        drawn = [torch.randint(count, (100, batch_size), generator=g, device="cpu") for g in generators]
        yield from torch.stack(drawn, 1)


class EarlyStopping:
    """Which members have gone on for ``patience`` minibatches without improving on their best loss."""

    def __init__(self, members: int, patience: int) -> None:
        self.best = torch.full((members,), torch.inf)
        self.waited = torch.zeros(members, dtype=torch.int64)
        self.patience = patience

    def update(self, losses: Tensor) -> Tensor:
        """(M,) losses on the CPU -> (M,) bool."""
        self.waited = torch.where(losses < self.best, 0, self.waited + 1)
        self.best = torch.minimum(self.best, losses)
        return self.waited >= self.patience


def train(mlps: PixelMLPs, pixels: LabelledPixels, seeds: Sequence[int], options: FitOptions) -> list[int]:
    """Train all members at once, each on its own minibatches, until each has stopped.

    Args:
        mlps: on the pixels' device, its channels in the order in which pixels gather them.
        seeds: of the members' minibatches.

    Returns: how many minibatches each member saw.
    """
    epoch = -(-len(pixels) // options.batch_size)
    most = options.epochs * epoch
    most = most if options.max_minibatches is None else min(most, options.max_minibatches)
    optimizer = torch.optim.Adam(mlps.parameters(), options.lr, fused=True)
    stopping = EarlyStopping(len(seeds), options.patience)
    kept: dict[int, dict[str, Tensor]] = {}  # the weights of members that have stopped
    seen = [most] * len(seeds)
    draws = minibatches(len(pixels), options.batch_size, seeds)
    weight = mlps.linears[0].weight
    # Memory of this size costs more to ask for than to fill: it is kept from one minibatch to the next.
    gradient = torch.empty_like(weight)
    gathered = weight.new_empty(len(seeds) * options.batch_size, weight.shape[2])
    mlps.train()
    with tqdm(total=most, desc="pixels", unit="minibatch", leave=False, disable=None) as bar:
        for number in range(1, most + 1):
            x, labels = pixels.gather(next(draws).flatten().to(mlps.device), gathered)
            losses = _backward(mlps, x.unflatten(0, (len(seeds), -1)), labels, gradient)
            optimizer.step()
            bar.update()
            if number <= options.early_stopping_start * epoch:
                continue
            for member in stopping.update(losses.cpu()).nonzero()[:, 0].tolist():
                if member not in kept:
                    kept[member] = {name: value[member].clone() for name, value in mlps.state_dict().items()}
                    seen[member] = number
            if len(kept) == len(seeds):
                break
    state = mlps.state_dict()
    for member, values in kept.items():
        for name, value in values.items():
            state[name][member] = value
    mlps.eval()
    return seen


def _backward(mlps: PixelMLPs, x: Tensor, labels: Tensor, gradient: Tensor) -> Tensor:
    """Losses (M,) of one minibatch (M, B, D) with labels (M B,), and all gradients.

    The first layer has nearly all the weights; autograd would allocate its gradient anew.

    Args:
        gradient: of the first layer's weights, written over.
    """
    mlps.zero_grad()
    first = mlps.linears[0]
    with torch.no_grad():
        z = first(x)
    z.requires_grad_()
    losses = F.cross_entropy(mlps.after_first(z).flatten(0, 1), labels, reduction="none").view(len(x), -1).mean(1)
    losses.sum().backward()
    assert z.grad is not None
    first.bias.grad = z.grad.sum(1)
    first.weight.grad = torch.bmm(z.grad.mT, x, out=gradient)
    return losses.detach()


def fit_notes(notes: Sequence[str]) -> None:
    """Warn once of all that was left out."""
    if notes:
        warnings.warn(" ".join(notes), stacklevel=3)
