"""`diffperception train --task generation`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from diffperception.cli import say
from diffperception.cli.run_folder import LOGS, WEIGHTS, require_room, say_stopped, say_where, start_or_go_on
from diffperception.cli.sample import choose_labels, in_turn
from diffperception.devices import first_process
from diffperception.generation.sampling import SamplingOptions, sample, time_grid
from diffperception.models.generator import DiffusionModel
from diffperception.training.data import TrainingData
from diffperception.training.options import OptimizerOptions, TrainerOptions
from diffperception.training.recipes.generation import GenerationTask, ImageDataOptions, ObjectiveOptions, held_out_loss
from diffperception.training.run import fit, require_machine
from diffperception.visualization.draw import curves, image_grid, save_png

FILES = {
    WEIGHTS: "the trained generator, for `diffperception sample`",
    "pictures": "samples over the steps, from the averaged and the raw weights; curves.png",
    **LOGS,
}


@dataclass
class PreviewOptions:
    """What is looked at, now and then during training and at its end.

    Args:
        every: steps between looks; null for one at the end only.
        samples: how many images are drawn, always from the same noise.
        sampling: how they are drawn.
        held_out: on how many images of data.val_images the loss is measured.
        batch_size: images in one pass.
    """

    every: PositiveInt | None = 1000
    samples: PositiveInt = 36
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    held_out: PositiveInt = 256
    batch_size: PositiveInt = 32


def train(
    model: Callable[[list[str] | None], DiffusionModel],
    data: ImageDataOptions,
    output: Path,
    optimizer: OptimizerOptions = OptimizerOptions(lr=2e-4, base_batch_size=32, weight_decay=0.0),  # noqa: B008
    trainer: TrainerOptions = TrainerOptions(),  # noqa: B008 (the defaults are not changed)
    objective: ObjectiveOptions = ObjectiveOptions(),  # noqa: B008
    preview: PreviewOptions = PreviewOptions(),  # noqa: B008
    seed: NonNegativeInt = 0,
    resume: bool = False,
    overwrite: bool = False,
    resolved: str = "",
) -> int:
    """Train a generator of images on a folder of pictures, and draw samples from it.

    Everything is written to one folder: config.yaml (all options; use it as --config to repeat the run), metrics.csv
    and tensorboard/ (losses over the steps), last.ckpt (to go on from with --resume), model.safetensors (the trained
    generator, for `sample`) and pictures/ (samples from the averaged and from the raw weights).

    For example: `diffperception train --config configs/generation/shapes.yaml --output runs/mine`.

    Ctrl-C ends the run after the step in hand and leaves a checkpoint. To use several processes or machines, start the
    command with `torchrun --nproc_per_node=N -m diffperception train ...`; the learning rate follows the number of
    images a step.

    Args:
        model: the generator's class and its arguments, all but the classes, which are the folders' names.
        data: what it learns from.
        output: the folder for everything that the run writes.
        optimizer: how the weights are updated.
        trainer: how long, on what, and how often it reports.
        objective: what is learned at which times.
        preview: samples and held-out loss.
        seed: of the weights, the order of pictures, their crops and all noise.
        resume: go on from last.ckpt in the output folder, or begin if there is none.
        overwrite: replace the run that the output folder holds.
    """
    if first_process():
        require_room(output, resume, overwrite)
    require_machine(trainer)
    torch.manual_seed(seed)
    generator = model(data.classes())
    train_set, val_set = data.open(generator.image_size, generator.unet.in_channels)
    task = GenerationTask(generator, optimizer, seed, objective)
    require_preview(generator, preview)
    resume = start_or_go_on(output, resume, overwrite, resolved, generator)
    parameters = sum(parameter.numel() for parameter in generator.parameters())
    height, width = generator.image_size
    say(
        f"{type(generator).__name__} with {parameters / 1e6:.1f} M parameters learns {height} x {width} pixels"
        f" from {len(train_set)} pictures" + (f"; {train_set.skipped} are left out" if train_set.skipped else "")
    )

    def look(averaged: nn.Module, raw: nn.Module, step: int) -> dict[str, float]:
        models = {"averaged": cast(DiffusionModel, averaged)}
        if raw is not averaged:
            models["raw"] = cast(DiffusionModel, raw)
        if first_process():
            for name, each in models.items():
                draw_samples(each.eval(), preview, seed, output / "pictures" / f"samples_{step:07}_{name}.png")
        if val_set is None:
            return {}
        count, at_once = preview.held_out, preview.batch_size
        return {f"held_out_{name}": held_out_loss(each, val_set, count, at_once) for name, each in models.items()}

    batches = TrainingData(train_set, data.batch_size, data.workers, seed)
    outcome = fit(task, batches, output, trainer, look, preview.every, True, resume, say)
    if outcome.signal is not None:
        return say_stopped(output, outcome.step, outcome.signal)
    if first_process():
        trained = cast(DiffusionModel, outcome.model.to(outcome.device).eval())
        trained.save(output / WEIGHTS)
        save_png(curves(output / "metrics.csv"), output / "pictures" / "curves.png")
    say_where(output, FILES)
    return 0


def require_preview(model: DiffusionModel, preview: PreviewOptions) -> None:
    """ValueError if the model cannot be sampled in this way."""
    options = preview.sampling
    try:
        time_grid(model.schedule, options.sampler, options.steps)
        model.denoiser(in_turn(choose_labels(model.classes or [], None), range(1), model.device), options.guidance)
    except ValueError as error:
        raise ValueError(f"option preview.sampling: {error}") from None


def draw_samples(model: DiffusionModel, preview: PreviewOptions, seed: int, path: Path) -> None:
    """A grid of samples from noise that is the same for every model and step; labels take turns."""
    images: list[Tensor] = []
    known = choose_labels(model.classes or [], None)
    for start in range(0, preview.samples, preview.batch_size):
        indices = range(start, min(start + preview.batch_size, preview.samples))
        labels = in_turn(known, indices, model.device)
        images.extend(sample(model, indices, preview.sampling, seed, labels).float().cpu())
    save_png(image_grid(images), path)
