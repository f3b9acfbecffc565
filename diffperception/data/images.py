"""Reading pictures from disk."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class BrokenImageError(ValueError):
    """A picture that cannot be read or is not the one its annotation describes; the message names the file."""


def read_image(path: str | Path) -> Tensor:
    """Decode any picture that Pillow knows to uint8 (3, H, W) RGB, turned upright as its EXIF orientation says.

    Grey pictures are repeated over the channels, 16-bit grey is scaled to 8 bits, an alpha channel is left out. Pillow
    is preferred to torchvision.io because it refuses a file that is cut off instead of filling the rest with grey.
    Raises BrokenImageError where the file is missing or cannot be decoded.
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
