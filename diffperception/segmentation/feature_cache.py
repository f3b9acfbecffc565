"""Feature maps kept for later, in memory and in files, and how much room they take."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffperception.models import FeatureInfo
from diffperception.segmentation.features import FeatureExtractor
from diffperception.segmentation.maps import FeatureMaps

CODES = {torch.float16: "F16", torch.float32: "F32"}  # of safetensors
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def stored_bytes(features: FeatureExtractor, sizes: Iterable[tuple[int, int]], dtype: torch.dtype) -> int:
    """What the maps of images of these heights and widths take, exactly."""
    numbers = sum(
        info.channels * height * width
        for size in sizes
        for info, (height, width) in zip(features.info, features.map_sizes(*size), strict=True)
    )
    return numbers * dtype.itemsize


def file_bytes(features: FeatureExtractor, size: tuple[int, int], dtype: torch.dtype) -> int:
    """What :func:`save_maps` writes for an image of this height and width, exactly: the header and the numbers."""
    header: dict[str, Any] = {"__metadata__": _metadata(features.info, size)}
    shapes = {
        info.name: [info.channels, *cells] for info, cells in zip(features.info, features.map_sizes(*size), strict=True)
    }
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return 8 + 8 * math.ceil(len(text) / 8) + end  # its length comes first, and spaces fill it up


class CachedFeatures(FeatureExtractor):
    """An extractor that computes the maps of an image once and keeps them in memory.

    Its maps are refused with a ValueError where a value is too large for how they are kept.

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
            self.kept[key] = self.features.maps(image).stored(self.dtype, "an image")
        return self.kept[key].to(torch.float32)


def save_maps(maps: FeatureMaps, info: Sequence[FeatureInfo], path: Path) -> None:
    """Write the maps of an image to a safetensors file, beside and then renamed, each by its name.

    Args:
        maps: on any device; they keep their type.
        info: of the extractor.
    """
    tensors = {about.name: m.cpu().contiguous() for about, m in zip(info, maps.maps, strict=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.touch()
    try:
        permissions = beside.stat().st_mode
        save_file(tensors, beside, _metadata(info, maps.size))
        beside.chmod(permissions)  # of any new file; safetensors leaves it to its owner alone
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _metadata(info: Sequence[FeatureInfo], size: tuple[int, int]) -> dict[str, str]:
    """What a file says of its maps."""
    about = {"names": [about.name for about in info], "strides": [about.stride for about in info], "size": size}
    return {"maps": json.dumps(about)}


def load_maps(path: Path) -> FeatureMaps:
    """Read what :func:`save_maps` wrote; ValueError for another file."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["maps"])
            maps = [file.get_tensor(name) for name in about["names"]]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no feature maps ({error}): `diffperception extract` writes them") from None
    return FeatureMaps(maps, about["strides"], tuple(about["size"]))


def fingerprint(module: nn.Module) -> str:
    """A short name for a network's weights, that changes with them."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def parse_bytes(text: str) -> int:
    """`2GB`, `500 MB` or `1.5e9` in bytes; k, M, G and T are powers of 1000.

    Raises:
        ValueError: if it says nothing of the kind.
    """
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kMGT]?)B?\s*", text, re.IGNORECASE)
    try:
        number, unit = found.groups() if found else ("", "")
        return round(float(number) * next(size for name, size in UNITS.items() if name.lower() == unit.lower()))
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no amount of memory: write 2GB or 500MB, for example") from None


def in_bytes(number: int) -> str:
    """`1.2 GB`."""
    names = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(names) - 1, (len(str(number)) - 1) // 3)
    return f"{number / 1000**power:.{min(power, 1)}f} {names[power]}"
