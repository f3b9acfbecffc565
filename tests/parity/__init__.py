"""Numbers of reference implementations (inputs and outputs, no weights) to agree with."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.parity.fill import fill

FOLDER = Path(__file__).parent


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def filled_state(name: str) -> dict[str, Tensor]:
    """A checkpoint with the reference's names and weights that are a function of each name."""
    return fill_state(shapes(name))


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The reference's weights by name; not its diffusion tables, which have values of their own (no dot in a name)."""
    keys = json.loads((FOLDER / f"{name}_keys.json").read_text())
    return {key: tuple(shape) for key, shape in keys.items() if "." in key}


def fill_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that are a function of each name."""
    return {name: torch.from_numpy(fill(name, shape)) for name, shape in shapes.items()}


def distance(ours: Tensor, reference: Tensor) -> float:
    """Largest difference relative to the reference's spread."""
    return float((ours - reference).abs().max() / reference.std())
