"""Reading checkpoints of other programs, which are not trusted: weights and numbers alone, no code."""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

WEIGHT_KEYS = ("model", "state_dict")  # where training programs put the weights
EMA = "ema_state"

# What numpy's arrays and numbers are pickled with; numpy 2 renamed the module. Nothing here calls what a file names.
_RECONSTRUCT, _SCALAR = np.empty(0).__reduce__()[0], np.float64().__reduce__()[0]
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")),
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_weights(path: Path, ema: bool = False) -> tuple[dict[str, Tensor], str, list[str]]:
    """The weights in a file of PyTorch or safetensors, by name, on the CPU; no code in the file is run.

    Args:
        path: the file; its weights may lie under model, state_dict or ema_state.
        ema: take those under ema_state.

    Returns: the weights; the key they were under, empty if they are the file itself; and all such keys there are.
    Errors are those of :func:`load_untrusted`, and ValueError if there are no weights at that place.
    """
    content = load_untrusted(path)
    keys = (*WEIGHT_KEYS, EMA) if isinstance(content, Mapping) else ()
    parts = [key for key in keys if isinstance(content.get(key), Mapping)]
    if ema and EMA not in parts:
        raise ValueError(f"{path} has no averaged weights ({EMA}): leave out --ema")
    part = EMA if ema else next(iter(parts), "")
    found = content[part] if part else content
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path} holds no weights: a dictionary of tensors is expected")
    weights = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in found.items()}
    others = [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{path} has something else than tensors beside its weights ({', '.join(others[:8])}): they must be alone,"
            f" or under {', '.join(WEIGHT_KEYS)} or {EMA}"
        )
    return weights, part, parts


def complaints(given: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> str:
    """Sentences naming all weights that are missing, left over or of another shape; empty if there are none."""
    shapes = {name: (tuple(given[name].shape), tuple(expected[name])) for name in expected if name in given}
    found = {
        "missing": [name for name in expected if name not in given],
        "left over": [name for name in given if name not in expected],
        "of another shape": [
            f"{name} {has} instead of {needs}" for name, (has, needs) in shapes.items() if has != needs
        ],
    }
    return " ".join(
        f"{len(names)} {'name is' if len(names) == 1 else 'names are'} {kind}: {', '.join(names)}."
        for kind, names in found.items()
        if names
    )


def class_names(given: Sequence[str] | None, count: int) -> list[str]:
    """The names given for a checkpoint's classes, else their numbers; ValueError if there are not as many."""
    names = [str(label) for label in range(count)] if given is None else list(given)
    if len(names) != count:
        raise ValueError(f"{len(names)} class names are given for a checkpoint with {count or 'no'} classes")
    return names


def load_untrusted(path: Path) -> Any:
    """The tensors, arrays, numbers, texts and collections of them in a file of PyTorch or safetensors.

    FileNotFoundError without it; ValueError if it is damaged, or holds anything else, which could run code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # a damaged file can fail at any instruction of its pickle
        refused = re.search(r"(?:GLOBAL |got <class ')([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise ValueError(
                f"{path} holds more than weights ({refused[1]}), and reading that could run code: it is refused; ask"
                " for its weights alone, or save them alone from a program that you trust the file to"
            ) from None
        raise ValueError(
            f"{path} is damaged, or of another format than torch.save's and safetensors' ({type(error).__name__}):"
            " copy it again"
        ) from None
