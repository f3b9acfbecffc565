"""What modules of a network of diffusers give while it runs, read by hooks, and where the image is in it."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Output:
    """Where in what a module gives the image is: in which of its tensors, its channels, and its stride in cells."""

    index: int
    channels: int
    stride: int


class _EnoughError(Exception):
    """Ends a pass once everything wanted has been seen."""


# Hooks lie on modules: those of a pass see passes inside of it, and of other threads, as well, which are not theirs.
_innermost: ContextVar[_EnoughError | None] = ContextVar("innermost", default=None)


def outputs_until(
    network: nn.Module, modules: Sequence[str], attending: Sequence[str], run: Callable[[], Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What modules give in a pass that ends when all have, and how layers of attention attend meanwhile.

    Args:
        modules: paths of modules, each of which the pass runs.
        attending: of cross-attention layers.
        run: does the pass.

    Returns: the modules' outputs, and (B, cells, words) of each layer, the mean over its heads.
    """
    outputs: dict[str, Any] = {}
    attention: dict[str, Tensor] = {}
    enough = _EnoughError()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if _innermost.get() is not enough:
                return
            outputs[name] = output
            if len(outputs) == len(set(modules)):
                raise enough

        return hook

    def attend(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, options: Mapping[str, Any]) -> None:
            if _innermost.get() is enough:
                attention[name] = attention_to_words(layer, *args, **options)

        return hook

    with ExitStack() as stack:
        for name in set(modules):
            stack.callback(network.get_submodule(name).register_forward_hook(keep(name)).remove)
        for name in attending:
            layer = network.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(attend(name), with_kwargs=True).remove)
        token = _innermost.set(enough)
        try:
            run()
        except _EnoughError as error:
            if error is not enough:
                raise
        finally:
            _innermost.reset(token)
    return outputs, attention


def attention_to_words(
    layer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """How a cross-attention layer of diffusers attends (B, cells, words), the mean over heads: rows sum to 1.

    It is computed beside what the layer does itself, whatever kernel that uses, and so changes nothing of it.
    """
    words = encoder_hidden_states
    if layer.norm_cross is not None:
        words = layer.norm_encoder_hidden_states(words)
    mask = layer.prepare_attention_mask(attention_mask, words.shape[1], len(words))
    query, key = (layer.head_to_batch_dim(x) for x in (layer.to_q(hidden_states), layer.to_k(words)))
    rows = layer.get_attention_scores(query, key, mask)
    return rows.unflatten(0, (len(words), -1)).mean(1)


def _tensors(output: Any) -> list[Any]:
    """The parts of what a module gives: a tensor, a tuple, or a dictionary."""
    return (
        [output]
        if isinstance(output, Tensor)
        else [*(output.values() if isinstance(output, Mapping) else output or ())]
    )


def place_of(output: Any, cells: Sequence[int], multiple: int, words: int) -> Output | None:
    """Where the image is in what a module gives of a single one of so many cells, down and across, and so many words.

    Strides are divisors of ``multiple``. No number of cells is that of the words.
    """
    strides = [s for s in range(1, multiple + 1) if multiple % s == 0]
    size = {s: tuple(side // s for side in cells) for s in strides}
    parts = [(i, part) for i, part in enumerate(_tensors(output)) if isinstance(part, Tensor) and len(part) == 1]
    for beside in (0, words):  # words lie before the cells where a block joins them
        for index, part in parts:
            for stride in strides:
                if part.ndim == 4 and tuple(part.shape[2:]) == size[stride]:
                    return Output(index, part.shape[1], stride)
                if part.ndim == 3 and part.shape[1] == math.prod(size[stride]) + beside:
                    return Output(index, part.shape[2], stride)
    return None


def as_map(output: Any, place: Output, x: Tensor) -> Tensor:
    """The image in what a module gives of x (B, C, h, w): (B, channels, h / stride, w / stride)."""
    part: Tensor = _tensors(output)[place.index]
    if part.ndim == 4:
        return part
    height, width = (side // place.stride for side in x.shape[2:])
    return part[:, -height * width :].mT.unflatten(2, (height, width))
