"""`diffperception compare`: what a generator's features are worth where few images are labelled."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from diffperception.cli import counted, say
from diffperception.cli.comparison import TITLES, Results, lead_sentence, markdown, summarise
from diffperception.cli.train_segmentation import warnings_said
from diffperception.data.masks import read_mask
from diffperception.detection.inference import spread
from diffperception.devices import pick_device
from diffperception.files import write_text
from diffperception.models import UNet
from diffperception.segmentation import (
    DiffusionFeatures,
    FeatureExtractor,
    FitOptions,
    MeanIoU,
    PixelEnsemble,
    RGBFeatures,
)
from diffperception.segmentation.baseline import BaselineOptions, predict_labels, segmentation_unet, train_unet
from diffperception.segmentation.feature_cache import CachedFeatures, fingerprint, in_bytes, parse_bytes, stored_bytes
from diffperception.training.recipes.segmentation import MaskDataOptions
from diffperception.visualization.curves import label_curves
from diffperception.visualization.draw import save_png
from diffperception.visualization.panels import PANEL_SIDE, image_row, legend, mask_overlay, stack

Method = Literal["diffusion", "untrained", "rgb", "scratch"]
FREE = ("labels", "seed", "seeds", "methods", "pictures", "memory", "device", "output", "overwrite", "debug")


@dataclass(frozen=True)
class Labelled:
    """Images (3, H, W), their masks and names, in memory. Masks to score on are of their own size."""

    images: list[Tensor]
    masks: list[Tensor]
    names: list[str]

    @classmethod
    def to_learn_from(cls, data: MaskDataOptions, count: int, seed: int) -> "Labelled":
        """So many images, chosen by the seed; a larger choice has those of a smaller one and others."""
        folder = replace(data, limit=count).open(seed)
        if len(folder) < count:
            found = counted(len(folder), "labelled image")
            raise ValueError(f"{data.images} has {found}, but {count} are to be chosen")
        return cls(list(folder.images), list(folder.masks), folder.names)

    @classmethod
    def to_score_on(cls, data: MaskDataOptions) -> "Labelled":
        """All of `data.val_images`."""
        folder = data.open_val()
        if folder is None:
            raise ValueError("give data.val_images and data.val_masks, the images to score on")
        return cls([resized(image, data.short_side) for image in folder.images], list(folder.masks), folder.names)

    def first(self, count: int) -> "Labelled":
        return Labelled(self.images[:count], self.masks[:count], self.names[:count])


Predict = Callable[[Tensor, tuple[int, int]], Tensor]  # an image to labels (height, width)
Learn = Callable[[Labelled, int], Predict]  # with a seed


def compare(
    features: DiffusionFeatures,
    data: MaskDataOptions,
    output: Path,
    labels: list[PositiveInt] = [5, 10, 20],  # noqa: B006 (the defaults are not changed)
    seeds: PositiveInt = 3,
    methods: list[Method] = ["diffusion", "untrained", "rgb", "scratch"],  # noqa: B006
    members: PositiveInt = 10,
    fit: FitOptions = FitOptions(),  # noqa: B008
    baseline: BaselineOptions = BaselineOptions(),  # noqa: B008
    pictures: NonNegativeInt = 4,
    memory: str = "8GB",
    device: str = "auto",
    seed: NonNegativeInt = 0,
    overwrite: bool = False,
    resolved: str = "",
) -> None:
    """Compare a generator's features with other ways to learn from a few labelled images.

    With each number of labelled images and each seed, which chooses them, it trains pixel classifiers on the features
    of the generator (diffusion), of the same UNet with random weights (untrained) and on the colours alone (rgb), and a
    UNet of the same size from scratch (scratch); and scores them on `data.val_images`.

    Writes compare.json (every result), compare.md (the table of means and spreads), compare.png (curves) and
    examples.png (predictions with the fewest labelled images). The command can be interrupted: given again, it goes on
    with what is missing, also where seeds, methods or numbers of labelled images have been added.

    For example: `diffperception compare --config configs/segmentation/bccd_compare.yaml --labels 5 10 20 --seeds 3`.

    Args:
        features: of the generator.
        data: the images to choose labelled ones from, whatever its limit, and those to score on.
        output: folder for the results.
        labels: numbers of labelled images; each choice is a part of the larger ones of its seed.
        seeds: how many choices of labelled images, each with its own weights and minibatches.
        methods: which to compare.
        members: of the ensembles of pixel classifiers.
        fit: how pixel classifiers learn; the seed is that of the choice.
        baseline: how the UNet from scratch learns.
        pictures: how many images of those scored on are drawn.
        memory: how much the features that are kept may take, such as 4GB.
        device: cpu, cuda, cuda:1, ... or auto.
        seed: the first of the seeds.
        overwrite: replace the results that the output folder holds.
    """
    bytes_kept = parse_bytes(memory)
    if not (labels and methods):
        raise ValueError("name at least one number of labelled images in labels, and one of the methods")
    if "scratch" in methods:
        features.unet.check_size(baseline.crop, baseline.crop)
    results = Results(output / "compare.json", fixed_settings(resolved, features), overwrite)
    tried = range(seed, seed + seeds)
    missing = results.missing(methods, labels, tried)
    say(f"{len(missing)} of {len(methods) * len(labels) * seeds} results are still to be made")
    test = Labelled.to_score_on(data)
    chosen = {each: Labelled.to_learn_from(data, max(labels), each) for each in tried}
    named = {name: image for choice in chosen.values() for name, image in zip(choice.names, choice.images, strict=True)}
    images = [*test.images, *named.values()]
    features.to(pick_device(device))
    start = time.monotonic()
    with tqdm(total=len(missing), desc="compare", unit="result", disable=None) as bar:
        for method, runs in groupby(missing, key=itemgetter(0)):
            learn = learner(method, features, images, bytes_kept, len(data.classes), members, fit, baseline)
            for _, count, each in runs:
                row, predictions = measure(learn, chosen[each].first(count), test, data.classes, each)
                if count == min(labels) and each == seed:
                    write_examples(predictions, test.names, output / "examples" / method)
                results.add({"method": method, "labels": count, "seed": each, **row})
                bar.update()
                left, so_far = results.missing(methods, labels, tried), tqdm.format_interval(time.monotonic() - start)
                say(f"{in_words(results.rows[-1])}; {so_far} so far, {len(left)} results left")
    report(results, data, test, pictures, output)


def resized(image: Tensor, short_side: int | None) -> Tensor:
    return image if short_side is None else TF.resize(image, [short_side], antialias=True)


def fixed_settings(resolved: str, features: DiffusionFeatures) -> dict[str, Any]:
    """What the results depend on: all options but those that only choose which are made, and the network's weights."""
    settings = {name: value for name, value in yaml.safe_load(resolved).items() if name not in FREE}
    return {**settings, "weights": fingerprint(features)}


def learner(
    method: str,
    features: DiffusionFeatures,
    images: Sequence[Tensor],
    memory: int,
    num_classes: int,
    members: int,
    fit: FitOptions,
    baseline: BaselineOptions,
) -> Learn:
    """How a method learns; features of all the images are computed beforehand."""
    if method == "scratch":
        return from_scratch(features.unet, num_classes, baseline)
    extractors: dict[str, Callable[[], FeatureExtractor]] = {
        "diffusion": lambda: features,
        "untrained": lambda: untrained(features),
        "rgb": RGBFeatures,
    }
    return pixel_classifier(keep(extractors[method](), images, memory, TITLES[method]), num_classes, members, fit)


def untrained(features: DiffusionFeatures) -> DiffusionFeatures:
    """The same features of a UNet with random weights."""
    torch.manual_seed(0)
    unet = UNet(**features.unet.arguments)
    return DiffusionFeatures(**features.arguments | {"unet": unet}).to(features.device)


def keep(features: FeatureExtractor, images: Sequence[Tensor], memory: int, title: str) -> CachedFeatures:
    """The extractor with the features of these images in memory, in half precision; ValueError if they need more."""
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    needed = stored_bytes(features, sizes, torch.float16)
    if needed > memory:
        raise ValueError(
            f"the {title} of {counted(len(images), 'image')} take {in_bytes(needed)} of memory, but the limit is"
            f" {in_bytes(memory)}: name fewer blocks or timesteps, set a smaller data.short_side, or raise --memory"
        )
    start = time.monotonic()
    kept = CachedFeatures(features)
    for image in tqdm(images, desc=title, unit="image", leave=False, disable=None):
        kept.maps(image)
    say(f"{title}: {features.channels} a pixel, {in_bytes(needed)} in memory, {time.monotonic() - start:.0f} s")
    return kept


def pixel_classifier(features: FeatureExtractor, num_classes: int, members: int, fit: FitOptions) -> Learn:
    """Ensembles of pixel classifiers on the features."""

    def learn(labelled: Labelled, seed: int) -> Predict:
        ensemble = PixelEnsemble(features.channels, num_classes, members).to(features.device)
        with warnings_said():
            ensemble.fit(features, labelled.images, labelled.masks, replace(fit, seed=seed), labelled.names)
        return lambda image, size: ensemble.segment(features.maps(image)).resized(*size).labels.cpu()

    return learn


def from_scratch(unet: UNet, num_classes: int, options: BaselineOptions) -> Learn:
    """UNets of a generator's size that learn from the labels alone."""

    def learn(labelled: Labelled, seed: int) -> Predict:
        torch.manual_seed(seed)
        network = segmentation_unet(unet, num_classes)
        train_unet(network, labelled.images, labelled.masks, options, seed)
        return lambda image, size: predict_labels(network, image, size, options.bf16)

    return learn


def measure(
    learn: Learn, labelled: Labelled, test: Labelled, classes: Sequence[str], seed: int
) -> tuple[dict[str, Any], list[Tensor]]:
    """Scores, seconds and the images learned from, for the results; and the predictions of the test images."""
    start = time.monotonic()
    predict = learn(labelled, seed)
    learned = time.monotonic()
    score, predictions = MeanIoU(len(classes)), []
    pairs = zip(test.images, test.masks, strict=True)
    for image, mask in tqdm(pairs, desc="test", total=len(test.images), unit="image", leave=False, disable=None):
        predictions.append(predict(image, (mask.shape[0], mask.shape[1])).to(torch.uint8))
        score.update(predictions[-1], mask)
    seconds = {"training": round(learned - start, 1), "test": round(time.monotonic() - learned, 1)}
    return {**score.summary(classes), "seconds": seconds, "images": labelled.names}, predictions


def in_words(row: dict[str, Any]) -> str:
    ious = ", ".join(f"{name} {100 * iou:.1f}" for name, iou in row["iou"].items() if iou is not None)
    seconds = f"{row['seconds']['training']:.0f} s training, {row['seconds']['test']:.0f} s test"
    return (
        f"{TITLES[row['method']]}, {counted(row['labels'], 'labelled image')}, seed {row['seed']}:"
        f" mIoU {100 * row['miou']:.1f} ({ious}); {seconds}"
    )


def write_examples(predictions: Sequence[Tensor], names: Sequence[str], folder: Path) -> None:
    """Keep the predictions of the test images as masks: whichever of them are to be drawn, now or later."""
    for labels, name in zip(predictions, names, strict=True):
        save_png(Image.fromarray(labels.numpy()), example(folder, name))


def example(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"


def report(results: Results, data: MaskDataOptions, test: Labelled, pictures: int, output: Path) -> None:
    """Print the table; write it, its curves and the pictures."""
    summary = summarise(results.rows)
    text = f"{markdown(summary)}\n\n{lead_sentence(summary)}"
    write_text(output / "compare.md", text + "\n")
    save_png(label_curves(summary, TITLES), output / "compare.png")
    shown = spread(len(test.names), pictures) if pictures else []
    rows = [example_row(test, i, output / "examples") for i in shown]
    if rows:
        save_png(stack([*rows, legend(data.classes)], vertical=True), output / "examples.png")
    say(f"{text}\n{output / 'compare.json'}: every result; beside it compare.md, compare.png and examples.png")


def example_row(test: Labelled, index: int, folder: Path) -> Image.Image:
    """An image beside its mask and what each method predicted from the fewest labelled images."""
    name, mask = test.names[index], test.masks[index]
    image = TF.resize(test.images[index], list(mask.shape))
    files = {title: example(folder / method, name) for method, title in TITLES.items()}
    predicted = {title: torch.tensor(read_mask(file)) for title, file in files.items() if file.exists()}
    panels = {title: mask_overlay(image, labels) for title, labels in {"truth": mask, **predicted}.items()}
    return image_row({"image": image, **panels}, PANEL_SIDE)
