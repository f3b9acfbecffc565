"""`diffperception evaluate --samples FOLDER`: how close generated images are to real ones."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from diffperception.devices import Precision
from diffperception.echo import echo
from diffperception.files import images_below, write_json
from diffperception.generation.evaluator import evaluate_samples


def evaluate_sample_folder(
    samples: Path,
    reference: Path,
    features: str = "inception_v3.tf_in1k",
    weights: Path | None = None,
    size: PositiveInt | None = None,
    output: Path | None = None,
    device: str = "auto",
    precision: Precision = "32",
    subsets: PositiveInt = 100,
    subset_size: PositiveInt | None = None,
    neighbours: PositiveInt = 3,
    batch_size: PositiveInt = 32,
    workers: NonNegativeInt = 2,
    seed: NonNegativeInt = 0,
) -> None:
    """Score generated images against real ones: FID, KID, precision and recall.

    The images of both folders and their subfolders are resized, with antialiasing, to what the feature network takes.
    Figures can be compared only within one feature network, one size and equal numbers of images; none of these
    networks is the one of published FIDs.

    Args:
        samples: folder with the generated images.
        reference: folder with real images, cropped as those that the generator learned from; or the YAML file of its
            training, whose pictures are then cropped as they were there, as many crops as there are samples.
        features: the feature network: a timm model; random: and a timm model for untrained weights, such as
            random:resnet18, a weak measure that needs no network; or the model.safetensors file of a detector, for its
            backbone.
        weights: file with the timm model's weights, .pth or .safetensors, instead of fetching them.
        size: pixels in height and width that images are resized to; by default what the timm model was trained with,
            224 for a detector.
        output: folder for metrics.json; nothing is written without it.
        subsets: how often KID is measured, each time on other images.
        subset_size: images of either kind in one such measurement; by default 1000, or half of the smaller folder if
            that is less.
        neighbours: precision and recall take an image's distance to so many nearest ones as its reach.
        batch_size: images in one pass.
        workers: processes that read images.
        device: cpu, cuda, cuda:1, ... or auto.
        precision: 32, or bf16 for bfloat16 where that is safe.
        seed: the seed of the subsets, and of the crops of a training's pictures.
    """
    real: Path | Sequence[Tensor] = reference
    if reference.suffix in (".yaml", ".yml"):
        from diffperception.training.crops import training_crops  # Lightning, which nothing else needs here

        real = training_crops(reference, len(images_below(samples)), seed)
    report = evaluate_samples(
        samples,
        real,
        features,
        weights,
        size,
        subsets,
        subset_size,
        neighbours,
        batch_size,
        workers,
        device,
        precision,
        seed,
    )
    echo(report.table())
    counts, channels = report.images, report.settings["channels"]
    echo(f"{counts['samples']} samples, {counts['reference']} real images; {channels} features of {features}")
    for note in report.notes:
        echo(f"note: {note}")
    if output is not None:
        write_json(output / "metrics.json", asdict(report))
        echo(f"{output / 'metrics.json'}: these numbers")
