"""What results on disk were made with."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a command keeps; ValueError, which says what to do, if it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is broken: remove it and what is beside it, or choose another --output")
    return content


def differences(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> list[str]:
    """The names, as `fit.epochs`, of what differs between nested settings."""
    names = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differences(a, b, f"{above}{key}.")
        elif a != b:
            names.append(f"{above}{key}")
    return names


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of what nested settings both have, but other values of."""
    for name in differences(old, new):
        *above, last = name.split(".")
        before, after = (reduce(lambda part, key: part[key], above, settings) for settings in (old, new))
        if last in before and last in after:
            yield name, before[last], after[last]


def format_value(value: Any) -> str:
    """A value as YAML has it, not too long; a model by its class."""
    if isinstance(value, Mapping) and "class" in value:
        return value["class"].rpartition(":")[2]
    return textwrap.shorten(value if isinstance(value, str) else json.dumps(value), 100, placeholder=" ...")
