"""`diffperception train --task classifier`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import nn

from diffperception.cli import say
from diffperception.cli.report import write_text
from diffperception.cli.run_folder import LOGS, WEIGHTS, require_room, say_stopped, say_where, start_or_go_on
from diffperception.devices import first_process
from diffperception.models import NoisyClassifier
from diffperception.training.data import TrainingData
from diffperception.training.loggers import RunLog
from diffperception.training.options import OptimizerOptions, TrainerOptions
from diffperception.training.recipes.noisy_classifier import ClassificationTask, LabelledImageOptions, held_out_accuracy
from diffperception.training.run import fit, require_machine
from diffperception.visualization.draw import curves, save_png

FILES = {
    WEIGHTS: "the trained classifier, for `diffperception sample --classifier`",
    "pictures": "curves.png",
    **LOGS,
}


@dataclass
class AccuracyOptions:
    """How the accuracy on data.val_images is measured, now and then during training and at its end.

    Args:
        every: steps between measurements; null for one at the end only.
        images: how many pictures those during training use, spread over the set; null for all. The one at the end uses
            all.
        ranges: into how many ranges of noise the path is divided; each has its own accuracy.
        batch_size: images in one pass.
    """

    every: PositiveInt | None = 1000
    images: PositiveInt | None = 256
    ranges: PositiveInt = 5
    batch_size: PositiveInt = 64


def train(
    model: Callable[[list[str]], NoisyClassifier],
    data: LabelledImageOptions,
    output: Path,
    optimizer: OptimizerOptions = OptimizerOptions(lr=3e-4, base_batch_size=256, weight_decay=0.05),  # noqa: B008
    trainer: TrainerOptions = TrainerOptions(),  # noqa: B008 (the defaults are not changed)
    evaluation: AccuracyOptions = AccuracyOptions(),  # noqa: B008
    seed: NonNegativeInt = 0,
    resume: bool = False,
    overwrite: bool = False,
    resolved: str = "",
) -> int:
    """Train a classifier of noisy images, to guide a generator, on a folder of pictures in folders of their classes.

    Its path, size and channels must be those of the generator it is to guide.

    Everything is written to one folder: config.yaml (all options; use it as --config to repeat the run), metrics.csv
    and tensorboard/ (loss and accuracy over the steps), last.ckpt (to go on from with --resume), model.safetensors
    (the trained classifier, for `sample --classifier`), metrics.json (its accuracy by ranges of noise) and pictures/.

    For example: `diffperception train --config configs/generation/classifier_shapes.yaml --output runs/mine`.

    Ctrl-C ends the run after the step in hand and leaves a checkpoint. To use several processes or machines, start the
    command with `torchrun --nproc_per_node=N -m diffperception train ...`; the learning rate follows the number of
    images a step.

    Args:
        model: the classifier's class and its arguments, all but the classes, which are the folders' names.
        data: what it learns from and is measured on.
        output: the folder for everything that the run writes.
        optimizer: how the weights are updated.
        trainer: how long, on what, and how often it reports.
        evaluation: how its accuracy is measured.
        seed: of the weights, the order of pictures, their crops and all noise.
        resume: go on from last.ckpt in the output folder, or begin if there is none.
        overwrite: replace the run that the output folder holds.
    """
    if first_process():
        require_room(output, resume, overwrite)
    require_machine(trainer)
    torch.manual_seed(seed)
    classifier = model(data.classes())
    train_set, val_set = data.open(classifier.image_size, classifier.in_channels)
    resume = start_or_go_on(output, resume, overwrite, resolved, classifier)
    parameters = sum(parameter.numel() for parameter in classifier.parameters())
    say(
        f"{type(classifier).__name__} with {parameters / 1e6:.1f} M parameters learns {len(classifier.classes)} classes"
        f" from {len(train_set)} pictures" + (f"; {train_set.skipped} are left out" if train_set.skipped else "")
    )

    def score(
        averaged: nn.Module, raw: nn.Module, step: int, images: int | None = evaluation.images
    ) -> dict[str, float]:
        if val_set is None:
            return {}
        measured = cast(NoisyClassifier, averaged)
        return held_out_accuracy(measured, val_set, images, evaluation.batch_size, evaluation.ranges)

    batches = TrainingData(train_set, data.batch_size, data.workers, seed)
    task = ClassificationTask(classifier, optimizer, seed)
    outcome = fit(task, batches, output, trainer, score, evaluation.every, False, resume, say)
    if outcome.signal is not None:
        return say_stopped(output, outcome.step, outcome.signal)
    if first_process():
        trained = cast(NoisyClassifier, outcome.model.to(outcome.device).eval())
        trained.save(output / WEIGHTS)
        report(score(trained, trained, outcome.step, images=None), output, outcome.step)
    say_where(output, FILES)
    return 0


def report(metrics: dict[str, float], output: Path, step: int) -> None:
    """Print and write the accuracies, where there are any, and draw the run's curves."""
    if metrics:
        write_text(output / "metrics.json", json.dumps({"metrics": metrics}, indent=2) + "\n")
        log = RunLog(output, after=step)
        log.write(step, {f"val/{name}": value for name, value in metrics.items()})
        log.close()
        say("\n".join(f"{name:<18}{value:.3f}" for name, value in metrics.items()))
    save_png(curves(output / "metrics.csv"), output / "pictures" / "curves.png")
