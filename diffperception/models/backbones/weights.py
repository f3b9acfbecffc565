"""The weights of a timm model from a file, in place of those that timm fetches from the network."""

import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffperception.models.base import is_model_file
from diffperception.models.convert.checkpoints import complaints, state_of

COUNTER = "num_batches_tracked"  # of batch norms; files may be without


def load_weights(body: nn.Module, network: Any, path: Path) -> str:
    """Give a timm model's feature maps the weights of a file under timm's names; returns what was taken, in words.

    A prefix of all names, such as `backbone.`, comes off. What the maps do not need, such as a classifier, is left.

    Args:
        body: what gives the maps, before its norms are frozen.
        network: the whole model, for its names and shapes alone.
        path: a file of safetensors or PyTorch, no code in which is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind or network: weights that are missing, of another shape or of further
            layers are named; or numbers are not finite.
    """
    if is_model_file(path):
        raise ValueError(
            f"{path} is a model file of diffperception, not the weights of a backbone alone: name it --init"
        )
    own = {plain_name(name): name for name in body.state_dict()}
    names = {plain_name(name): name for name in network.state_dict()}
    expected = {names.get(plain, name): body.state_dict()[name].shape for plain, name in own.items()}
    state = _without_prefix(state_of(path), names)
    needed = {name: shape for name, shape in expected.items() if name in state or not name.endswith(COUNTER)}
    converted = bool(complaints({name: state[name] for name in needed if name in state}, needed))
    if converted:
        state = _in_todays_names(state, network)
    parts = {name.partition(".")[0] for name in expected}
    left = [name for name in state if name not in needed]
    known = {*names.values(), *(name for name in left if name.endswith(COUNTER))}
    deeper = [name for name in left if name.partition(".")[0] in parts and name not in known]
    given = {name: value for name, value in state.items() if name in needed or name in deeper}
    if wrong := complaints(given, needed):
        raise ValueError(
            f"{path} does not hold the weights of timm's {network.pretrained_cfg['architecture']}: {wrong}"
        )
    for name in needed:
        if state[name].is_floating_point() and not state[name].isfinite().all():
            raise ValueError(f"{path} has numbers that are not finite in {name}: take another file")
    body.load_state_dict({own[plain_name(name)]: state[name] for name in needed}, strict=False)
    number = sum(parameter.numel() for parameter in body.parameters())
    rest = ", ".join(sorted({name.partition(".")[0] for name in left}))
    return (
        f"the backbone starts from {path}: all of its {number / 1e6:.2f} M parameters"
        f"{', as timm converts them' if converted else ''}; left in the file: {rest or 'none'}"
    )


def plain_name(name: str) -> str:
    """The same for a weight of a network and of what gives its maps, where timm writes _ for some dots."""
    return name.removeprefix("model.").replace(".", "_")


def _without_prefix(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights, without the prefix with which most names are the network's; also by plain names alone."""
    votes: Counter[str] = Counter()
    for name in state:
        starts = [0, *(found.end() for found in re.finditer(r"\.", name))]
        votes.update(name[:start] for start in starts if plain_name(name[start:]) in names)
    prefix = max(votes, key=lambda prefix: (votes[prefix], -len(prefix)), default="")
    short = {name.removeprefix(prefix): value for name, value in state.items()}
    return {names.get(plain_name(name), name): value for name, value in short.items()}


def _in_todays_names(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights under names that timm had before, or the authors of a network have, under its names of today."""
    rename = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return state
    try:
        return rename(dict(state), network)
    except Exception:  # what these functions do with weights of another network is not theirs to say
        return state
