"""Pixel classifiers that the reference of label-efficient segmentation (ddpm-segmentation) trained.

Each of its files is one member's: ``{"model_state_dict": {"module.layers.0.weight": ...}}``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffperception.models.convert.checkpoints import load_untrusted


def read_members(paths: Sequence[str | Path]) -> tuple[int, int, dict[str, Tensor]]:
    """The members that are in files ``model_0.pth``, ``model_1.pth``, ... Nothing in a file is run.

    Args:
        paths: a file per member.

    Returns: channels D, classes K, and the weights by their names in the reference, members stacked: (M, ...) float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file holds something else, or members differ in size.
    """
    if not paths:
        raise ValueError("name the file of at least one member of the ensemble")
    states = [_read(Path(path)) for path in paths]
    expected = _shapes(states[0], paths[0])
    for state, path in zip(states, paths, strict=True):
        for name in {**expected, **state}:
            if name not in state or name not in expected:
                raise ValueError(f"{path} {'lacks' if name in expected else 'has an unknown'} {name}")
            if state[name].shape != expected[name]:
                shapes = f"{tuple(state[name].shape)} instead of {expected[name]}"
                raise ValueError(f"{path} does not fit the first member's file: {name} is {shapes}")
    stacked = {name: torch.stack([state[name].float() for state in states]) for name in expected}
    return expected["layers.0.weight"][1], expected["layers.6.weight"][0], stacked


def _read(path: Path) -> dict[str, Tensor]:
    content = load_untrusted(path)
    state = content.get("model_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} is not a classifier of ddpm-segmentation: it has no model_state_dict")
    needed = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    return {name.removeprefix("module."): value for name, value in needed.items()}


def _shapes(state: Mapping[str, Tensor], path: str | Path) -> dict[str, tuple[int, ...]]:
    """What a classifier with the first and last layer of this one has: linear layers 0, 3 and 6, norms 2 and 5."""
    missing = [name for name in ("layers.0.weight", "layers.3.weight", "layers.6.weight") if name not in state]
    if missing:
        raise ValueError(f"{path} is not a classifier of ddpm-segmentation: it has no {missing[0]}")
    first, channels = state["layers.0.weight"].shape
    num_classes, second = state["layers.6.weight"].shape
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, size in ((0, (first, channels)), (3, (second, first)), (6, (num_classes, second))):
        shapes |= {f"layers.{layer}.weight": size, f"layers.{layer}.bias": size[:1]}
    for layer, width in ((2, first), (5, second)):
        shapes |= {f"layers.{layer}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
    return shapes
