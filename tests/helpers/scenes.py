"""Pictures of three colours with their masks, and features of them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffperception.models import FeatureInfo
from diffperception.segmentation import FeatureExtractor
from diffperception.visualization.draw import save_png, to_pil


def scene(seed: int = 0, height: int = 30, width: int = 45) -> tuple[Tensor, Tensor]:
    """A picture of three colours in noise, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(height, width, dtype=torch.int64)
    mask[: height // 2] = 1
    mask[:, : width // 3] = 2
    image = F.one_hot(mask, 3).permute(2, 0, 1) * 0.6 + 0.4 * torch.rand(3, height, width, generator=generator)
    return image, mask


def write_scenes(folder: Path, numbers: range) -> None:
    for number in numbers:
        image, mask = scene(number, 24, 32)
        save_png(to_pil(image), folder / "images" / f"{number}.png")
        save_png(Image.fromarray(mask.byte().numpy()), folder / "masks" / f"{number}.png")


class Pyramid(FeatureExtractor):
    """Averages and edges of the colours at several strides, in an order that mixes the strides."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__([FeatureInfo(str(s), 3, s) for s in (4, 1, 2, 4)], 4)
        self.scale = scale

    def encode(self, images: Tensor) -> list[Tensor]:
        pooled = [F.avg_pool2d(images - 0.5, s) for s in (4, 1, 2, 4)]
        return [*(self.scale * m for m in pooled[:3]), self.scale * pooled[3].square()]
