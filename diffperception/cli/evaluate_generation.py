"""`diffperception evaluate --samples FOLDER`: how close generated images are to real ones."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from diffperception.configuration.parser import Flat
from diffperception.echo import echo
from diffperception.files import OutputFolder, images_below, write_json
from diffperception.generation.evaluator import ScoringOptions, evaluate_samples


def evaluate_sample_folder(
    samples: Path,
    reference: Path,
    scoring: Flat[ScoringOptions],
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Score generated images against real ones: FID, KID, precision and recall.

    The images of both folders and their subfolders are resized, with antialiasing, to what the feature network takes.
    Figures can be compared only within one feature network, one size and equal numbers of images; none of these
    networks is the one of published FIDs.

    Args:
        samples: folder with the generated images.
        reference: folder with real images, cropped as those that the generator learned from; or the YAML file of its
            training, whose pictures are then cropped as they were there, as many crops as there are samples.
        scoring: how.
        output: folder for metrics.json; nothing is written without it.
    """
    folder = None if output is None else OutputFolder(output, overwrite)
    real: Path | Sequence[Tensor] = reference
    if reference.suffix in (".yaml", ".yml"):
        from diffperception.training.recipes import generation  # Lightning, which nothing else needs here

        real = generation.training_crops(reference, len(images_below(samples)), scoring.seed)
    report = evaluate_samples(samples, real, scoring)
    echo(report.table())
    counts, channels = report.images, report.settings["channels"]
    echo(f"{counts['samples']} samples, {counts['reference']} real images; {channels} features of {scoring.features}")
    for note in report.notes:
        echo(f"note: {note}")
    if folder is not None:
        path = folder.file("metrics.json")
        write_json(path, asdict(report))
        echo(f"{path}: these numbers")
