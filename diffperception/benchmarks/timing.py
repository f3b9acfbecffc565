"""Timing, and tables of ratios."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measurement: what, its seconds, and the most units it may take (None where nothing is promised)."""

    name: str
    seconds: float
    target: float | None = None


def best_seconds(function: Callable[[], object], repeats: int) -> float:
    """The least of `repeats` wall times after one warm-up: what disturbs a run only ever adds time."""
    return best_seconds_in_turn([function], repeats)[0]


def best_seconds_in_turn(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """:func:`best_seconds` of each, run alternately: what disturbs for minutes then disturbs all."""
    for function in functions:
        function()
    return [min(times) for times in zip(*([_seconds(f) for f in functions] for _ in range(repeats)), strict=True)]


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratio_table(unit: Row, rows: list[Row]) -> str:
    """Seconds and units of each row, and whether a promised number is kept."""
    lines = [f"{'':44}{'seconds':>9}{'units':>8}{'at most':>9}"]
    for row in [unit, *rows]:
        target = "" if row.target is None else f"{row.target:9.1f}"
        lines.append(f"{row.name:44}{row.seconds:9.3f}{row.seconds / unit.seconds:8.2f}{target}")
    return "\n".join(lines)
