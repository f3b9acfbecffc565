"""The folder of a training run: what may become of an old one, and what is in it."""

import dataclasses
import json
import os
import pickle
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from diffperception.configuration.inheritance import read_settings_file
from diffperception.configuration.settings import ABSENT, differences, format_value
from diffperception.files import CHECKPOINT, OutputFolder, digest, write_text
from diffperception.models.base import describe
from diffperception.training.loggers import BOARD, METRICS
from diffperception.training.module import ARGUMENTS, CONTENTS

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
FILES = {
    CHECKPOINT: "what --resume goes on from",
    METRICS: f"losses and scores over the steps; also as TensorBoard events in {BOARD}/",
    CONFIG: "all options; use it as --config to repeat the run",
}
# Options that decide what the weights or the optimizer's state mean, besides the model's and the recipe's.
LASTING = (
    *("task", "init", "data.batch_size"),
    *("optimizer.backbone_lr_factor", "optimizer.frozen_stages", "optimizer.layer_decay"),
)
AVERAGES = ("optimizer.ema_decay", "fit.ema_decay")  # may change, but not appear or go
PASSING = ("checkpointing", "dropout")  # arguments of models that say nothing of their weights


class RunFolder(OutputFolder):
    """The folder of a run, which need not be there; `files` are the names of what its recipe leaves, see `Recipe`."""

    def __init__(self, path: Path, files: Iterable[str]) -> None:
        super().__init__(path)
        names = dict.fromkeys([*FILES, WEIGHTS, "pictures/", *files])
        self.names = [name for name in names if not name.endswith("/")]
        self.subfolders = [name for name in names if name.endswith("/")]

    def require_place(self) -> None:
        """What may stay hangs on the options, see `require_room`."""

    def require_room(self, resume: bool, overwrite: bool) -> None:
        """ValueError if the folder holds a run, or files of somebody else, that would be lost."""
        if resume and overwrite:
            raise ValueError("give either --resume, to go on with the run, or --overwrite, to replace it")
        found = [name for name in self.names if os.path.lexists(self.path / name)]
        # Of a run that came here without its record; whether the checkpoint is of this run is looked at on resuming.
        moved = found if resume and CHECKPOINT in found else []
        inside = (path for name in self.subfolders for path in sorted((self.path / name).rglob("[!.]*")))
        drawn = [path.relative_to(self.path).as_posix() for path in inside if not path.is_dir()]
        written = self.written()
        foreign = [name for name in [*found, *drawn] if name not in moved and self.path / name not in written]
        if foreign:
            raise ValueError(
                f"{self.path / foreign[0]} is in the way of the run's own files, and no run there has written it as it"
                " is: move it away, or choose another --output"
            )
        if found and not (resume or overwrite):
            raise ValueError(
                f"{self.path} already holds a run ({', '.join(found)}): go on with it with --resume, replace it with"
                " --overwrite, or choose another --output"
            )
        if overwrite:
            self.require_unchanged()

    def begin(self, overwrite: bool, settings: Mapping[str, Any]) -> None:
        """Remove what an earlier run wrote, if it is to be replaced, and write the options."""
        if overwrite:
            self.clear()
        self.remove_parts()
        written = self.written()
        for path in (self.path / name for name in self.names):
            if os.path.lexists(path) and path not in written:
                self.note(path)  # of a run that came here without its record
            self.file(path.relative_to(self.path))
        self.boards = set((self.path / BOARD).glob("*"))
        if settings:
            kept = {name: value for name, value in settings.items() if name not in ("resume", "overwrite", "debug")}
            write_text(self.path / CONFIG, yaml.safe_dump(kept, sort_keys=False))

    def note_events(self) -> None:
        """Note the new files of TensorBoard, which names them after this process and writes them by itself."""
        for file in set((self.path / BOARD).glob("*")) - self.boards:
            self.note(file)


def read_to_resume(
    folder: RunFolder,
    settings: Mapping[str, Any],
    lasting: tuple[str, ...],
    max_steps: int,
    model: nn.Module,
    contents: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """The checkpoint, as Lightning wrote it, that a run goes on from; None if there is none.

    Args:
        settings: all options of the run that is to go on; none of them are compared where it is empty.
        lasting: names of options that must be as they were.
        max_steps: steps of the run that is to go on.
        model: what it trains.
        contents: numbers of what it learns from, see `contents_of`.

    Raises:
        ValueError: the checkpoint would mean something else with these settings, which it names, and this model; or it
            or config.yaml is broken.
    """
    path = folder.path / CHECKPOINT
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        step, arguments = saved["global_step"], json.loads(saved.get(ARGUMENTS, "{}"))
        shapes = {name: value.shape for name, value in saved["state_dict"].items() if name.startswith("model.")}
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        raise ValueError(
            f"{path} is cut short or no checkpoint of ours: start again without --resume and with --overwrite, or fetch"
            " a whole copy"
        ) from None
    then = read_settings_file(folder.path / CONFIG) if settings else {}
    then["model"] = arguments  # config.yaml may name files that have moved, and leaves classes out
    now = {**settings, "model": json.loads(json.dumps(describe(model)["arguments"]))}
    for name, (old, new) in differences(then, now).items():
        if old is not ABSENT and new is not ABSENT and _lasts(name, old, new, lasting):
            raise ValueError(
                f"{name.replace('.arguments.', '.')} is {format_value(new)}, but the run in {folder.path} was begun"
                f" with {format_value(old)}: go on with that, or begin another run in another --output"
            )
    before = json.loads(saved.get(CONTENTS, "{}"))
    if changed := [name for name, content in (contents or {}).items() if before.get(name, content) != content]:
        raise ValueError(
            f"what is in {', '.join(changed)} has changed since the run in {folder.path} was begun: bring back what was"
            " there, or begin another run in another --output"
        )
    if shapes != {f"model.{name}": value.shape for name, value in model.state_dict().items()}:
        raise ValueError(
            f"{path} holds the weights of another model than this {type(model).__name__}: give model as"
            f" {folder.path / CONFIG} has it"
        )
    if max_steps < step:
        raise ValueError(f"trainer.max_steps is {max_steps}, but {path} was written after step {step}: give no fewer")
    return saved


def contents_of(data: Any) -> dict[str, str]:
    """Numbers of what a run learns from, by the names of its options: a file's content, a folder's files and contents.

    A folder of images is known by the files' names and sizes, for reading all would take long, and not at all where
    annotations say which of them count.

    Args:
        data: a dataclass with paths, of which those for validation do not count.
    """
    if not dataclasses.is_dataclass(data):
        return {}
    fields = {f.name: getattr(data, f.name) for f in dataclasses.fields(data) if not f.name.startswith("val_")}
    paths = {name: Path(value) for name, value in fields.items() if isinstance(value, Path)}
    if any(name.endswith("annotations") for name in paths):
        paths = {name: path for name, path in paths.items() if not name.endswith("images")}
    return {f"data.{name}": _content(path, by_size=name.endswith("images")) for name, path in paths.items()}


def _content(path: Path, by_size: bool) -> str:
    if not path.is_dir():
        return digest(path) if path.is_file() else ""
    files = sorted(file for file in path.rglob("[!.]*") if file.is_file())
    about = [[f.relative_to(path).as_posix(), f.stat().st_size if by_size else digest(f)] for f in files]
    return blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()


def _lasts(name: str, old: Any, new: Any, lasting: tuple[str, ...]) -> bool:
    """Whether an option must be the same throughout a run, and not become another value."""
    if name.startswith("model."):
        return name.rpartition(".")[2] not in PASSING and not name.endswith(".origin.place")
    return name in (*LASTING, *lasting) or (name in AVERAGES and None in (old, new))
