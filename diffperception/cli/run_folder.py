"""The folder of a training run: what may become of an old one, and what is in it at the end."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml

from diffperception.cli import first_process, say
from diffperception.cli.report import write_text
from diffperception.tasks.fitting import CHECKPOINT, checkpoint_step

WEIGHTS = "model.safetensors"
WRITTEN = (
    "config.yaml",
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
    "config.yaml": "all options; use it as --config to repeat the run",
}


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


def start_or_go_on(output: Path, resume: bool, overwrite: bool, resolved: str) -> bool:
    """Prepare the folder, once data and model are known to be sound; whether there is a run to go on with."""
    resume = resume and (output / CHECKPOINT).exists()
    if resume:
        say(f"going on after step {checkpoint_step(output / CHECKPOINT)} of {output / CHECKPOINT}")
    if first_process():
        start_folder(output, overwrite, resolved)
    return resume


def say_stopped(output: Path, step: int, signal: int) -> int:
    """Tell how to go on with a run that a signal has ended; returns the exit code."""
    say(f"stopped after step {step}; the same command with --resume goes on from {output / CHECKPOINT}")
    return 128 + signal


def say_where(output: Path, files: Mapping[str, str]) -> None:
    """Name the files of a finished run, with what each is."""
    say("\n".join(f"{output / name}: {text}" for name, text in files.items()))
