"""Pixel classifiers that the reference of label-efficient segmentation (ddpm-segmentation) trained.

Each of its files is one member's: ``{"model_state_dict": {"module.layers.0.weight": ...}}``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffperception.models.convert.checkpoints import state_of

COUNTER = "num_batches_tracked"  # of batch norm; prediction does not need it


def read_members(paths: Sequence[str | Path]) -> tuple[int, int, dict[str, Tensor]]:
    """The members in ``paths``, a file ``model_0.pth``, ``model_1.pth``, ... each. Nothing in a file is run.

    Returns: channels D, classes K, and the weights by their names in the reference, members stacked: (M, ...) float32.
    FileNotFoundError without a file; ValueError if it holds something else, or members differ in size.
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
                shapes = f"{tuple(state[name].shape)} instead of {tuple(expected[name])}"
                raise ValueError(f"{path} does not fit the first member's file: {name} is {shapes}")
    stacked = {name: torch.stack([state[name].float() for state in states]) for name in expected}
    return expected["layers.0.weight"][1], expected["layers.6.weight"][0], stacked


def _read(path: Path) -> dict[str, Tensor]:
    return {name: value for name, value in state_of(path).items() if not name.endswith(COUNTER)}


def _shapes(state: Mapping[str, Tensor], path: str | Path) -> dict[str, torch.Size]:
    """Of the weights of a classifier whose first and last layer are this one's."""
    for name in ("layers.0.weight", "layers.6.weight"):
        if name not in state:
            raise ValueError(f"{path} is not a classifier of ddpm-segmentation: it has no {name}")
    width, channels = state["layers.0.weight"].shape
    classes, width2 = state["layers.6.weight"].shape
    with torch.device("meta"):
        hidden = nn.Linear(channels, width), nn.ReLU(), nn.BatchNorm1d(width)
        hidden2 = nn.Linear(width, width2), nn.ReLU(), nn.BatchNorm1d(width2)
        layers = nn.Sequential(*hidden, *hidden2, nn.Linear(width2, classes)).state_dict()
    return {f"layers.{name}": value.shape for name, value in layers.items() if not name.endswith(COUNTER)}
