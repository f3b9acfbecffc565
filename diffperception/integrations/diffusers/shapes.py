"""What a network of diffusers gives where, found by passes without weights on the meta device."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from diffperception.integrations.diffusers.families import FAMILIES, class_of
from diffperception.integrations.diffusers.hooks import Output, place_of
from diffperception.models import Condition

PROBED_WORDS = 5  # no number of cells of the small inputs, powers of 4


@cache
def outputs_of(architecture: str, config: str) -> dict[str, Output | None]:
    """Of each module that a pass runs, in the order in which they end; None where it gives no map of the image.

    Args:
        config: of the network, as JSON.
    """
    family, found = FAMILIES[architecture], dict[str, Output | None]()
    twin = twin_of(architecture, json.loads(config))
    x, t, told = small_input(architecture, twin)
    multiple = family.multiple(twin.config)

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = place_of(output, x.shape[2:], multiple, PROBED_WORDS)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in twin.named_modules():
            if name:
                stack.callback(module.register_forward_hook(note(name)).remove)
        family.run(twin, x, t, told, pixels=1)
    return found


def twin_of(architecture: str, config: dict[str, Any]) -> Any:
    """A network without weights."""
    with torch.device("meta"):
        twin = class_of(architecture).from_config(config)
    return twin.to("meta").eval()


def small_input(architecture: str, twin: Any) -> tuple[Tensor, Tensor, Condition]:
    """x, times and what it is told, of a network without weights."""
    family, config = FAMILIES[architecture], twin.config
    words, vectors = family.word_width(config), family.vector_widths(config)
    with torch.device("meta"):
        x = torch.zeros(1, family.channels(config)[0], *family.probed(config))
        told = Condition(
            tokens=None if words is None else torch.zeros(1, PROBED_WORDS, words),
            vector=torch.zeros(1, vectors[0]) if vectors else None,
            labels=torch.zeros(1, dtype=torch.int64) if family.labels(config)[0] else None,
        )
        return x, torch.zeros(1), told
