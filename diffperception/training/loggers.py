"""The numbers of a run on disk: metrics.csv and TensorBoard events."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """One row of numbers a step, in `folder/metrics.csv` and as scalars under `folder/tensorboard`.

    Args:
        after: the step that a resumed run goes on from: rows of later steps, written before it was interrupted, go.
    """

    def __init__(self, folder: Path, after: int = 0):
        self.path = folder / "metrics.csv"
        self.rows = {step: row for step, row in _read(self.path).items() if step <= after}
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1 if after else None)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add numbers to the row of `step`."""
        row = self.rows.setdefault(step, {"step": str(step)})
        row.update({name: f"{value:.6g}" for name, value in numbers.items()})
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        self._save()

    def close(self) -> None:
        self.board.close()

    def _save(self) -> None:
        columns = dict.fromkeys(name for row in self.rows.values() for name in row)  # in order of appearance
        beside = self.path.with_name(self.path.name + ".part")
        with open(beside, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(row for _, row in sorted(self.rows.items()))
        os.replace(beside, self.path)


def _read(path: Path) -> dict[int, dict[str, str]]:
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        rows = [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]
    return {int(row["step"]): row for row in rows}
