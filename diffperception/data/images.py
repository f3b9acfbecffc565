"""Reading images from disk."""

import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

Result = TypeVar("Result")


class BrokenImageError(ValueError):
    """An image that cannot be read or is not the one its annotation describes; the message names the file."""


class ImageSample(NamedTuple):
    """An image file: float32 (3, H, W), RGB, 0..1, or uint8 where asked for; or None and what the problem is."""

    path: Path
    image: Tensor | None
    problem: str = ""


class LazyMap(Sequence[Result], Dataset[Result]):
    """`function(item)` for each of the items, computed whenever it is asked for."""

    def __init__(self, function: Callable[[Any], Result], items: Sequence[Any]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        items = self.items[index]
        return LazyMap(self.function, items) if isinstance(index, slice) else self.function(items)


def read_ahead(samples: LazyMap[Result], batch_size: int, workers: int) -> DataLoader[Result]:
    """Batches, lists of samples, that as many processes read ahead as there is work for."""
    workers = min(workers, max(0, len(samples) - 1) // batch_size)
    return DataLoader(samples, batch_size, num_workers=workers, collate_fn=list, worker_init_fn=ignore_interrupts)


def load_images(
    paths: Sequence[Path], batch_size: int = 1, workers: int = 0, as_uint8: bool = False
) -> DataLoader[ImageSample]:
    """Batches of image files, broken ones included, that other processes read ahead; as uint8 they need a quarter."""
    return read_ahead(LazyMap(partial(_read_sample, as_uint8), paths), batch_size, workers)


def _read_sample(as_uint8: bool, path: Path) -> ImageSample:
    try:
        image = read_image(path)
        return ImageSample(path, image if as_uint8 else to_float(image))
    except BrokenImageError as error:
        return ImageSample(path, None, str(error))


def ignore_interrupts(worker: int = 0) -> None:
    """For workers that read images: Ctrl-C reaches them too, but it is the main process that ends the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def to_float(image: Tensor) -> Tensor:
    """uint8 0..255 to float32 0..1."""
    return F.to_dtype(image, torch.float32, scale=True)


def short_side_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """The height and width that `resize_short_side` gives an image."""
    if short_side is None:
        return height, width
    long_side = int(short_side * max(height, width) / min(height, width))
    return (short_side, long_side) if height <= width else (long_side, short_side)


def resize_short_side(image: Tensor, short_side: int | None, nearest: bool = False) -> Tensor:
    """Resize (..., H, W) to a short side in pixels, with antialiasing or, labels, to the nearest; None leaves it."""
    if short_side is None:
        return image
    mode = InterpolationMode.NEAREST_EXACT if nearest else InterpolationMode.BILINEAR
    return F.resize(image, [short_side], mode, antialias=not nearest)


def read_size(path: Path) -> tuple[int, int]:
    """Height and width, as `read_image` gives them, from an image's header; BrokenImageError if it cannot be read."""
    try:
        with Image.open(path) as image:
            exif = Image.Image.getexif(image)  # that of PngImageFile would decode all pixels first
            size = (exif[256], exif[257]) if image.format == "TIFF" else image.size  # newer Pillows turn that of a TIFF
            return size if exif.get(ExifTags.Base.Orientation, 1) > 4 else (size[1], size[0])
    except Exception as error:  # Pillow raises many kinds on bad bytes
        raise BrokenImageError(f"the image {path} cannot be read: {error}") from error


def read_image(path: str | Path) -> Tensor:
    """Decode any image that Pillow knows to uint8 (3, H, W) RGB, turned upright as its EXIF orientation says.

    Grey images are repeated over the channels, 16-bit grey is scaled to 8 bits, an alpha channel is left out. Raises
    BrokenImageError where the file is missing, cut off (which torchvision.io would fill with grey) or broken.
    """
    if not Path(path).is_file():
        raise BrokenImageError(f"the image {path} is missing")
    try:
        with Image.open(path) as image:
            pixels = _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others on bad bytes
        raise BrokenImageError(f"the image {path} cannot be read: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I", "I;16", "I;16B"):
        # Pillow's own conversion of 16-bit grey saturates at 255.
        grey = np.clip(np.asarray(image) // 257, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))
