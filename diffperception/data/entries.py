"""Entries of JSON files as numbers: what exporters write is read as it is meant, or named where it cannot be."""

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WIDEST = 2**63  # whole numbers are kept in int64


@dataclass(frozen=True)
class Rule:
    """How a value is read, with ValueError or TypeError where it cannot be, and what it should have been."""

    read: Callable[[Any], Any]
    expected: str
    optional: bool = False  # the key may be missing, or its value null


def whole_number(value: Any) -> int:
    """A whole number: 12, 12.0, "12" or "12.0", but not 12.5, true or what int64 cannot hold; else ValueError."""
    if isinstance(value, str):
        text = value.strip()
        value = int(text) if text.lstrip("+-").isdecimal() else float(text)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not -WIDEST <= value < WIDEST:
        raise ValueError(f"{value!r} is no whole number of 64 bits")
    return value


def finite_number(value: Any) -> float:
    """A finite number, as JSON's or as text; else ValueError."""
    if not isinstance(value, int | float | str) or not math.isfinite(read := float(value)):
        raise ValueError(f"{value!r} is no finite number")
    return read


def box(value: Any) -> list[float]:
    """Four finite numbers in a list; else ValueError."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise ValueError(f"{value!r} is not a list of four")
    return [finite_number(part) for part in value]


def text(value: Any) -> str:
    """A text that is not empty; else ValueError."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no text")
    return value


def category_name(value: Any) -> str:
    """A text that is not empty, or a number as text; else ValueError."""
    return str(value) if type(value) in (int, float) else text(value)


def flag(value: Any) -> bool:
    """0 or 1, also as text, and true or false; else ValueError."""
    if isinstance(value, bool):
        return value
    if (read := finite_number(value)) not in (0, 1):
        raise ValueError(f"{value!r} is neither 0 nor 1")
    return bool(read)


def integers(values: Sequence[Any]) -> np.ndarray:
    """(n,) int64 of values that `whole_number` reads; else ValueError, TypeError or OverflowError."""
    plain = {*map(type, values)} <= {int}
    return np.array(values if plain else [whole_number(value) for value in values], dtype=np.int64)


def numbers(values: Sequence[Any], read: Callable[[Any], float] = finite_number) -> np.ndarray:
    """(n,) float64 of values that `read` reads; ValueError, TypeError or OverflowError if it does not read one."""
    plain = {*map(type, values)} <= {int, float}
    array = np.array(values if plain else [read(value) for value in values], dtype=np.float64)
    return array if np.isfinite(array).all() else np.array([read(value) for value in values], dtype=np.float64)


def boxes(values: Sequence[Any]) -> np.ndarray:
    """(n, 4) float64 of values that `box` reads; ValueError, TypeError or OverflowError if it does not read one."""
    try:
        array = np.array(values, dtype=np.float64)
    except ValueError:  # lists of several lengths, or text that is no number
        array = np.empty(0)
    if array.shape != (len(values), 4) or not np.isfinite(array).all():
        array = np.array([box(value) for value in values], dtype=np.float64).reshape(-1, 4)
    return array


def flags(values: Sequence[Any]) -> np.ndarray:
    """(n,) bool of values that `flag` reads; ValueError or TypeError if it does not read one."""
    plain = {*values} <= {0, 1} if {*map(type, values)} <= {int, bool} else False
    return np.array(values if plain else [flag(value) for value in values], dtype=bool)


def faults(entry: Any, rules: Mapping[str, Rule]) -> Iterator[str]:
    """What is wrong with an entry, a phrase each: keys that it lacks, and values that their rules do not read."""
    if not isinstance(entry, dict):
        yield "it is not an object with keys"
        return
    for key, rule in rules.items():
        value = entry.get(key)
        if value is None and rule.optional:
            continue
        if key not in entry:
            yield f'it has no "{key}"'
            continue
        try:
            rule.read(value)
        except (KeyError, TypeError, ValueError, OverflowError):
            yield f'"{key}" is {reprlib.repr(value)}, not {rule.expected}'
