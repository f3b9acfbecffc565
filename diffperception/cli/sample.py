"""`diffperception sample`."""

from pathlib import Path

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from diffperception.devices import Precision
from diffperception.echo import echo
from diffperception.generation import SamplingOptions
from diffperception.generation.inference import sample_folder
from diffperception.models.unet.encoder import both_sides


def sample(
    model: Path,
    output: Path,
    number: PositiveInt = 64,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (the defaults are not changed)
    classes: list[str] | None = None,
    classifier: Path | None = None,
    classifier_scale: NonNegativeFloat | None = None,
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None,
    device: str = "auto",
    precision: Precision = "32",
    batch_size: PositiveInt = 16,
    seed: NonNegativeInt = 0,
    overwrite: bool = False,
) -> None:
    """Draw images from a trained generator: numbered PNG files in OUTPUT/images, and OUTPUT/grid.png.

    Every image is a function of the seed and its number, up to rounding. With `--classes` the classes take turns; the
    files of class K are in OUTPUT/images/K. Several processes (torchrun) share the images.

    Args:
        model: the generator, a model.safetensors file.
        output: folder for the images.
        number: how many images to draw.
        sampling: how noise becomes an image.
        classes: names of the classes to draw; by default all that the generator has.
        classifier: a noisy classifier, a model.safetensors file, that pulls the images towards the classes.
        classifier_scale: how hard the classifier pulls; by default 1.
        image_size: side, or [height, width], of the images in pixels; by default that of the images the generator
            learned from.
        batch_size: images drawn at once.
        seed: the seed of the noise.
        overwrite: write into a folder that is not empty; the images that an earlier call wrote are removed.
    """
    if classifier is None and classifier_scale is not None:
        raise ValueError("classifier_scale is given without a classifier: name one with --classifier, or leave it out")
    pull = (classifier, 1.0 if classifier_scale is None else classifier_scale)
    size = None if image_size is None else both_sides(image_size)
    sample_folder(model, output, number, sampling, classes, *pull, size, batch_size, seed, device, precision, overwrite)
    echo(f"{output / 'images'}: {number} images\n{output / 'grid.png'}: the first ones")
