"""What results on disk were made with."""

from collections.abc import Mapping
from typing import Any


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
