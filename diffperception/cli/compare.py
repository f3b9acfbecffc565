"""`diffperception compare`: what a generator's features are worth where few images are labelled."""

from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from diffperception.data.masks import MaskDataOptions
from diffperception.devices import Precision, pick_device
from diffperception.segmentation import DiffusionFeatures
from diffperception.training.label_efficiency import Method, compare_label_efficiency
from diffperception.training.options import TrainerOptions
from diffperception.training.recipes.baseline import BaselineOptions
from diffperception.training.recipes.segmentation import FitOptions


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
    max_memory: str = "8GB",
    device: str = "auto",
    precision: Precision = "32",
    seed: NonNegativeInt = 0,
    overwrite: bool = False,
    task: Literal["segmentation"] = "segmentation",
) -> None:
    """Compare a generator's features with other ways to learn from a few labelled images.

    With each number of labelled images and each seed, which chooses them, it trains pixel classifiers on the features
    of the generator (diffusion), of the same UNet with random weights (untrained) and on the colours alone (rgb), and a
    UNet of the same size from scratch (scratch); and scores them on `data.val_images`.

    Writes compare.json (every result), compare.md (the table of means and spreads), compare.png (curves) and
    examples.png (predictions with the fewest labelled images). The command can be interrupted: given again, it goes on
    with what is missing, also where seeds, methods or numbers of labelled images have been added.

    For example: `diffperception compare configs/segmentation/bccd_compare.yaml --labels 5 10 20 --seeds 3`.

    Args:
        features: the features of the generator.
        data: the images to choose labelled ones from, whatever its max_images, and those to score on.
        output: folder for the results.
        labels: numbers of labelled images; each choice is a part of the larger ones of its seed.
        seeds: how many choices of labelled images, each with its own weights and minibatches.
        methods: which to compare.
        members: members of the ensembles of pixel classifiers.
        fit: how pixel classifiers learn.
        baseline: how the UNet from scratch learns.
        pictures: how many images of those scored on are drawn.
        max_memory: how much the features that are kept may take, such as 4GB.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        precision: 32, or bf16, in which the UNet from scratch then learns and predicts.
        seed: the first of the seeds.
        overwrite: replace the results that the output folder holds.
        task: that of the training whose configuration this one builds on.
    """
    place = pick_device(device)
    trainer = TrainerOptions(
        accelerator={"cuda": "gpu"}.get(place.type, place.type),
        devices=1 if place.index is None else [place.index],
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )
    compare_label_efficiency(
        features.to(place),
        data,
        output,
        labels,
        seeds,
        methods,
        members,
        fit,
        baseline,
        pictures,
        max_memory,
        seed,
        overwrite,
        trainer,
    )
