"""Checkpoints of guided-diffusion and improved-diffusion: the UNet they hold, and their weights under our names."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]

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
    (r"^out\.2\.", "out_conv."),
]


def arguments_of(state: State) -> dict[str, Any]:
    """What shapes tell of a UNet's arguments: all but its heads, dropout and checkpointing.

    Raises:
        ValueError: if the names are not those of the reference's ``UNetModel``.
    """
    needed = ("time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight", "out.2.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"This is not a checkpoint of guided-diffusion's UNetModel: it has no {missing[0]}.")
    channels = state["time_embed.0.weight"].shape[1]
    depth, resampling = _rhythm(state)
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("output_blocks."))
    firsts = [f"input_blocks.{1 + first}" for first in range(0, blocks, depth + 1)]
    widths = [state[f"{first}.0.out_layers.0.weight"].shape[0] for first in firsts]
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "channels": channels,
        "multipliers": [width // channels if width % channels == 0 else width / channels for width in widths],
        "depth": depth,
        "attention": [2**level for level, first in enumerate(firsts) if f"{first}.1.qkv.weight" in state],
        "num_classes": state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
        "scale_shift": state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
        "resampling": resampling,
    }


def _rhythm(state: State) -> tuple[int, str]:
    """Residual blocks a level, and what resamples between levels, from where the first level ends."""
    for name in sorted(state, key=_block):
        match = re.match(r"output_blocks\.(\d+)\.[12]\.(in_layers\.0|conv)\.weight", name)
        if match:
            return int(match[1]), "conv" if match[2] == "conv" else "block"
    # Resampling without weights leaves its blocks without names.
    indices = {_block(name) for name in state if name.startswith("input_blocks.")}
    first_gap = next(i for i in range(len(indices) + 1) if i not in indices)
    return first_gap - 1, "pool"


def _block(name: str) -> int:
    return int(name.split(".")[1]) if re.match(r"(in|out)put_blocks\.\d", name) else -1


def rename(state: State, heads: int | None, head_channels: int, new_attention_order: bool) -> dict[str, Tensor]:
    """The reference's weights under our names.

    Args:
        heads, head_channels: as for the UNet.
        new_attention_order: rows of the qkv weights go by q, k, v and then by heads, as ours do; else the other way.
    """
    renamed = {}
    for name, value in state.items():
        if ".qkv." in name and not new_attention_order:
            count = heads or value.shape[0] // 3 // head_channels
            value = value.unflatten(0, (count, 3, -1)).transpose(0, 1).flatten(0, 2)
        if name.endswith((".qkv.weight", ".proj_out.weight")):
            value = value.squeeze(-1)  # a convolution of one position is a linear layer
        renamed[_ours(name)] = value
    return renamed


def _ours(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    # The reference counts the stem as the encoder's first block.
    return re.sub(r"^encoder\.(\d+)", lambda match: f"encoder.{int(match[1]) - 1}", name)
