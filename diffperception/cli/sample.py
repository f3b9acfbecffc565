"""`diffperception sample`."""

import re
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from tqdm import tqdm

from diffperception.cli import say
from diffperception.cli.evaluate import pick_device
from diffperception.cli.predict import require_room
from diffperception.data.image_folder import require_image_channels
from diffperception.diffusion import Denoiser, classifier_guidance
from diffperception.generation import DiffusionModel, SamplingOptions
from diffperception.generation import sample as draw
from diffperception.models import NoisyClassifier
from diffperception.visualization.draw import save_png, to_pil
from diffperception.visualization.panels import image_grid

MOST_IN_GRID = 144
NUMBERED = re.compile(r"\d{6,}\.png")


def sample(
    model: Path,
    output: Path,
    number: PositiveInt = 64,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (the defaults are not changed)
    classes: list[str] | None = None,
    classifier: Path | None = None,
    classifier_scale: NonNegativeFloat | None = None,
    height: PositiveInt | None = None,
    width: PositiveInt | None = None,
    batch_size: PositiveInt = 16,
    seed: NonNegativeInt = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Draw images from a trained generator: numbered PNG files in OUTPUT/images, and OUTPUT/grid.png.

    Every image is a function of the seed and its number, whatever the batch size and device. With `--classes` the
    classes take turns; the files of class K are in OUTPUT/images/K.

    Args:
        model: the generator, a model.safetensors file.
        output: folder for the images.
        number: how many images.
        sampling: how noise becomes an image.
        classes: names of the classes to draw; by default all that the generator has.
        classifier: a noisy classifier, a model.safetensors file, that pulls the images towards the classes.
        classifier_scale: how hard it pulls; by default 1.
        height: of the images, in pixels; by default that of the images the generator learned from.
        width: likewise.
        batch_size: images drawn at once.
        seed: of the noise.
        device: cpu, cuda, cuda:1, ... or auto.
        overwrite: write into a folder that is not empty; the numbered images in it are removed.
    """
    require_room(output, overwrite)
    if classifier is None and classifier_scale is not None:
        raise ValueError("classifier_scale is given without a classifier: name one with --classifier, or leave it out")
    generator = DiffusionModel.load(model).to(pick_device(device))
    require_image_channels(generator.unet.in_channels)
    guide = None if classifier is None else load_guide(classifier, generator)
    known = (guide.classes if guide else generator.classes) or []
    labels = choose_labels(known, classes)
    size = (height or generator.image_size[0], width or generator.image_size[1])
    generator.unet.check_size(*size)
    pictures: list[Tensor] = []
    with tqdm(total=number, desc="sample", unit="image", disable=None) as bar:
        for start in range(0, number, batch_size):
            numbers = range(start, min(start + batch_size, number))
            wanted = in_turn(labels, numbers, generator.device)
            denoiser = choose_denoiser(generator, guide, wanted, sampling.guidance, classifier_scale)
            images = draw(generator, numbers, sampling, seed, wanted, size, denoiser).float().cpu()
            if start == 0:  # all options have proved sound
                remove_images(output / "images")
            for index, image in zip(numbers, images, strict=True):
                folder = "" if labels is None else known[int(labels[index % len(labels)])]
                save_png(to_pil(image.expand(3, -1, -1)), output / "images" / folder / f"{index:06}.png")
            pictures.extend(images[: MOST_IN_GRID - len(pictures)])
            bar.update(len(numbers))
    save_png(image_grid(pictures), output / "grid.png")
    say(f"{output / 'images'}: {number} images of {size[0]} x {size[1]} pixels\n{output / 'grid.png'}: the first ones")


def remove_images(folder: Path) -> None:
    """Remove what an earlier call has left, which would be taken for images of this one; no other files."""
    for path in (*folder.glob("*.png"), *folder.glob("*/*.png")):
        if NUMBERED.fullmatch(path.name):
            path.unlink()


def load_guide(path: Path, generator: DiffusionModel) -> NoisyClassifier:
    """The classifier that a file holds; ValueError unless it has learned the generator's path and classes."""
    guide = NoisyClassifier.load(path).to(generator.device)
    for name in ("schedule", "num_timesteps", "in_channels"):
        own, other = guide.arguments[name], (generator.arguments | generator.unet.arguments)[name]
        if own != other:
            raise ValueError(
                f"{path} has learned with {name} {own}, but the generator with {other}: train it as the generator was"
            )
    if generator.classes is not None and generator.classes != guide.classes:
        raise ValueError(
            f"{path} knows the classes {', '.join(guide.classes)}, but the generator {', '.join(generator.classes)}:"
            " train it on pictures of the same classes"
        )
    return guide


def choose_labels(known: list[str], classes: list[str] | None) -> Tensor | None:
    """The labels of the classes to draw, (n,), all that are known by default; None where none are.

    Raises:
        ValueError: for a class that is not known.
    """
    unknown = [name for name in classes or [] if name not in known]
    if unknown:
        raise ValueError(
            f"there is no class {unknown[0]}: the generator knows {', '.join(known)}"
            if known
            else "this generator was trained without classes: leave --classes out, or give a --classifier"
        )
    return torch.tensor([known.index(name) for name in classes or known]) if known else None


def in_turn(labels: Tensor | None, numbers: range, device: torch.device) -> Tensor | None:
    """The labels (B,) of images of these numbers, which take turns; None where there are none."""
    return None if labels is None else labels[torch.tensor(numbers) % len(labels)].to(device)


def choose_denoiser(
    generator: DiffusionModel,
    guide: NoisyClassifier | None,
    labels: Tensor | None,
    guidance: float,
    scale: float | None,
) -> Denoiser:
    """The generator's denoiser, pulled towards the labels, by default at scale 1, by a classifier if there is one."""
    if guide is None or labels is None:
        return generator.denoiser(labels, guidance)
    own = generator.denoiser(None if generator.classes is None else labels, guidance)
    return classifier_guidance(own, guide.log_probability(labels), generator.schedule, 1.0 if scale is None else scale)
