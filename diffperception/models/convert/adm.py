"""Checkpoints of guided-diffusion and improved-diffusion: the model they hold, and their weights under our names."""

import re
from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffperception.models.convert.checkpoints import assign, complaints

State = Mapping[str, Tensor]
AnyModel = TypeVar("AnyModel", bound=nn.Module)
LABELS = "label_emb.weight"  # (K, E), which a generator of ours keeps in its conditioner

_CLASSIFIER = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight")
_UNET = (*_CLASSIFIER, "output_blocks.0.0.in_layers.0.weight", "out.2.weight")

# (pattern, replacement) from the reference's names to ours; every one applies.
_NAMES = [
    (r"^input_blocks\.0\.0\.", "stem."),
    (r"^input_blocks\.", "encoder."),
    (r"^middle_block\.", "middle."),
    (r"^output_blocks\.", "decoder."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".skip."),
    (r"\.proj_out\.", ".out."),
    (r"\.op\.", ".conv."),
    (r"^out\.0\.", "out_norm."),
    (r"^out\.2\.positional_embedding$", "pool.positions"),
    (r"^out\.2\.qkv_proj\.", "pool.qkv."),
    (r"^out\.(2\.c_proj|3)\.", "pool.out."),
    (r"^out\.2\.", "out_conv."),
]
# (pattern of our names, argument that decides on these weights); the first that fits.
_DECIDING = [
    (r"\.time\.", "scale_shift"),
    (r"^(encoder|decoder)\.\d+\.\d+\.conv\.", "resampling"),
    (r"\.(norm|qkv|out)\.(weight|bias)$", "attention"),
    (r"^out_conv\.", "out_channels"),
    (r"^stem\.", "in_channels, channels"),
    (r"", "channels, channel_mult, num_res_blocks"),
]


def is_unet(state: State) -> bool:
    """Whether the names are like those of the reference's ``UNetModel``, which alone has a decoder."""
    return all(name in state for name in _CLASSIFIER) and any(name.startswith("output_blocks.") for name in state)


def is_classifier(state: State) -> bool:
    """Whether the names are like those of the reference's ``EncoderUNetModel``."""
    return all(name in state for name in _CLASSIFIER) and not is_unet(state)


def build(
    make: Callable[..., AnyModel],
    layout: Mapping[str, Any],
    state: State,
    num_heads: int | None,
    num_head_channels: int | None,
    new_attention_order: bool,
) -> AnyModel:
    """The model of a checkpoint, with its weights; ``layout`` are the constructor's arguments, all but the heads'.

    The others, and the errors, are as for :meth:`UNet.from_reference`.
    """
    if (num_heads is None) == (num_head_channels is None):
        raise ValueError(
            "Give either num_heads or num_head_channels (64 in ADM's models): a checkpoint does not tell them."
        )
    num_head_channels = 64 if num_head_channels is None else num_head_channels
    with torch.device("meta"):
        model = make(num_heads=num_heads, num_head_channels=num_head_channels, **layout)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    renamed = {}
    for name, value in state.items():
        linear = len(expected.get(_ours(name), ())) == 2 < value.ndim  # in the reference a convolution of one position
        renamed[_ours(name)] = value.flatten(1) if linear else value
    _require_fit(type(model).__name__, layout, expected, renamed, {_ours(name): name for name in state})
    if not new_attention_order:
        for name in (_ours(name) for name in state if ".qkv." in name):  # by heads and then by q, k, v; ours by these
            rows = renamed[name].unflatten(0, (num_heads or len(renamed[name]) // 3 // num_head_channels, 3, -1))
            renamed[name] = rows.transpose(0, 1).flatten(0, 2)
    assign(model, renamed, f"the checkpoint does not fit the {type(model).__name__}")
    return model


def _require_fit(
    kind: str, layout: Mapping[str, Any], expected: Mapping[str, torch.Size], renamed: State, theirs: Mapping[str, str]
) -> None:
    """ValueError unless the renamed weights are those expected: names them as ``theirs``, and what decides on them."""
    wrong = [n for n in {**expected, **renamed} if n not in renamed or renamed[n].shape != expected.get(n)]
    if wrong:
        listed = ", ".join(f"{name} {value}" for name, value in layout.items())
        given = {theirs[ours]: value for ours, value in renamed.items()}
        wanted = {theirs.get(ours, f"our {ours}"): shape for ours, shape in expected.items()}
        deciding = dict.fromkeys(next(what for pattern, what in _DECIDING if re.search(pattern, n)) for n in wrong)
        raise ValueError(
            f"The checkpoint does not fit the {kind} that most of its weights describe ({listed})."
            f" {complaints(given, wanted)} It is not whole, or check what it was built with: {'; '.join(deciding)}."
        )


def unet_arguments(state: State) -> dict[str, Any]:
    """A UNet's arguments, all but heads, dropout and checkpointing; ValueError for other names than ``UNetModel``'s."""
    if LABELS in state:
        raise ValueError("This UNet has an embedding of labels: take the whole generator, which keeps it beside.")
    for name in _UNET:
        _length(state, name, 0)
    num_res_blocks, resampling = _decoder_depth(state)
    outputs = _length(state, "out.2.weight", 0)
    return _encoder_arguments(state, num_res_blocks) | {"out_channels": outputs, "resampling": resampling}


def classifier_arguments(state: State, num_res_blocks: int | None) -> tuple[dict[str, Any], int]:
    """A noisy classifier's arguments, as :func:`unet_arguments`, and its number of classes.

    ValueError for other names than ``EncoderUNetModel``'s, if it pools neither by attention nor by averages, or if
    ``num_res_blocks``, residual blocks per level, must be given or does not fit.
    """
    if is_unet(state):
        raise ValueError("This is a checkpoint of guided-diffusion's UNetModel, not of a classifier.")
    for name in _CLASSIFIER:
        _length(state, name, 0)
    num_res_blocks, resampling = _encoder_depth(state, num_res_blocks)
    layout = _encoder_arguments(state, num_res_blocks) | {"resampling": resampling}
    if "out.3.weight" in state:
        return layout | {"pool": "adaptive"}, _length(state, "out.3.weight", 0)
    if "out.2.positional_embedding" not in state:
        raise ValueError("The classifier pools neither by attention nor by averages; no other pooling is read.")
    # One position is that of the mean.
    side = isqrt(_length(state, "out.2.positional_embedding", 1) - 1)
    image_size = side * 2 ** (len(layout["channel_mult"]) - 1)
    return layout | {"pool": "attention", "image_size": image_size}, _length(state, "out.2.c_proj.weight", 0)


def _encoder_arguments(state: State, num_res_blocks: int) -> dict[str, Any]:
    channels = _length(state, "time_embed.0.weight", 1)
    firsts = [f"input_blocks.{first}" for first in range(1, _encoder_blocks(state), num_res_blocks + 1)]
    widths = [_length(state, f"{first}.0.out_layers.0.weight", 0) for first in firsts]
    return {
        "in_channels": _length(state, "input_blocks.0.0.weight", 1),
        "channels": channels,
        "channel_mult": [width // channels if width % channels == 0 else width / channels for width in widths],
        "num_res_blocks": num_res_blocks,
        "attention": [2**level for level, first in enumerate(firsts) if f"{first}.1.qkv.weight" in state],
        "scale_shift": _length(state, "input_blocks.1.0.emb_layers.1.weight", 0) == 2 * widths[0],
    }


def _length(state: State, name: str, axis: int) -> int:
    """Of a weight along an axis; ValueError if there is no such weight or axis."""
    if name not in state:
        raise ValueError(f"This is not a whole checkpoint of guided-diffusion's: it has no {name}.")
    if state[name].ndim <= axis or not state[name].numel():
        raise ValueError(f"The checkpoint's {name} {tuple(state[name].shape)} is no layer of guided-diffusion's.")
    return state[name].shape[axis]


def _decoder_depth(state: State) -> tuple[int, str]:
    """Residual blocks a level, and what resamples between levels, from where the first level of the decoder ends."""
    for name in sorted(state, key=_block):
        match = re.match(r"output_blocks\.(\d+)\.[12]\.(in_layers\.0|conv)\.weight", name)
        if match:
            return int(match[1]), "conv" if match[2] == "conv" else "block"
    # Resampling without weights leaves its blocks without names.
    indices = {_block(name) for name in state if name.startswith("input_blocks.")}
    first_gap = next(i for i in range(len(indices) + 1) if i not in indices)
    return first_gap - 1, "pool"


def _encoder_depth(state: State, num_res_blocks: int | None) -> tuple[int, str]:
    """The same from the encoder alone, whose downsampling residual blocks are named as the others."""
    blocks = _encoder_blocks(state)
    for i in range(1, blocks):
        if f"input_blocks.{i}.0.op.weight" in state:
            return i - 1, "conv"
        if f"input_blocks.{i}.0.in_layers.0.weight" not in state:
            return i - 1, "pool"
    fitting = [d for d in range(1, blocks) if blocks % (d + 1) == 0 and _may_have_depth(state, blocks, d)]
    if num_res_blocks is None and len(fitting) == 1:
        return fitting[0], "block"
    if num_res_blocks not in fitting:
        raise ValueError(
            f"The checkpoint's names fit num_res_blocks {' or '.join(map(str, fitting)) or 'no number'}, "
            f"not {num_res_blocks}: give the number it was built with."
        )
    return num_res_blocks, "block"


def _may_have_depth(state: State, blocks: int, num_res_blocks: int) -> bool:
    """Whether widths change and attention comes and goes at the first blocks of levels of so many alone."""
    for i in range(1, blocks):
        place = i % (num_res_blocks + 1)  # 1 is the first of a level, 0 the one that downsamples
        attends, level_attends = (f"input_blocks.{j}.1.qkv.weight" in state for j in (i, i - place + 1))
        widens = f"input_blocks.{i}.0.skip_connection.weight" in state
        if attends != (level_attends and place > 0) or (widens and place != 1):
            return False
    return True


def _encoder_blocks(state: State) -> int:
    """Blocks of the encoder, the stem among them: a multiple of one more than those of a level."""
    return 1 + max(_block(name) for name in state if name.startswith("input_blocks."))


def _block(name: str) -> int:
    return int(name.split(".")[1]) if re.match(r"(in|out)put_blocks\.\d", name) else -1


def _ours(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    # The reference counts the stem as the encoder's first block.
    return re.sub(r"^encoder\.(\d+)", lambda match: f"encoder.{int(match[1]) - 1}", name)
