"""Feature maps kept for later: how much room they take, in memory and in files."""

import hashlib
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from diffperception.segmentation.features import FeatureExtractor
from diffperception.segmentation.maps import FeatureMaps

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def stored_bytes(features: FeatureExtractor, sizes: Iterable[tuple[int, int]], dtype: torch.dtype) -> int:
    """What the maps of images of these heights and widths take, exactly."""
    numbers = sum(
        info.channels * height * width
        for size in sizes
        for info, (height, width) in zip(features.info, features.map_sizes(*size), strict=True)
    )
    return numbers * dtype.itemsize


class KeptFeatures(FeatureExtractor):
    """An extractor that computes the maps of an image once and keeps them in memory.

    Args:
        features: what computes them.
        dtype: in which they are kept.
    """

    def __init__(self, features: FeatureExtractor, dtype: torch.dtype = torch.float16) -> None:
        super().__init__(features.info, features.multiple, features.window)
        self.features, self.dtype = features, dtype
        self.kept: dict[bytes, FeatureMaps] = {}  # by what the image looks like

    def encode(self, images: Tensor) -> list[Tensor]:
        return self.features.encode(images)

    def maps(self, image: Tensor) -> FeatureMaps:
        pixels = image.detach().cpu().contiguous()
        key = hashlib.sha256(f"{pixels.dtype} {tuple(pixels.shape)}".encode() + pixels.numpy().tobytes()).digest()
        if key not in self.kept:
            self.kept[key] = self.features.maps(image).to(self.dtype)
        return self.kept[key].to(torch.float32)


def parse_bytes(text: str) -> int:
    """`2GB`, `500 MB` or `1.5e9` in bytes; k, M, G and T are powers of 1000.

    Raises:
        ValueError: if it says nothing of the kind.
    """
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kMGT]?)B?\s*", text, re.IGNORECASE)
    try:
        number, unit = found.groups() if found else ("", "")
        return round(float(number) * next(size for name, size in UNITS.items() if name.lower() == unit.lower()))
    except ValueError:
        raise ValueError(f"{text!r} is no amount of memory: write 2GB or 500MB, for example") from None


def in_bytes(number: int) -> str:
    """`1.2 GB`."""
    names = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(names) - 1, (len(str(number)) - 1) // 3)
    return f"{number / 1000**power:.{min(power, 1)}f} {names[power]}"
