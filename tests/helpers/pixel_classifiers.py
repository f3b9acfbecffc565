"""Pixel classifiers as the reference builds them, and features for them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffperception.models import DiffusionModel, UNet
from diffperception.segmentation import DiffusionFeatures, PixelEnsemble
from diffperception.segmentation.maps import FeatureMaps
from diffperception.segmentation.mlp import PixelMLPs
from diffperception.training.options import TrainerOptions
from diffperception.training.recipes.baseline import BaselineModule, BaselineOptions, CropBatches
from diffperception.training.run import fit_quietly
from tests.helpers.networks import plain_classifier, tiny_unet


def generator(network: UNet | None = None, side: int = 32, **options: object) -> DiffusionModel:
    """A generator that has learned nothing, of a UNet whose blocks all say something."""
    return DiffusionModel(None, network or tiny_unet(), image_size=side, **options).eval()  # type: ignore[arg-type]


def diffusion(window: int = 32, **changes: object) -> DiffusionFeatures:
    arguments = {"blocks": (0, 3, 4), "timesteps": (50, 250), "window": window}
    return DiffusionFeatures(generator(), **arguments | changes)  # type: ignore[arg-type]


def random_maps(height: int, width: int, strides: tuple[int, ...] = (8, 4, 8, 2, 1)) -> FeatureMaps:
    generator = torch.Generator().manual_seed(0)
    cells = [(-(-height // 8) * 8 // s, -(-width // 8) * 8 // s) for s in strides]
    maps = [torch.randn(3 + i, *cell, generator=generator) for i, cell in enumerate(cells)]
    return FeatureMaps(maps, list(strides), (height, width))


def member(mlps: PixelMLPs, index: int) -> nn.Sequential:
    """One member as the reference builds it."""
    weight = [layer.weight[index] for layer in mlps.linears]
    state = {name.removeprefix("layers."): value[index].clone() for name, value in mlps.state_dict().items()}
    network = plain_classifier(weight[0].shape[1], *map(len, weight)).to(weight[0].dtype)
    network.load_state_dict(state, strict=False)
    return network


def trained_like(ensemble: PixelEnsemble) -> PixelEnsemble:
    """Weights and statistics as of a trained ensemble: none is 0, 1 or tiny."""
    generator = torch.Generator().manual_seed(0)
    for name, value in ensemble.state_dict().items():
        value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        if "var" in name:
            value.abs_().add_(0.5)
    return ensemble.eval()


class Classifier(nn.Module):
    """The layout of the reference's classifier."""

    def __init__(self, channels: int = 25, classes: int = 5, first: int = 128, second: int = 32) -> None:
        super().__init__()
        self.layers = plain_classifier(channels, first, second, classes)
        for buffer in self.buffers():
            if buffer.is_floating_point():
                buffer.data = 0.5 + torch.rand_like(buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def write_classifier(path: Path, network: Classifier) -> Path:
    """As a file of the reference."""
    torch.save({"model_state_dict": nn.DataParallel(network).state_dict()}, path)
    return path


def train_from_scratch(
    unet: UNet, images: Sequence[Tensor], masks: Sequence[Tensor], options: BaselineOptions, seed: int
) -> UNet:
    """The UNet trained to tell the classes of pixels, on the CPU."""
    module, crops = BaselineModule(unet, options, seed), CropBatches(images, masks, options, seed)
    return fit_quietly(module, crops, TrainerOptions(accelerator="cpu"))
