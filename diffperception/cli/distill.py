"""`diffperception distill`."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffperception.cli import counted, say
from diffperception.cli.segment import shares
from diffperception.data.image_folder import require_image_channels
from diffperception.data.images import ImageFiles
from diffperception.devices import pick_device
from diffperception.files import list_images as find_images
from diffperception.files import png_names as name_pictures
from diffperception.files import write_text
from diffperception.generation import DiffusionModel, SamplingOptions
from diffperception.generation.inference import draw_samples
from diffperception.segmentation import PixelSegmenter
from diffperception.visualization.draw import save_png, to_pil

DRAWN = 1000  # images of a generator, where no number is given


class Unlabelled(NamedTuple):
    """An image (3, H, W), 0..1, and the name of its PNG; or None and what the problem is."""

    name: Path
    image: Tensor | None
    problem: str = ""


class Labelled(NamedTuple):
    """What is said of an image in dataset.json."""

    name: str
    uncertainty: float
    shares: list[float]


def distill(
    model: Path,
    output: Path,
    images: str | None = None,
    generator: Path | None = None,
    number: PositiveInt = DRAWN,
    drop: ClosedUnitInterval = 0.1,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (the defaults are not changed)
    batch_size: PositiveInt = 16,
    seed: NonNegativeInt = 0,
    device: str = "auto",
) -> None:
    """Label images with a trained segmenter, and keep those that it is sure of: a data set to train any network on.

    The images are those of a folder, or samples of a generator. Writes OUTPUT/images and OUTPUT/masks (PNG, in each
    pixel its class's number), which `train --task segmentation` takes as data.images and data.masks, and
    OUTPUT/dataset.json: the classes, each image's uncertainty (in nats, the mean of its most uncertain tenth) and
    shares of classes, and which images were dropped for being the most uncertain. Images that cannot be read are left
    out and named at the end. All of it is in OUTPUT.part until it is finished; what an interrupted run has left there
    is replaced.

    Args:
        model: the segmenter, a model.safetensors file.
        output: folder for the data set; it must be empty.
        images: an image, a folder (its subfolders count too), or a pattern in quotes such as 'photos/*.jpg'.
        generator: a model.safetensors file to draw images from instead; the classes that it has take turns.
        number: how many images to draw from the generator.
        drop: share of the images to drop, the most uncertain.
        sampling: how images are drawn from the generator.
        batch_size: images drawn at once.
        seed: of the noise that the generator's images are drawn from.
        device: cpu, cuda, cuda:1, ... or auto.
    """
    if (images is None) == (generator is None):
        raise ValueError("give either --images or a --generator to draw them from")
    if images is not None and (number != DRAWN or sampling != SamplingOptions() or seed):
        raise ValueError(
            "number, sampling and seed are of images drawn from a --generator: leave them out for --images"
        )
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"{output} is not an empty folder: choose another --output")
    if drop == 1:
        raise ValueError("drop 1 would leave no image: give a smaller share, such as 0.1")
    beside = output.absolute().with_name(f"{output.absolute().name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    place = pick_device(device)
    if generator is not None:
        pool = samples(DiffusionModel.load(generator).to(place), number, sampling, batch_size, seed)
    else:
        root, paths = find_images(str(images), output)
        pool, number = files(root, paths), len(paths)
    segmenter = PixelSegmenter.load(model).to(place)
    if drop and segmenter.classifier.members < 2:
        raise ValueError(
            f"{model} has a single member, which agrees with itself, so no image is more uncertain than another: train"
            " it with several, or keep all images with --drop 0"
        )
    kept, dropped, broken = label(segmenter, tqdm(pool, "distill", number, unit="image", disable=None), drop, beside)
    content = {
        "classes": segmenter.classes,
        "model": str(model),
        "source": str(generator or images),
        "images": [labelled._asdict() for labelled in kept],
        "dropped": [labelled._asdict() for labelled in dropped],
    }
    write_text(beside / "dataset.json", json.dumps(content, indent=2) + "\n")
    if output.exists():
        output.rmdir()  # the empty folder that it was at the beginning
    os.replace(beside, output)
    say(
        f"{output}: {counted(len(kept), 'image')} with masks of {', '.join(segmenter.classes)}; dropped as the most"
        f" uncertain: {len(dropped)}"
    )
    if broken:
        say("\n".join([f"{counted(len(broken), 'image')} left out:", *(f"  {problem}" for problem in broken)]))


def files(root: Path, paths: Sequence[Path]) -> Iterator[Unlabelled]:
    """The images of files."""
    names = name_pictures([path.relative_to(root) for path in paths])
    pictures = ImageFiles(list(paths))
    for index in range(len(pictures)):
        path, image, problem = pictures[index]
        yield Unlabelled(names[path.relative_to(root)], image, problem)


def samples(
    generator: DiffusionModel, number: int, sampling: SamplingOptions, batch_size: int, seed: int
) -> Iterator[Unlabelled]:
    """Images from a generator, as `sample` draws them."""
    require_image_channels(generator.space.image_channels)
    for numbers, images in draw_samples(generator, range(number), sampling, seed, None, batch_size):
        for index, image in zip(numbers, images.cpu(), strict=True):
            yield Unlabelled(Path(f"{index:06}.png"), image.expand(3, -1, -1))


def label(
    segmenter: PixelSegmenter, pool: Iterator[Unlabelled], drop: float, output: Path
) -> tuple[list[Labelled], list[Labelled], list[str]]:
    """Write images and masks, then remove the most uncertain.

    Returns: the images kept, by their names, those dropped, the most uncertain first, and the problems of others.

    Raises:
        ValueError: none can be read.
    """
    found: list[Labelled] = []
    broken: list[str] = []
    for name, image, problem in pool:
        if image is None:
            broken.append(problem)
            continue
        segmentation = segmenter.segment(image)
        save_png(to_pil(image), output / "images" / name)
        save_png(Image.fromarray(segmentation.labels.byte().cpu().numpy()), output / "masks" / name)
        shown = shares(segmentation.labels, len(segmenter.classes))
        found.append(Labelled(name.as_posix(), segmentation.score, shown))
    if not found:
        raise ValueError(f"no image can be read: {broken[0]}")
    order = sorted(found, key=lambda labelled: -labelled.uncertainty)
    dropped = order[: min(round(drop * len(order)), len(order) - 1)]
    kept = sorted(order[len(dropped) :])
    for labelled in dropped:
        for kind in ("images", "masks"):
            (output / kind / labelled.name).unlink()
    return kept, dropped, broken
