"""Reading images from disk."""

import os
import signal
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from diffperception.files import existing

Result = TypeVar("Result")
MAX_PIXELS = 2**30  # of an image: 3 GB in RGB, 13 GB as numbers to compute with
SNIFFED = 64  # bytes at the beginning of a file, by which it is known
TAIL = 2**16  # bytes at the end of a PNG in which metadata is looked for
OPENING = Lock()  # Pillow's limit belongs to the process, and its threads open images too
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


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


@contextmanager
def open_image(path: str | Path, kind: str = "image") -> Iterator[Image.Image]:
    """An image file as Pillow opens it, its pixels not read yet; HEIF too, and more pixels than Pillow's limit.

    Args:
        kind: what the file is called in errors.

    Raises:
        BrokenImageError: here or in the block, whatever goes wrong with the file.
    """
    path = existing(Path(path))
    if not path.is_file():
        raise BrokenImageError(f"the {kind} {path} is missing")
    try:
        # From a file that is open, not from its name: those Pillow maps into memory, and then scrambles TIFFs that are
        # stored on their side.
        with open(path, "rb") as file, _identified(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImageError(
                    f"the {kind} {path} has {image.height} x {image.width} pixels, more than the {MAX_PIXELS} that are"
                    " read at once: cut it into tiles"
                )
            yield image
    except (BrokenImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others on bad bytes
        raise BrokenImageError(f"the {kind} {path} cannot be read: {error}") from error


def _opened(file: BufferedReader) -> Image.Image:
    """What Pillow opens, without its limit of pixels: that is for files from strangers."""
    with OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _identified(file: BufferedReader) -> Image.Image:
    try:
        return _opened(file)
    except UnidentifiedImageError:
        file.seek(0)
        head = file.read(SNIFFED)
        file.seek(0)
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
        try:
            import pillow_heif
        except ImportError:
            raise ValueError("it is HEIF, which needs pillow-heif: pip install 'diffperception[heif]'") from None
        pillow_heif.register_heif_opener()
        return _opened(file)
    raise ValueError(_what_else(head))


def _what_else(head: bytes) -> str:
    """What a file is, by its first bytes, that Pillow knows no format of."""
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS in the place of the image, which `git lfs pull` fetches"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "it is AVIF, which a Pillow from 11.3 on reads: pip install --upgrade pillow"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "Pillow does not know its kind of TIFF: save it with 8 bits per channel, or 16 in grey"
    text = head.decode("utf-8", errors="ignore")
    if text.isprintable() or (len(text) > len(head) // 2 and all(c.isprintable() or c.isspace() for c in text)):
        return f"it is text that begins with {textwrap.shorten(text, 40)!r}"
    return "it is of no format that Pillow knows, or its beginning is broken"


def read_size(path: str | Path) -> tuple[int, int]:
    """Height and width, as `read_image` gives them, from an image's header; BrokenImageError if it cannot be read."""
    with open_image(path) as image:
        if image.format == "PNG" and _ends_with_metadata(existing(Path(path))):
            image.load()
        exif = Image.Image.getexif(image)  # that of PngImageFile would decode all pixels first
        size = (exif[256], exif[257]) if image.format == "TIFF" else image.size  # newer Pillows turn that of a TIFF
        return size if exif.get(ExifTags.Base.Orientation, 1) > 4 else (size[1], size[0])


def is_deep_grey(path: str | Path) -> bool:
    """Whether an image has more than 8 bits of grey, which may not be those that can be scaled."""
    with open_image(path) as image:
        return _is_deep(image)


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _ends_with_metadata(path: str | Path) -> bool:
    """Whether a PNG may say which side is up only after its pixels."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        end = file.read()
    return any(name in end for name in (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp"))


def read_image(path: str | Path) -> Tensor:
    """Decode any image that Pillow knows to uint8 (3, H, W) RGB, turned upright as its EXIF orientation says.

    Of several frames or pages it is the first. What is transparent is laid on white. Grey is repeated over the
    channels; the type of the file says what is white, never the values of one image: 65535 of 16 bits, 4095 of 12, 255
    of 32-bit whole numbers and 1 of floating-point numbers.

    Raises:
        BrokenImageError: the file is missing, cut off (which torchvision.io would fill with grey), broken, has values
            above white or below 0, or has 16 bits of which it uses less than a sixteenth.
    """
    with open_image(path) as image:
        pixels = _rgb(ImageOps.exif_transpose(image), _white_of(image), path, _is_negative(image))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _white_of(image: Image.Image) -> int:
    """The value of white in grey of more than 8 bits, as the type of the file says."""
    if image.mode == "F":
        return 1
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these hold 16 bits, which some Pillows give as I
        return 255
    bits = image.tag_v2.get(258, (16,))[0] if isinstance(image, TiffImageFile) else 16
    return 2**bits - 1


def _is_negative(image: Image.Image) -> bool:
    """Whether 0 is white in grey of more than 8 bits, which Pillow gives as it is in the file."""
    return isinstance(image, TiffImageFile) and image.tag_v2.get(262) == 0


def _rgb(image: Image.Image, white: int, path: str | Path, negative: bool = False) -> np.ndarray:
    """The pixels, uint8 (H, W, 3)."""
    if _is_deep(image):
        grey = np.asarray(image)
        eight = _eight_bits(white - grey if negative else grey, white, path)
        pixels = np.repeat(eight[..., None], 3, axis=2)
        pixels[grey == image.info.get("transparency", -1)] = 255
        return pixels
    if image.has_transparency_data:
        # Pillow has no way from La to RGBA but over LA.
        whole = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        alpha = whole.getchannel("A")
        if np.asarray(alpha).min() < 255:
            ground = Image.new("RGB", whole.size, "white")
            ground.paste(whole, mask=alpha)
            return np.array(ground)
        image = whole
    return np.array(image.convert("RGB"))


def _eight_bits(grey: np.ndarray, white: int, path: str | Path) -> np.ndarray:
    """Grey of more than 8 bits as uint8; BrokenImageError if its values do not fit what white is."""
    least, most = grey.min(), grey.max()  # NaN if there is one
    kind = {1: "32-bit floating-point", 255: "32-bit"}.get(white, "16-bit")
    if not (least * (255 / white) > -0.5 and most * (255 / white) < 255.5):
        raise BrokenImageError(
            f"the image {path} has {kind} grey from {least:g} to {most:g}, where 0 is black and {white} white: scale"
            " all images of the set alike to that, or to 8 or 16 bits"
        )
    if white == 65535 and 0 < most < 4096:
        raise BrokenImageError(
            f"the image {path} has 16-bit grey up to {most} only, of 65535, which would be almost black: scale all"
            " images of the set alike, so that 65535 is white, or to 8 bits"
        )
    if white == 1:
        return np.rint(grey * 255).astype(np.uint8)
    return (grey.astype(np.int64) * 255 // white).astype(np.uint8)
