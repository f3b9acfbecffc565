"""`diffperception train --task segmentation`: pixel classifiers on features, from few labelled images."""

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from diffperception.cli import counted, say
from diffperception.cli.evaluate_segmentation import draw, iou_table, score
from diffperception.data.masks import IGNORE_INDEX, MaskFolder
from diffperception.devices import pick_device
from diffperception.files import check_output_dir as require_room
from diffperception.files import write_text
from diffperception.segmentation import FeatureExtractor, FitOptions, PixelEnsemble, PixelSegmenter
from diffperception.segmentation.feature_cache import in_bytes, stored_bytes
from diffperception.training.folder import WEIGHTS, RunFolder, echo_files
from diffperception.training.recipes.segmentation import MaskDataOptions

FILES = {
    WEIGHTS: "features and classifier, for `segment` and `evaluate --task segmentation`",
    "metrics.json": "IoU on the images measured on, if there are any; times",
    "pictures": "image, truth, prediction and uncertainty",
    "config.yaml": "all options; use it as --config to repeat the run",
}


def train(
    features: FeatureExtractor,
    data: MaskDataOptions,
    output: Path,
    members: PositiveInt = 10,
    fit: FitOptions = FitOptions(max_minibatches=1000),  # noqa: B008 (the defaults are not changed)
    pictures: NonNegativeInt = 4,
    device: str = "auto",
    seed: NonNegativeInt = 0,
    overwrite: bool = False,
    resolved: str = "",
) -> None:
    """Train an ensemble of pixel classifiers on a few images with masks, and measure it on others.

    What is known of a pixel is what a network says of it: a diffusion model trained on such images without labels
    (`DiffusionFeatures`), any timm model (`TimmFeatures`), or its colour alone (`RGBFeatures`), all of
    `diffperception.segmentation`.

    Everything is written to one folder: config.yaml (all options; use it as --config to repeat the run),
    model.safetensors (features and classifier, for `segment`), metrics.json (mean IoU and that of each class on
    data.val_images) and pictures/ (image, truth, prediction and uncertainty).

    For example: `diffperception train --config configs/segmentation/shapes.yaml --output runs/mine`.

    The published recipe lets every member go on until fifty minibatches have not improved it, which takes very long
    for what it gains: here 1000 minibatches are the most, unless fit.max_minibatches says otherwise (null: no limit).

    Args:
        features: what is known of pixels: one of these classes, or DiffusionFeatures, and its arguments.
        data: what is learned from, and measured on.
        output: the folder for everything that the run writes.
        members: classifiers in the ensemble; where they differ, a pixel is uncertain.
        fit: how they learn; fit.seed is that of their weights and minibatches.
        pictures: how many are drawn, of the images measured on, else of those learned from.
        device: cpu, cuda, cuda:1, ... or auto.
        seed: of which images data.limit chooses, and of a network's random weights.
        overwrite: replace the run that the output folder holds.
    """
    require_room(output, overwrite)
    train_set, val_set = data.open(seed), data.open_val()
    if val_set is not None:
        for index in range(len(val_set)):
            val_set.image(index)  # a broken one is better found before the training than after
    features = features.to(pick_device(device))
    classifier = PixelEnsemble(features.channels, len(data.classes), members).to(features.device)
    masks = list(train_set.masks)
    say(sizes(features, train_set, masks, members, fit))
    start = time.monotonic()
    with warnings_said():
        classifier.fit(features, train_set.images, masks, fit, train_set.names, data.classes)
    seconds = {"training": time.monotonic() - start}
    model = PixelSegmenter(features, classifier, data.classes, data.short_side)
    RunFolder(output, FILES).begin(overwrite, yaml.safe_load(resolved) or {})
    model.save(output / WEIGHTS)
    say(f"trained in {seconds['training']:.0f} s")
    metrics = {}
    if val_set is not None:
        start = time.monotonic()
        metrics = score(model, val_set).summary(data.classes)
        seconds["an image"] = (time.monotonic() - start) / len(val_set)
        say(iou_table(metrics, len(val_set)))
    labelled = {"images": train_set.names, "seconds": seconds}
    write_text(output / "metrics.json", json.dumps({"metrics": metrics, **labelled}, indent=2) + "\n")
    draw(model, val_set or train_set, output / "pictures", pictures)
    echo_files(output, FILES)


def sizes(
    features: FeatureExtractor, folder: MaskFolder, masks: list[Tensor], members: int, options: FitOptions
) -> str:
    """What is learned from how much, in words."""
    memory = stored_bytes(
        features, [(mask.shape[0], mask.shape[1]) for mask in masks], getattr(torch, options.feature_dtype)
    )
    pixels = sum(int((mask != IGNORE_INDEX).sum()) for mask in masks)
    limit = "" if options.max_minibatches is None else f"; at most {options.max_minibatches} minibatches each"
    return (
        f"{counted(members, 'classifier')} {'learns' if members == 1 else 'learn'} {folder.num_classes} classes from"
        f" {pixels} pixels of {counted(len(folder), 'image')};"
        f" {features.channels} features a pixel, {in_bytes(memory)} in memory{limit}"
    )


@contextmanager
def warnings_said() -> Iterator[None]:
    """What the code within warns of is told to the user as notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: say(f"note: {message}")
        yield
