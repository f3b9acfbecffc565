"""Images from a generator: in batches, or in a folder."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from tqdm import tqdm

from diffperception.data.captions import read_captions
from diffperception.data.image_folder import require_image_channels
from diffperception.data.images import read_image, to_float
from diffperception.devices import (
    Precision,
    autocast,
    barrier,
    first_process,
    hide_bar,
    join_processes,
    pick_device,
    share,
)
from diffperception.diffusion import classifier_guidance
from diffperception.files import read_lines, safe_names, write_json
from diffperception.generation.sampling import SamplingOptions, sample
from diffperception.models import DiffusionModel, NoisyClassifier
from diffperception.models.base import describe, fingerprint
from diffperception.models.conditioners import labels_in_turn
from diffperception.models.text_conditioner import TextReader
from diffperception.models.unet.encoder import both_sides
from diffperception.resumable import Item, ResumableFolder
from diffperception.visualization.draw import save_png, to_pil
from diffperception.visualization.panels import image_grid

MAX_IN_GRID = 144


def draw_samples(
    model: DiffusionModel,
    numbers: Sequence[int],
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (not changed)
    seed: int = 0,
    said: Sequence[str] | None = None,
    batch_size: int = 16,
    image_size: tuple[int, int] | None = None,
    classifier: NoisyClassifier | None = None,
    classifier_scale: float = 1.0,
    unwanted: str | None = None,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Draw images in batches, each image a function of the seed and its number.

    Args:
        numbers: of the images.
        said: names of the classes to draw, or texts, which take turns over the numbers; by default all there are.
        image_size: height and width; by default those of the images that the model learned from.
        classifier: pulls the images towards the classes (ADM, arXiv 2105.05233), which a model without any may then
            be asked for, as hard as `classifier_scale` says.
        unwanted: a text, or the name of a class, that guidance leads away from; by default nothing in particular.

    Yields: the numbers of a batch, and its images (B, C, height, width), float32 in 0..1, on the model's device.

    Raises:
        ValueError: for what the model has not learned, or a classifier of another path or other classes.
    """
    if classifier is not None:
        require_same_path(classifier, model)
    if said and model.conditioner is None and classifier is None:
        raise ValueError("this generator was trained without classes: leave them out, or give a classifier")
    if unwanted and sampling.guidance == 1:
        raise ValueError(
            "only guidance leads away from something, and it is 1, none: give sampling.guidance, such as 3"
        )
    for start in range(0, len(numbers), batch_size):
        batch = numbers[start : start + batch_size]
        conditioner = model.conditioner
        wanted = None if conditioner is None else conditioner.choose(said, batch)
        against = conditioner.choose([unwanted], batch) if unwanted and conditioner is not None else None
        denoiser = model.denoiser(wanted, sampling.guidance, against, sampling.guidance_rescale)
        if classifier is not None:
            labels = labels_in_turn(classifier.classes, said, batch).to(model.device)
            pull = classifier.log_probability(labels)
            denoiser = classifier_guidance(denoiser, pull, model.schedule, classifier_scale)
        yield batch, sample(model, batch, sampling, seed, None, image_size, denoiser).float()


class SampledImages(Sequence[Tensor]):
    """Images (3, H, W), 0..1, on the CPU, of a generator, each drawn, in its batch, when it is asked for.

    The arguments are as for :func:`draw_samples`; `number` is that of the images. `about` is what they hang on.
    """

    def __init__(
        self, model: DiffusionModel, number: int, sampling: SamplingOptions, seed: int = 0, batch_size: int = 16
    ) -> None:
        self.about = {"model": fingerprint(model), "sampling": describe(sampling), "seed": seed}
        self.batches = [range(start, min(start + batch_size, number)) for start in range(0, number, batch_size)]
        self.draw = lambda batch: next(draw_samples(model, batch, sampling, seed, batch_size=batch_size))
        self.drawn: tuple[range, Tensor] = range(0), torch.empty(0)

    def __len__(self) -> int:
        return self.batches[-1].stop

    def __getitem__(self, index: Any) -> Any:
        if index not in self.drawn[0]:
            batch = next(batch for batch in self.batches if index in batch)
            self.drawn = batch, self.draw(batch)[1].cpu()
        return self.drawn[1][self.drawn[0].index(index)].expand(3, -1, -1)


def sample_folder(
    model: DiffusionModel | str | Path,
    output: Path,
    num_samples: PositiveInt = 64,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (not changed)
    classes: list[str] | None = None,
    prompt: list[str] | None = None,
    captions: Path | None = None,
    negative_prompt: str | None = None,
    classifier: NoisyClassifier | str | Path | None = None,
    classifier_scale: NonNegativeFloat | None = None,
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None,
    batch_size: PositiveInt = 16,
    seed: NonNegativeInt = 0,
    device: str = "auto",
    precision: Precision = "32",
    overwrite: bool = False,
) -> None:
    """Draw images from a trained generator: numbered PNG files in OUTPUT/images, and OUTPUT/grid.png.

    Every image is a function of the seed and its number, up to rounding. Where there are classes, they take turns; the
    files of class K are in OUTPUT/images/K. Where there are prompts, they take turns; which image is of which is in
    OUTPUT/captions.json, in COCO's format. Several processes, started by torchrun, share the images. The command can
    be interrupted: given again, it goes on with the images that are missing, also where more are asked for.

    Args:
        model: the file of a generator, model.safetensors, or the generator itself.
        output: folder for the images.
        num_samples: how many images to draw.
        sampling: how noise becomes an image.
        classes: names of the classes to draw; by default all that the generator has.
        prompt: texts to draw, such as "a red star", for generators that learned from captions or are told words; by
            default some of the captions that it learned from.
        captions: instead, a COCO file of captions, of which the first of each image is drawn, or a text file with a
            prompt per line.
        negative_prompt: a text that guidance leads away from.
        classifier: the file of a noisy classifier that pulls the images towards the classes, or the classifier itself.
        classifier_scale: how hard the classifier pulls; by default 1.
        image_size: side, or [height, width], of the images in pixels; by default that of the images the generator
            learned from.
        batch_size: images drawn at once.
        seed: seed of the noise.
        overwrite: begin anew in a folder that is not empty; what earlier calls wrote is removed, and nothing else.

    Raises:
        FileNotFoundError, ValueError: no such file, a scale without a classifier, or as :func:`draw_samples`.
    """
    if classifier is None and classifier_scale is not None:
        raise ValueError("classifier_scale is given without a classifier: name one with --classifier, or leave it out")
    scale = 1.0 if classifier_scale is None else classifier_scale
    size = None if image_size is None else both_sides(image_size)
    folder, place = ResumableFolder(output, overwrite), pick_device(device)
    texts = prompts_of(prompt, captions)
    if (texts or negative_prompt) and (classes or classifier is not None):
        raise ValueError("prompts go without classes and classifiers: leave classes and classifier out, or prompts")
    model = _told(DiffusionModel.loaded(model).to(place), texts, negative_prompt)
    if classifier is not None:
        classifier = NoisyClassifier.loaded(classifier).to(place)
    require_image_channels(model.space.image_channels)
    reads_texts = isinstance(model.conditioner, TextReader)
    if reads_texts and classes:
        raise ValueError("this generator learned from captions, not from classes: say what to draw by prompt")
    names = list(classes or (classifier.classes if classifier is not None else model.classes) or [])
    folders = safe_names(names)
    places = [
        Path("images", folders[names[index % len(names)]] if names else "", f"{index:06}.png").as_posix()
        for index in range(num_samples)
    ]
    settings = {"command": "sample", "model": fingerprint(model), "sampling": describe(sampling), "seed": seed}
    settings |= {"classes": names, "image_size": size, "precision": precision}
    if texts or negative_prompt:
        settings |= {"prompts": texts, "negative_prompt": negative_prompt}
    if classifier is not None:
        settings |= {"classifier": fingerprint(classifier), "classifier_scale": scale}
    with join_processes(), autocast(place, precision):
        items = [Item(str(index), files=(places[index],)) for index in share(range(num_samples))]
        numbers = [int(item.name) for item in folder.left_of(settings, items, "sample", batch_size)]
        said = texts if reads_texts else classes
        how = (batch_size, size, classifier, scale, negative_prompt)
        drawn = draw_samples(model, numbers, sampling, seed, said, *how)
        batches = chain([next(drawn)] if numbers else [], drawn)
        folder.begin(
            ["grid.png", *(["captions.json"] if reads_texts or texts else [])]
        )  # all options have proved sound
        with tqdm(total=len(numbers), desc="sample", unit="image", disable=hide_bar()) as bar:
            for batch, images in batches:
                for index, image in zip(batch, images.cpu(), strict=True):
                    save_png(to_pil(image.expand(3, -1, -1)), folder.file(places[index]))
                    folder.add(Item(str(index), files=(places[index],)), [places[index]], None)
                bar.update(len(batch))
        barrier()
    if first_process():
        shown = [to_float(read_image(folder.path / place)) for place in places[:MAX_IN_GRID]]
        save_png(image_grid(shown), folder.file("grid.png"))
        if isinstance(model.conditioner, TextReader):
            texts = model.conditioner.choose(texts, range(num_samples))
        if texts:
            write_json(folder.file("captions.json"), _captions(places, texts))


def prompts_of(prompt: Sequence[str] | None, captions: Path | None) -> list[str] | None:
    """The texts to draw: these, or those of a file, if any; ValueError for both, or empty ones."""
    if prompt is not None and captions is not None:
        raise ValueError("give either prompts or a file of captions")
    if captions is None:
        texts = None if prompt is None else list(prompt)
    elif captions.suffix.lower() == ".json":
        texts = [texts[0] for texts in read_captions(captions).by_name.values() if texts]
    else:
        texts = read_lines(captions)
    if texts is not None and not (texts and all(text.strip() for text in texts)):
        raise ValueError(f"{captions or 'prompt'} holds no text to draw, or an empty one: write down what to draw")
    return texts


def _told(model: DiffusionModel, texts: Sequence[str] | None, negative: str | None) -> DiffusionModel:
    """The model; one that is told the same for all images, if it embeds texts beside itself and not each anew."""
    if isinstance(model.conditioner, TextReader) or not (texts or negative):
        return model
    if negative or texts is None or len({*texts}) > 1:
        model.told("")  # ValueError if it attends to no words
        raise ValueError("this generator is told one prompt for all images, and no negative one: give one prompt")
    return model.told(texts[0])


def _captions(places: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """COCO's file of captions of images at these places, of which the texts take turns."""
    names = [Path(place).relative_to("images").as_posix() for place in places]
    entries = [{"id": i, "image_id": i, "caption": texts[(i - 1) % len(texts)]} for i in range(1, len(names) + 1)]
    return {
        "info": {"description": "what images were drawn of"},
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names, start=1)],
        "annotations": entries,
    }


def require_same_path(classifier: NoisyClassifier, model: DiffusionModel) -> None:
    """ValueError unless the classifier has learned the generator's path, channels and classes."""
    for name in ("schedule", "num_timesteps", "beta_start", "beta_end", "betas", "in_channels"):
        own, other = classifier.arguments[name], (model.arguments | model.network.arguments)[name]
        if own != other:
            raise ValueError(
                f"the classifier has learned with {name} {own}, but the generator with {other}: train it as the"
                " generator was"
            )
    if model.classes is not None and model.classes != classifier.classes:
        raise ValueError(
            f"the classifier knows the classes {', '.join(classifier.classes)}, but the generator"
            f" {', '.join(model.classes)}: train it on images of the same classes"
        )
