"""`diffperception autolabel`."""

from functools import partial
from pathlib import Path
from typing import Annotated

from jsonargparse.typing import NonNegativeInt, PositiveInt

from diffperception.configuration.parser import OptionsOf
from diffperception.devices import pick_device
from diffperception.echo import echo, echo_left_out, plural
from diffperception.generation import SamplingOptions
from diffperception.generation.inference import SampledImages
from diffperception.models import DiffusionModel
from diffperception.segmentation import PixelSegmenter, autolabel
from diffperception.segmentation.autolabel import LabelledSet


def command(
    model: Path,
    label: Annotated[partial[LabelledSet], OptionsOf(autolabel, "model", "images", "source", "drawn")],
    images: str | None = None,
    generator: Path | None = None,
    num_samples: PositiveInt = 1000,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (the defaults are not changed)
    batch_size: PositiveInt = 16,
    seed: NonNegativeInt = 0,
    device: str = "auto",
) -> None:
    """Label images with a trained segmenter, and keep those that it is sure of: a data set to train any network on.

    The images are those of a folder, or samples of a generator. Writes OUTPUT/images and OUTPUT/masks (PNG, in each
    pixel its class's number), which `train --task segmentation` takes as data.images and data.masks, and
    OUTPUT/dataset.json: the classes, each image's uncertainty (in nats, the mean of its most uncertain tenth) and
    fractions of classes, and which images were dropped for being the most uncertain. Images that cannot be read are
    left out and named at the end. dataset.json is written once all images are done. The command can be interrupted:
    given again, it goes on with the images that are missing, and does those anew that have changed.

    Args:
        generator: a model.safetensors file to draw images from instead; the classes that it has take turns.
        num_samples: how many images to draw from the generator.
        sampling: how images are drawn from the generator.
        batch_size: images drawn at once.
        seed: seed of the noise that the generator's images are drawn from.
    """
    if (images is None) == (generator is None):
        raise ValueError("give either --images or a --generator to draw them from")
    place = pick_device(device)
    segmenter = PixelSegmenter.load(model, place)
    if generator is None:
        result = label(segmenter, str(images))
    else:
        samples = SampledImages(DiffusionModel.load(generator, place), num_samples, sampling, seed, batch_size)
        result = label(segmenter, samples, source=str(generator), drawn=samples.about)
    masks = f"{plural(len(result.kept), 'image')} with masks of {', '.join(segmenter.classes)}"
    echo(f"{label.keywords['output']}: {masks}; dropped as the most uncertain: {len(result.dropped)}")
    echo_left_out(result.broken)
