"""What results on disk were made with."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ABSENT = object()


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a command keeps; ValueError, which says what to do, if it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is broken: remove it and what is beside it, or choose another --output")
    return content


def differences(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> dict[str, tuple[Any, Any]]:
    """Both values of what differs between nested settings, by names such as `fit.epochs`; of one alone, ABSENT."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{above}{key}.")
        elif a != b:
            found[f"{above}{key}"] = old.get(key, ABSENT), new.get(key, ABSENT)
    return found


def format_value(value: Any) -> str:
    """A value as YAML has it, not too long; a model by its class."""
    if isinstance(value, Mapping) and "class" in value:
        return value["class"].rpartition(":")[2]
    return textwrap.shorten(value if isinstance(value, str) else json.dumps(value), 100, placeholder=" ...")
