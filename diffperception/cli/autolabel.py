"""`diffperception autolabel`."""

from pathlib import Path

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from tqdm import tqdm

from diffperception.devices import Precision, pick_device
from diffperception.echo import echo, echo_left_out, plural
from diffperception.generation import SamplingOptions
from diffperception.generation.inference import draw_samples
from diffperception.models import DiffusionModel
from diffperception.segmentation import PixelSegmenter
from diffperception.segmentation import autolabel as label_images


def autolabel(
    model: Path,
    output: Path,
    images: str | None = None,
    generator: Path | None = None,
    num_samples: PositiveInt = 1000,
    drop: ClosedUnitInterval = 0.1,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (the defaults are not changed)
    batch_size: PositiveInt = 16,
    seed: NonNegativeInt = 0,
    workers: NonNegativeInt = 2,
    device: str = "auto",
    precision: Precision = "32",
    trust: str | None = None,
) -> None:
    """Label images with a trained segmenter, and keep those that it is sure of: a data set to train any network on.

    The images are those of a folder, or samples of a generator. Writes OUTPUT/images and OUTPUT/masks (PNG, in each
    pixel its class's number), which `train --task segmentation` takes as data.images and data.masks, and
    OUTPUT/dataset.json: the classes, each image's uncertainty (in nats, the mean of its most uncertain tenth) and
    fractions of classes, and which images were dropped for being the most uncertain. Images that cannot be read are
    left out and named at the end. The folder appears once all of it is finished.

    Args:
        model: the segmenter, a model.safetensors file.
        output: folder for the data set; it must be empty.
        generator: a model.safetensors file to draw images from instead; the classes that it has take turns.
        num_samples: how many images to draw from the generator.
        drop: fraction of the images to drop, the most uncertain.
        sampling: how images are drawn from the generator.
        batch_size: images drawn at once.
        seed: seed of the noise that the generator's images are drawn from.
    """
    if (images is None) == (generator is None):
        raise ValueError("give either --images or a --generator to draw them from")
    place, allow = pick_device(device), (trust,) if trust else ()
    segmenter = PixelSegmenter.load(model, place, allow=allow)
    if generator is None:
        result = label_images(segmenter, str(images), output, drop, workers, precision)
    else:
        source = DiffusionModel.load(generator, place, allow=allow)
        batches = draw_samples(source, range(num_samples), sampling, seed, batch_size=batch_size)
        pool = (image.cpu().expand(3, -1, -1) for _, batch in batches for image in batch)
        shown = tqdm(pool, "autolabel", num_samples, unit="image", disable=None)
        result = label_images(segmenter, shown, output, drop, 0, precision, str(generator))
    echo(
        f"{output}: {plural(len(result.kept), 'image')} with masks of {', '.join(segmenter.classes)}; dropped as the"
        f" most uncertain: {len(result.dropped)}"
    )
    echo_left_out(result.broken)
