"""`diffperception train`."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from jsonargparse.typing import NonNegativeInt

from diffperception.cli import say
from diffperception.cli.evaluate import finish, load_detector
from diffperception.cli.report import draw_pictures
from diffperception.cli.run_folder import LOGS, WEIGHTS, require_room, say_stopped, say_where, start_or_go_on
from diffperception.data import CocoDetection
from diffperception.detection import Detector
from diffperception.detection.evaluator import CocoResult
from diffperception.detection.inference import EVALUATORS, evaluate_detector, require_classes
from diffperception.devices import first_process
from diffperception.training.data import TrainingData
from diffperception.training.loggers import RunLog
from diffperception.training.options import DataOptions, EvaluationOptions, OptimizerOptions, TrainerOptions
from diffperception.training.recipes.detection import DetectionTask
from diffperception.training.run import fit, require_machine
from diffperception.visualization.draw import curves, save_png

FILES = {
    WEIGHTS: "the trained detector, for `diffperception evaluate` and `predict`",
    "pictures": "predictions beside ground truth, noise turning into boxes, curves.png",
    **LOGS,
}


def train(
    model: Callable[[list[str]], Detector],
    data: DataOptions,
    output: Path,
    optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008 (the defaults are not changed)
    trainer: TrainerOptions = TrainerOptions(),  # noqa: B008
    evaluation: EvaluationOptions = EvaluationOptions(),  # noqa: B008
    training: type[DetectionTask] = DetectionTask,
    init: Path | None = None,
    seed: NonNegativeInt = 0,
    resume: bool = False,
    overwrite: bool = False,
    resolved: str = "",
) -> int:
    """Train a detector, score it and draw its predictions.

    Everything is written to one folder: config.yaml (all options; use it as --config to repeat the run), metrics.csv
    and tensorboard/ (losses and AP over the steps), last.ckpt (to go on from with --resume), model.safetensors (the
    trained detector, for `evaluate` and `predict`), metrics.json, detections.json and pictures/.

    For example: `diffperception train --config configs/detection/shapes.yaml --output runs/mine`.

    Ctrl-C ends the run after the step in hand and leaves a checkpoint. To use several processes or machines, start the
    command with `torchrun --nproc_per_node=N -m diffperception train ...`; the learning rate follows the number of
    images a step.

    Args:
        model: the detector's class and its arguments, all but the classes, which come from the annotations.
        data: what it learns from and is scored on.
        output: the folder for everything that the run writes.
        optimizer: how the weights are updated.
        trainer: how long, on what, and how often it reports.
        evaluation: how it is scored.
        training: the training step; a class of your own may change it.
        init: start from the weights in this model.safetensors file, of the same model and classes.
        seed: of the weights, the order of images, their changes and the noise.
        resume: go on from last.ckpt in the output folder, or begin if there is none.
        overwrite: replace the run that the output folder holds.
    """
    if first_process():
        require_room(output, resume, overwrite)
    require_machine(trainer)
    train_set, val_set = data.open()
    repeats = data.repeats(train_set)
    # What cannot be scored is refused here, not after the training.
    EVALUATORS[evaluation.protocol](val_set.annotations, evaluation.max_dets)
    torch.manual_seed(seed)
    detector = model(train_set.classes)
    detector.class_frequencies.copy_(torch.from_numpy(train_set.images_per_class()))
    if init is not None:
        start_from(detector, init, val_set)
    resume = start_or_go_on(output, resume, overwrite, resolved, detector)
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    say(
        f"{type(detector).__name__} with {parameters / 1e6:.1f} M parameters learns {len(train_set.classes)} classes"
        f" from {len(train_set)} images and is scored on {len(val_set)}"
    )

    def score(detector: Detector, images: int | None = evaluation.images) -> CocoResult:
        return evaluate_detector(
            detector,
            val_set,
            images,
            evaluation.batch_size,
            data.workers,
            evaluation.max_dets,
            seed,
            protocol=evaluation.protocol,
        )

    outcome = fit(
        training(detector, optimizer, seed),
        TrainingData(train_set, data.batch_size, data.workers, seed, repeats),
        output,
        trainer,
        lambda detector, *_: score(cast(Detector, detector)).metrics,
        evaluation.every,
        False,
        resume,
        say,
    )
    if outcome.signal is not None:
        return say_stopped(output, outcome.step, outcome.signal)
    trained = cast(Detector, outcome.model.to(outcome.device).eval())
    if first_process():
        trained.save(output / WEIGHTS)
    result = score(trained, images=None)
    finish(result, output)
    if first_process():
        log = RunLog(output, after=outcome.step)
        log.write(outcome.step, {f"val/{name}": value for name, value in result.metrics.items()})
        log.close()
        draw_pictures(trained, val_set, output / "pictures", evaluation.pictures, seed)
        save_png(curves(output / "metrics.csv"), output / "pictures" / "curves.png")
    say_where(output, FILES)
    return 0


def start_from(detector: Detector, path: Path, dataset: CocoDetection) -> None:
    """Give `detector` the weights of a model file; ValueError if its classes or its layers differ."""
    source = load_detector(path, trust=type(detector).__module__.split(".")[0])
    require_classes(source.classes, dataset)
    try:
        detector.load_state_dict(source.state_dict())
    except RuntimeError:
        raise ValueError(f"{path} holds a {type(source).__name__} of another shape than the configured model") from None
