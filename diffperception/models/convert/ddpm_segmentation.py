"""Classifiers of ddpm-segmentation: one file a member, ``{"model_state_dict": {"module.layers.0.weight": ...}}``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from diffperception.segmentation.ensemble import PixelEnsemble
from diffperception.segmentation.mlp import hidden_widths

# Written by the reference, and nothing that an ensemble needs.
_COUNTER = "num_batches_tracked"


def load_reference_ensemble(
    paths: Sequence[str | Path], channels: int | None = None, num_classes: int | None = None
) -> PixelEnsemble:
    """The ensemble of the reference's files ``model_0.pth``, ``model_1.pth``, ... in evaluation mode.

    Sizes follow from the weights. Nothing in a file is run.

    Args:
        paths: a file a member.
        channels: D of the features it is meant for, to be told where they differ; ``args['dim'][-1]`` of the reference.
        num_classes: K likewise; ``args['number_class']`` of the reference.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file holds something else, members differ, or a size is not the one given.
    """
    if not paths:
        raise ValueError("name the file of at least one member of the ensemble")
    states = [_read(Path(path)) for path in paths]
    found = _sizes(states[0], paths[0])
    for name, wanted in (("channels", channels), ("num_classes", num_classes)):
        if wanted is not None and wanted != found[name]:
            raise ValueError(f"{name} is {found[name]} in {paths[0]}, not {wanted}")
    with torch.device("meta"):
        ensemble = PixelEnsemble(members=len(paths), **found)
    expected = {name: value.shape[1:] for name, value in ensemble.mlps.state_dict().items()}
    for state, path in zip(states, paths, strict=True):
        _check(state, expected, path)
    stacked = {name: torch.stack([state[name].float() for state in states]) for name in expected}
    ensemble.mlps.load_state_dict(stacked, assign=True)
    return ensemble.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no classifier file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a whole file of weights alone: {str(error).splitlines()[0]}") from None
    state = content.get("model_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} is not a classifier of ddpm-segmentation: it has no model_state_dict")
    return {name.removeprefix("module."): value for name, value in state.items() if not name.endswith(_COUNTER)}


def _sizes(state: Mapping[str, Tensor], path: str | Path) -> dict[str, int]:
    missing = [name for name in ("layers.0.weight", "layers.6.weight") if name not in state]
    if missing:
        raise ValueError(f"{path} is not a classifier of ddpm-segmentation: it has no {missing[0]}")
    sizes = {"channels": state["layers.0.weight"].shape[1], "num_classes": state["layers.6.weight"].shape[0]}
    width = state["layers.0.weight"].shape[0]
    if width != hidden_widths(sizes["num_classes"])[0]:
        raise ValueError(
            f"{path} has {sizes['num_classes']} classes and a first layer {width} wide; the reference makes it "
            f"{hidden_widths(sizes['num_classes'])[0]} wide: num_classes is wrong"
        )
    return sizes


def _check(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], path: str | Path) -> None:
    for name in {**expected, **state}:
        if name not in state or name not in expected:
            raise ValueError(f"{path} {'lacks' if name in expected else 'has an unknown'} {name}")
        if state[name].shape != expected[name]:
            shapes = f"{tuple(state[name].shape)} instead of {tuple(expected[name])}"
            raise ValueError(f"{path} does not fit the first member's file: {name} is {shapes}")
