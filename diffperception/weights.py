"""Models on disk: safetensors with the constructor's arguments in the header. Loading never runs code from a file."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = "diffperception-1"


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write a model with an `arguments` attribute (its constructor's: JSON-able, or models that have one) to one file.

    The file is written beside and renamed, so that an interruption leaves the old one.

    Raises:
        ValueError: there is a folder of that name.
    """
    path = Path(path)
    require_file_name(path)
    described = describe(model)
    header = {"format": FORMAT, "class": described["class"], "arguments": json.dumps(described["arguments"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.touch()
    try:
        permissions = beside.stat().st_mode
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, beside, header)
        beside.chmod(permissions)  # of any new file; safetensors leaves it to its owner alone
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def require_file_name(path: Path) -> None:
    """ValueError if `path` is a folder."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file, {path / 'model.safetensors'} for example")


def load_model(path: str | Path, allow: tuple[str, ...] = ("diffperception",)) -> nn.Module:
    """Build the model that a file describes and give it the file's weights, in evaluation mode on the CPU.

    Args:
        allow: packages that the file may name its class from; name yours to load your own classes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a model file, cut short, or its class lies outside `allow`.
    """
    if not Path(path).is_file():
        hint = ": name the model.safetensors in that folder" if Path(path).is_dir() else ""
        raise FileNotFoundError(f"there is no model file {path}{hint}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        advice = "take the model.safetensors beside it" if Path(path).suffix == ".ckpt" else "copy or export it again"
        raise ValueError(f"{path} is not a whole safetensors file ({error}): {advice}") from None
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by diffperception: `diffperception convert` reads foreign checkpoints"
        )
    model = _build(header["class"], json.loads(header["arguments"]), path, allow)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the {type(model).__name__} it describes: {error}") from None
    return model.eval()


def describe(model: nn.Module) -> dict[str, Any]:
    """A model's class and its constructor's arguments, which are JSON-able if its `arguments` are."""
    kind = type(model)
    arguments: dict[str, Any] = model.arguments  # type: ignore[assignment]
    return {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "arguments": {k: describe(v) if isinstance(v, nn.Module) else v for k, v in arguments.items()},
    }


def _build(name: str, arguments: dict[str, Any], path: str | Path, allow: tuple[str, ...]) -> nn.Module:
    built = {
        k: _build(v["class"], v["arguments"], path, allow)
        if isinstance(v, dict) and v.keys() == {"class", "arguments"}
        else v
        for k, v in arguments.items()
    }
    return _resolve(name, path, allow)(**built)


def _resolve(name: str, path: str | Path, allow: tuple[str, ...]) -> type[nn.Module]:
    module, _, attribute = name.partition(":")
    if module.split(".")[0] not in allow:
        raise ValueError(f"{path} names the class {name}: pass allow=({module.split('.')[0]!r},) if you trust it")
    found = getattr(importlib.import_module(module), attribute, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{path} names {name}, which is not a model of this version")
    return found
