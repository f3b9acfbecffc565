"""The images that a run of training learned from, cropped as it cropped them."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from diffperception.configuration.base import given, spread_files
from diffperception.data.batches import SeededSamples
from diffperception.data.image_folder import ImageFolder
from diffperception.data.images import LazyMap
from diffperception.diffusion import sample_seed
from diffperception.models.unet.encoder import both_sides
from diffperception.training.configured import options_for
from diffperception.training.recipes.generation import ImageDataOptions


def training_crops(config: Path, number: int, seed: int) -> LazyMap[Tensor]:
    """Crops (3, H, W), 0..1, of the images that a generator learned from, each a function of the seed and its number.

    Args:
        config: the configuration of the run.
        number: how many crops.

    Raises:
        ValueError, ArgumentError: the file does not hold the options of such a run.
    """
    if not config.is_file():
        raise FileNotFoundError(f"there is no file {config}: give the config.yaml of a training run, or a folder")
    arguments = ["--config", str(config)]
    if given(spread_files(arguments), "task") != "generation":
        raise ValueError(f"{config} is not the config.yaml of a training of a generator")
    parsed = options_for(arguments).parse(arguments)
    model, data = parsed.model.init_args, ImageDataOptions(**vars(parsed.data))
    channels = model.network.init_args.in_channels
    train_set, _ = replace(data, val_images=None).open(both_sides(model.image_size), channels)
    return LazyMap(partial(_crop, train_set, seed), range(number))


def _crop(folder: ImageFolder, seed: int, number: int) -> Tensor:
    image, _ = SeededSamples(folder)[number % len(folder), sample_seed(seed, number)]
    return image.expand(3, -1, -1)
