"""Feature maps kept for later, in memory and in files, and how much room they take."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffperception.models import FeatureInfo
from diffperception.models.base import fingerprint, save_tensors
from diffperception.segmentation.features import FeatureExtractor
from diffperception.segmentation.maps import FeatureMaps


def stored_bytes(features: FeatureExtractor, sizes: Iterable[Sequence[int]], dtype: torch.dtype) -> int:
    """What the maps of images of these heights and widths take, exactly."""
    maps = [pair for size in sizes for pair in zip(features.info, features.map_sizes(*size), strict=True)]
    return sum(info.channels * math.prod(cells) for info, cells in maps) * dtype.itemsize


def file_bytes(features: FeatureExtractor, size: tuple[int, int], dtype: torch.dtype) -> int:
    """What :func:`save_maps` writes for an image of this height and width, exactly."""
    header: dict[str, Any] = {"__metadata__": _metadata(features.info, size, 32 * "0")}
    maps = zip(features.info, features.map_sizes(*size), strict=True)
    end = 0
    for info, cells in sorted(maps, key=lambda pair: pair[0].name):
        shape = [info.channels, *cells]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[info.name] = {"dtype": f"F{8 * dtype.itemsize}", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return 8 + 8 * math.ceil(len(text) / 8) + end  # its length comes first, and spaces fill it up


class CachedFeatures(FeatureExtractor):
    """An extractor that keeps the maps of each image in memory; ValueError where one is too large for their dtype."""

    def __init__(self, features: FeatureExtractor, dtype: torch.dtype = torch.float16) -> None:
        super().__init__(features.info, features.multiple, features.window)
        self.features, self.dtype = features, dtype
        self.kept: dict[str, FeatureMaps] = {}

    def encode(self, images: Tensor) -> list[Tensor]:
        return self.features.encode(images)

    def maps(self, image: Tensor) -> FeatureMaps:
        key = image_key(image)
        if key not in self.kept:
            self.kept[key] = self.features.maps(image).stored(self.dtype, "an image")
        return self.kept[key].to(torch.float32)

    def portable(self) -> FeatureExtractor:
        return self.features.portable()


def image_key(image: Tensor) -> str:
    """A short name for the pixels of an image (3, H, W) on any device."""
    pixels = image.detach().cpu().contiguous()
    about = f"{pixels.dtype} {tuple(pixels.shape)}".encode()
    return hashlib.sha256(about + pixels.numpy().tobytes()).hexdigest()[:32]


def save_maps(maps: FeatureMaps, info: Sequence[FeatureInfo], path: Path, key: str) -> None:
    """Write the maps of an image of some :func:`image_key` to a safetensors file, by their names and in their type."""
    tensors = {about.name: m.cpu().contiguous() for about, m in zip(info, maps.maps, strict=True)}
    save_tensors(tensors, path, _metadata(info, maps.size, key))


def _metadata(info: Sequence[FeatureInfo], size: tuple[int, int], key: str) -> dict[str, str]:
    about = {"names": [about.name for about in info], "strides": [about.stride for about in info], "size": size}
    return {"maps": json.dumps(about | {"image": key})}


def load_maps(path: Path) -> FeatureMaps:
    """Read what :func:`save_maps` wrote; ValueError for another file."""
    with _opened_maps(path) as (file, about):
        return FeatureMaps([file.get_tensor(name) for name in about["names"]], about["strides"], tuple(about["size"]))


def kept_images(folder: Path) -> dict[str, Path]:
    """The files of maps in a folder and its subfolders, by the keys of their images."""
    found = {}
    for path in sorted(folder.rglob("*.*.safetensors")):  # image.png.safetensors
        with _opened_maps(path) as (_, about):
            found[about["image"]] = path
    return found


@contextmanager
def _opened_maps(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A file of maps, and what it says of them."""
    try:
        with safe_open(path, "pt") as file:
            yield file, json.loads((file.metadata() or {})["maps"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no feature maps ({error}): `diffperception extract` writes them") from None


def settings_of(features: FeatureExtractor) -> dict[str, Any]:
    """What the maps of an extractor depend on besides the images, as JSON has it: class, arguments and weights."""
    about = fingerprint(features)
    return {"class": about["class"], "features": about["arguments"], "weights": about["weights"]}


def parse_bytes(text: str) -> int:
    """`2GB`, `500 MB` or `1.5e9` in bytes; k, M, G and T are powers of 1000. ValueError for anything else."""
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    try:
        number, unit = found.groups() if found else ("", "")
        return round(float(number) * 1000 ** " kmgt".index(unit or " "))
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no amount of memory: write 2GB or 500MB, for example") from None


def in_bytes(number: int) -> str:
    """`1.2 GB`."""
    names = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(names) - 1, (len(str(number)) - 1) // 3)
    return f"{number / 1000**power:.{min(power, 1)}f} {names[power]}"
