"""Where the numbers of a run go: metrics.csv, TensorBoard, Weights & Biases."""

import csv
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from diffperception.files import written_beside
from diffperception.training.options import LoggerName

METRICS = "metrics.csv"
BOARD = "tensorboard"


class CsvLog(Logger):
    """One row of numbers per step in a CSV file, which is whole at any time.

    Args:
        path: the file.
        after: the step that a resumed run goes on from: rows of later steps, written before it was interrupted, go.
    """

    name = "csv"
    version = None

    def __init__(self, path: Path, after: int = 0):
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, str]] = {}
        if after and path.is_file():
            with open(path, encoding="utf-8", newline="") as file:
                rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
            self.rows = {int(row["step"]): row for row in rows if int(row["step"]) <= after}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add numbers to the row of `step`."""
        assert step is not None
        row = self.rows.setdefault(step, {"step": str(step)})
        row.update({name: f"{value:.6g}" for name, value in metrics.items()})
        columns = dict.fromkeys(name for row in self.rows.values() for name in row)  # in order of appearance
        with written_beside(self.path) as beside, open(beside, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(row for _, row in sorted(self.rows.items()))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Options are in config.yaml."""


def require_loggers(names: LoggerName | Sequence[LoggerName]) -> None:
    """ValueError if one is not installed."""
    if "wandb" in names and find_spec("wandb") is None:
        raise ValueError("trainer.logger wandb needs the package wandb: pip install wandb")


def open_loggers(names: LoggerName | Sequence[LoggerName], folder: Path | None, after: int) -> list[Logger]:
    """The loggers of these names; none without a folder. `after` is as for :class:`CsvLog`."""
    loggers: list[Logger] = []
    if folder is None:
        return loggers
    if "csv" in names:
        loggers.append(CsvLog(folder / METRICS, after))
    if "tensorboard" in names:
        loggers.append(TensorBoardLogger(folder, "", BOARD, purge_step=after + 1 if after else None))
    if "wandb" in names:
        loggers.append(WandbLogger(folder.resolve().name, folder))
    return loggers
