"""`diffperception evaluate`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from diffperception.cli import say
from diffperception.cli.report import draw_pictures, write_audit, write_scores
from diffperception.data import CocoDetection
from diffperception.detection import Detector, DiffusionDet
from diffperception.detection.evaluator import CocoResult
from diffperception.detection.inference import EVALUATORS, Protocol, evaluate_detector, join_processes
from diffperception.detection.sampler import Mode
from diffperception.detection.sweep import Audit, audit_detector, combine
from diffperception.devices import first_process
from diffperception.models.base import Model


def evaluate(
    annotations: Path,
    images: Path | None = None,
    model: Path | None = None,
    results: Path | None = None,
    output: Path | None = None,
    steps: PositiveInt | list[PositiveInt] | None = None,
    num_boxes: PositiveInt | list[PositiveInt] | None = None,
    modes: Mode | list[Mode] | None = None,
    renewal: ClosedUnitInterval | list[ClosedUnitInterval] | None = None,
    ensemble: bool | list[bool] | None = None,
    eta: ClosedUnitInterval | list[ClosedUnitInterval] | None = None,
    nms: ClosedUnitInterval | list[ClosedUnitInterval] | None = None,
    protocol: Protocol = "coco",
    max_dets: int | None = None,
    batch_size: int = 8,
    workers: int = 2,
    seed: int = 0,
    seeds: PositiveInt = 1,
    device: str = "auto",
    pictures: int = 8,
    trust: str | None = None,
) -> None:
    """Score a detector, or a COCO results file, on a COCO data set.

    Prints the COCO table and the AP of each class. Where options have several values, as in `--steps 1 2 4`, or there
    are several seeds, it is an audit instead: AP and seconds of every combination as a table, audit.json and audit.png.

    AP depends neither on the batch size nor on the number of processes; to use several, start the command with
    `torchrun --nproc_per_node=N -m diffperception evaluate ...`.

    Args:
        annotations: COCO JSON file with the ground truth.
        images: the folder that its file names are relative to; needed with a model.
        model: the detector, a model.safetensors file.
        results: score this COCO results file instead of a model.
        output: folder for metrics.json, detections.json and pictures, or for the audit; nothing is written without it.
        steps: passes from noise to boxes; by default what the model was made with.
        num_boxes: boxes to start from; by default what the model was made with.
        modes: ddim, by default; or a control, which shows what ddim is worth: fixed_time (the time is held) or
            fresh_boxes (every step starts from new noise).
        renewal: between steps, boxes with no class above this probability are drawn anew; 0 turns it off. By default
            0.5.
        ensemble: whether the detections of all steps count, or the last step's alone. By default they do.
        eta: how much noise a step adds: 1, by default, is the ancestral step, 0 the deterministic one.
        nms: of two boxes of a class whose IoU is above this, only the better counts; 1 turns it off. By default 0.5.
        protocol: coco, or lvis for annotation files of LVIS, which adds APr, APc and APf of rare, common and frequent
            classes; it needs the extra `lvis`.
        max_dets: how many detections count in an image, the best first; by default the protocol's number: 100 of each
            class (coco), 300 of all (lvis).
        batch_size: images in one prediction.
        workers: processes that read images, for each process that predicts.
        seed: of the noise; the noise of an image depends on this and on its id alone.
        seeds: score with so many seeds, from `seed` on.
        device: cpu, cuda, cuda:1, ... or auto.
        pictures: how many images are drawn with predictions beside ground truth.
        trust: a Python package of your own whose model classes the model file may name.
    """
    if (model is None) == (results is None):
        raise ValueError("give either --model (and --images) or --results")
    if results is not None:
        finish(EVALUATORS[protocol](annotations, max_dets).score_results(results), output)
        return
    if model is None or images is None:
        raise ValueError("give --images, the folder with the images that the model shall be scored on")
    join_processes()
    detector = load_detector(model, trust).to(pick_device(device))
    dataset = CocoDetection(annotations, images)
    settings = {
        "mode": modes,
        "num_boxes": num_boxes,
        "renewal_threshold": renewal,
        "ensemble": ensemble,
        "eta": eta,
        "nms_threshold": nms,
        "steps": steps,
    }
    given = {
        name: list(dict.fromkeys(value if isinstance(value, list) else [value]))
        for name, value in settings.items()
        if value is not None
    }
    if seeds > 1 or any(len(values) > 1 for values in given.values()):
        sampler = require_sampler(detector)
        combinations = combine(sampler.sampler_options(), given)
        tried = range(seed, seed + seeds)
        say(f"{len(dataset)} images, {len(combinations)} combinations of settings, seeds {', '.join(map(str, tried))}")
        audit = audit_detector(sampler, dataset, combinations, tried, batch_size, workers, max_dets, protocol)
        finish_audit(audit, output)
    else:
        options = prediction_options(detector, {name: values[0] for name, values in given.items()})
        result = evaluate_detector(detector, dataset, None, batch_size, workers, max_dets, seed, options, protocol)
        finish(result, output)
        if output is not None and first_process():
            draw_pictures(detector, dataset, output / "pictures", pictures, seed, options)
            say(f"{output / 'pictures'}: predictions beside ground truth")
    if dist.is_initialized():
        dist.destroy_process_group()


def finish(result: CocoResult, output: Path | None) -> None:
    """Print the table and write the numbers."""
    say(result.table())
    if output is not None and first_process():
        write_scores(result, output)
        say(f"\n{output / 'metrics.json'}: these numbers\n{output / 'detections.json'}: every predicted box")


def finish_audit(audit: Audit, output: Path | None) -> None:
    """Print the table, write the numbers and draw the curves."""
    say(audit.table())
    if output is not None and first_process():
        write_audit(audit, output)
        say(f"\n{output / 'audit.json'}: these numbers\n{output / 'audit.png'}: AP against head passes and seconds")


def require_sampler(detector: Detector) -> DiffusionDet:
    """The detector; ValueError unless it draws boxes step by step."""
    if not isinstance(detector, DiffusionDet):
        name = type(detector).__name__
        raise ValueError(f"{name} has no sampler to audit: give one seed, and one value of each option")
    return detector


def prediction_options(detector: Detector, settings: dict[str, Any]) -> dict[str, Any]:
    """The sampler's settings as arguments of `detector.predict`."""
    if isinstance(detector, DiffusionDet):
        return {"options": replace(detector.sampler_options(), **settings)}
    return settings


def load_detector(path: Path, trust: str | None = None) -> Detector:
    """The detector that a model file holds, in evaluation mode on the CPU; ValueError if it is none."""
    model = Model.load(path, allow=(trust,) if trust else ())
    if not isinstance(model, Detector):
        raise ValueError(f"{path} holds a {type(model).__name__}, which is not a detector")
    return model


def pick_device(name: str) -> torch.device:
    """The device of that name; for `auto` this process's GPU, if there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch asserts that it was built for the device
        raise ValueError(f"there is no device {name!r} here: use cpu or auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
