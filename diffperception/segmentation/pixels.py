"""Labelled pixels, and their features from maps that stay at their native resolutions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffperception.data.masks import IGNORE_INDEX
from diffperception.echo import plural
from diffperception.models import FeatureInfo
from diffperception.segmentation.features import FeatureExtractor
from diffperception.segmentation.maps import by_stride, taps

NAMED = 3  # in a message; the others are counted


def checked_masks(
    images: Sequence[Tensor], masks: Sequence[Tensor], classes: Sequence[str], min_pixels: int, names: Sequence[str]
) -> tuple[list[Tensor], list[str]]:
    """The masks without classes that have too few pixels, as uint8, and sentences that say what was left out.

    Args:
        images: whose masks they are; none is fetched.
        masks: (H, W) whole numbers, 0..K-1 or 255.
        classes: names of 0..K-1, for messages as are those of the images.

    Raises:
        ValueError: a mask has other values or another shape, or nothing at all is labelled.
    """
    if not len(images) == len(masks) == len(names):
        raise ValueError(
            f"there are {len(images)} images, {len(masks)} masks and {len(names)} names: every image needs one of each"
        )
    small: list[str] = []
    checked = [_checked_mask(*pair, classes, min_pixels, small) for pair in zip(masks, names, strict=True)]
    present = {label for mask in checked for label in mask.unique().tolist()} - {IGNORE_INDEX}
    notes = small[:NAMED]
    if len(small) > NAMED:
        notes.append(f"likewise in {len(small) - NAMED} more cases.")
    if not present:
        raise ValueError(" ".join(["all pixels of the masks are ignored: label some.", *notes]))
    if absent := [name for label, name in enumerate(classes) if label not in present]:
        others = f" and {len(absent) - NAMED} other classes" if len(absent) > NAMED else ""
        named = ", ".join(absent[:NAMED]) + others
        notes.append(f"no image has pixels of class {named}, which will hardly be predicted.")
    return checked, notes


def _checked_mask(mask: Tensor, name: str, classes: Sequence[str], min_pixels: int, notes: list[str]) -> Tensor:
    if mask.dim() != 2 or mask.is_floating_point():
        raise ValueError(f"the mask of {name} must be whole numbers of shape (height, width), not {tuple(mask.shape)}")
    values, counts = (found.tolist() for found in mask.unique(return_counts=True))
    if unknown := [value for value in values if value not in (*range(len(classes)), IGNORE_INDEX)]:
        known = f"the classes are 0 to {len(classes) - 1}, ignored is {IGNORE_INDEX}"
        raise ValueError(f"the mask of {name} has the values {unknown}; {known}")
    mask = mask.to(torch.uint8, copy=True)
    for label, count in zip(values, counts, strict=True):
        if label != IGNORE_INDEX and count < min_pixels:
            mask[mask == label] = IGNORE_INDEX
            notes.append(f"{name} has only {plural(count, 'pixel')} of class {classes[label]}; they are ignored.")
    return mask


def check_size(image: Tensor, mask: Tensor, name: str) -> None:
    """ValueError if a mask is not of its image's size."""
    if image.shape[1:] != mask.shape:
        size, wanted = (f"{height} x {width}" for height, width in (mask.shape, image.shape[1:]))
        raise ValueError(f"the mask of {name} has {size} pixels, the image {wanted}: they must be alike")


class LabelledPixels:
    """The labelled pixels of images, and the native feature maps from which each pixel's features are gathered.

    Maps of equal stride lie in one table with a row a cell, so that a minibatch costs one gather a stride.

    Args:
        images: (3, H, W) each, 0..1.
        masks: (H, W) uint8 each, as :func:`checked_masks` gives them.
        storage: type of the numbers in the tables.
        names: names of the images, for messages.
        device: where the tables are; by default the extractor's.

    Raises:
        ValueError: a mask is not of its image's size, or a feature is too large for the storage.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        images: Sequence[Tensor],
        masks: Sequence[Tensor],
        storage: torch.dtype,
        names: Sequence[str],
        device: torch.device | None = None,
    ) -> None:
        device = device or features.device
        self.strides, groups = zip(*by_stride(features.strides).items(), strict=True)
        sizes = torch.tensor([features.map_sizes(*mask.shape) for mask in masks]).transpose(0, 1)  # (maps, images, 2)
        self.sizes = sizes[[group[0] for group in groups]].to(device)  # (strides, images, 2)
        cells = self.sizes.prod(-1)
        self.starts = cells.cumsum(1) - cells  # (strides, images), each image's first row in the tables
        widths = [sum(features.info[i].channels for i in group) for group in groups]
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
            maps = features.maps(image).stored(storage, name).maps
            for table, group, start in zip(self.tables, groups, self.starts[:, index].tolist(), strict=True):
                rows = torch.cat([maps[i].flatten(1) for i in group]).T
                table[start : start + len(rows)] = rows

    def __len__(self) -> int:
        return len(self.places)

    @staticmethod
    def channel_order(info: Sequence[FeatureInfo]) -> Tensor:
        """(D,) the extractor's channel that each gathered one is, for these maps."""
        widths = [about.channels for about in info]
        numbers = torch.arange(sum(widths)).split(widths)
        groups = by_stride([about.stride for about in info]).values()
        return torch.cat([numbers[i] for group in groups for i in group])

    def gather(self, pixels: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features and labels of some pixels: (N,) numbers below len(self) -> (N, D), (N,) int64.

        Channels lie as :meth:`channel_order` says. `out` (N, D) is written over; by default it is new and float32.
        """
        image = torch.searchsorted(self.ends, pixels, right=True)
        place, width = self.places[pixels].long(), self.widths[image]
        rows, columns = place // width, place % width
        if out is None:
            out = torch.empty(len(pixels), sum(table.shape[1] for table in self.tables), device=pixels.device)
        parts = out.split([table.shape[1] for table in self.tables], 1)
        tables = zip(self.tables, self.strides, self.sizes, self.starts, parts, strict=True)
        for table, stride, sizes, starts, part in tables:
            height, width = sizes[image].unbind(-1)
            cells, weights = taps(rows, columns, stride, height, width)
            cells = cells + starts[image][:, None]
            part.copy_(F.embedding_bag(cells, table, per_sample_weights=weights.to(table.dtype), mode="sum"))
        return out, self.labels[pixels].long()
