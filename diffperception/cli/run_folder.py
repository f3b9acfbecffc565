"""The folder of a training run: what may become of an old one, and what is in it at the end."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from diffperception.cli import say
from diffperception.cli.report import write_text
from diffperception.cli.settings import changes, in_words
from diffperception.devices import first_process
from diffperception.models.base import describe
from diffperception.training.run import CHECKPOINT, Checkpoint, read_checkpoint

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
WRITTEN = (
    CONFIG,
    CHECKPOINT,
    WEIGHTS,
    "metrics.csv",
    "metrics.json",
    "detections.json",
    "pictures",
    "tensorboard",
)
LOGS = {
    CHECKPOINT: "what --resume goes on from",
    "metrics.csv": "losses and scores over the steps; also as TensorBoard events in tensorboard/",
    CONFIG: "all options; use it as --config to repeat the run",
}
# Options that decide what the weights or the optimizer's state mean, besides the model's.
LASTING = ("task", "data.labelled", "objective.times", "optimizer.backbone_lr_factor")
AVERAGE = "optimizer.ema_decay"  # may change, but not appear or go
PASSING = ("checkpointing", "dropout")  # arguments of models that say nothing of their weights


def require_room(output: Path, resume: bool, overwrite: bool) -> None:
    """ValueError if the folder holds a run and the user has not said what shall become of it."""
    if resume and overwrite:
        raise ValueError("give either --resume, to go on with the run, or --overwrite, to replace it")
    found = [name for name in WRITTEN if (output / name).exists()]
    if found and not (resume or overwrite):
        raise ValueError(
            f"{output} already holds a run ({', '.join(found)}): go on with it with --resume, replace it with"
            " --overwrite, or choose another --output"
        )


def start_folder(output: Path, overwrite: bool, resolved: str) -> None:
    """Remove the files of a run that is to be replaced, and write the options."""
    for path in (output / name for name in WRITTEN if overwrite):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    settings = yaml.safe_load(resolved) or {}
    kept = {name: value for name, value in settings.items() if name not in ("resume", "overwrite", "debug")}
    write_text(output / "config.yaml", yaml.safe_dump(kept, sort_keys=False))


def start_or_go_on(output: Path, resume: bool, overwrite: bool, resolved: str, model: nn.Module) -> bool:
    """Prepare the folder, once data and model are known to be sound; whether there is a run to go on with.

    Raises:
        ValueError: the run cannot be gone on with by such options or such a model.
    """
    resume = resume and (output / CHECKPOINT).exists()
    if resume:
        saved = read_checkpoint(output / CHECKPOINT)
        require_same_run(output, saved, yaml.safe_load(resolved) or {}, model)
        say(f"going on after step {saved.step} of {output / CHECKPOINT}")
    if first_process():
        start_folder(output, overwrite, resolved)
    return resume


def require_same_run(output: Path, saved: Checkpoint, settings: dict[str, Any], model: nn.Module) -> None:
    """ValueError, naming the option, if a checkpoint would mean something else with these settings and this model."""
    path = output / CONFIG
    then: dict[str, Any] = (yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None) or {}
    then.pop("model", None)
    then["model"] = saved.model  # config.yaml may name files that have moved, and leaves classes out
    now = settings | {"model": json.loads(json.dumps(describe(model)["arguments"]))}
    for name, old, new in changes(then, now):
        if lasts(name, old, new):
            raise ValueError(
                f"{name.replace('.arguments.', '.')} is {in_words(new)}, but the run in {output} was begun with"
                f" {in_words(old)}: go on with that, or begin another run in another --output"
            )
    if saved.shapes != {name: value.shape for name, value in model.state_dict().items()}:
        raise ValueError(
            f"{output / CHECKPOINT} holds the weights of another model than this {type(model).__name__}: give model as"
            f" {path} has it"
        )
    steps = settings.get("trainer", {}).get("max_steps", saved.step)
    if steps < saved.step:
        raise ValueError(
            f"trainer.max_steps is {steps}, but {output / CHECKPOINT} was written after step {saved.step}: give as many"
            " or more"
        )


def lasts(name: str, old: Any, new: Any) -> bool:
    """Whether an option must be the same throughout a run, and not become another value."""
    if name.startswith("model."):
        return name.rpartition(".")[2] not in PASSING
    return name in LASTING or (name == AVERAGE and None in (old, new))


def say_stopped(output: Path, step: int, signal: int) -> int:
    """Tell how to go on with a run that a signal has ended; returns the exit code."""
    say(f"stopped after step {step}; the same command with --resume goes on from {output / CHECKPOINT}")
    return 128 + signal


def say_where(output: Path, files: Mapping[str, str]) -> None:
    """Name the files of a finished run, with what each is."""
    say("\n".join(f"{output / name}: {text}" for name, text in files.items()))
