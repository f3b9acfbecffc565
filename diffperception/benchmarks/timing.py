"""Timing on any device, and tables of ratios."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.utils.benchmark import timer  # waits for the accelerator, where there is one

from diffperception.table import format_table

BLOCK = 0.1  # seconds that a measurement of short functions takes at least

Function = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One measurement: what, its seconds, and the most units it may take (None where nothing is promised)."""

    name: str
    seconds: float
    target: float | None = None


def best_seconds(function: Function, repeats: int, warm_up: bool = True) -> float:
    """The least of `repeats` wall times: what disturbs a run only ever adds time.

    Args:
        warm_up: run it once before.
    """
    first = seconds_of(function) if warm_up else math.inf
    return min(seconds_of(function, _runs(first)) for _ in range(repeats))


def best_seconds_in_turn(functions: Sequence[Function], repeats: int) -> list[float]:
    """The `best_seconds` of each, measured in turn: what disturbs for minutes then disturbs all."""
    runs = [_runs(seconds_of(function)) for function in functions]
    rounds = [[seconds_of(*pair) for pair in zip(functions, runs, strict=True)] for _ in range(repeats)]
    return [min(times) for times in zip(*rounds, strict=True)]


def seconds_of(function: Function, runs: int = 1) -> float:
    """Mean wall time of as many runs one after another, until the device is done."""
    start = timer()
    for _ in range(runs):
        function()
    return (timer() - start) / runs


def _runs(seconds: float) -> int:
    return max(1, math.ceil(BLOCK / seconds))


def ratio_table(unit: Row, rows: list[Row]) -> str:
    """Seconds and units of each row, and the most units that are promised."""
    lines = [
        (row.name, f"{row.seconds:.4g}", f"{row.seconds / unit.seconds:.2f}", row.target or "") for row in [unit, *rows]
    ]
    return format_table(lines, ["", "seconds", "units", "at most"])
