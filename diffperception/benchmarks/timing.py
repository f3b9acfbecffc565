"""Timing on any device, and tables of ratios."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.utils.benchmark import timer  # waits for the accelerator, where there is one

from diffperception.table import format_table

BLOCK = 0.1  # seconds that a measurement of short functions takes at least

Function = Callable[[], object]
Say = Callable[[str], None]  # what is measured next


@dataclass(frozen=True)
class Row:
    """One measurement: what, its seconds, and the most units that it may take (None: nothing is promised)."""

    name: str
    seconds: float
    target: float | None = None


def best_seconds(functions: Sequence[Function], repeats: int) -> list[float]:
    """The least of `repeats` wall times of each, after a run to warm up: what disturbs a run only ever adds time.

    They are measured in turn: what disturbs for minutes then disturbs all.
    """
    runs = [max(1, math.ceil(BLOCK / seconds_of(function))) for function in functions]
    rounds = [[seconds_of(*pair) for pair in zip(functions, runs, strict=True)] for _ in range(repeats)]
    return [min(times) for times in zip(*rounds, strict=True)]


def seconds_of(function: Function, runs: int = 1) -> float:
    """Mean wall time of as many runs one after another, until the device is done."""
    start = timer()
    for _ in range(runs):
        function()
    return (timer() - start) / runs


def ratio_table(rows: Sequence[Row]) -> str:
    """Seconds of each row, how many times the first row's they are (the unit), and the most units that are promised."""
    unit = rows[0].seconds
    lines = [(row.name, f"{row.seconds:.4g}", f"{row.seconds / unit:.2f}", row.target or "") for row in rows]
    return format_table(lines, ["", "seconds", "units", "at most"])
