"""The layouts that our UNet and diffusers' UNet2DModel have in common: its options as arguments of ours, and names.

Nothing of diffusers is imported. An option of one that the other lacks is refused by its name.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from diffperception.files import read_json
from diffperception.models.convert.checkpoints import assign, complaints
from diffperception.models.unet.blocks import Attention, Resample, ResBlock, SpatialTransformer
from diffperception.models.unet.unet import UNet

Config = Mapping[str, Any]


class ForeignLayoutError(ValueError):
    """A network of diffusers that our UNet cannot be; other programs may run it."""


LARGEST = 10**6  # of the numbers in a configuration; with wider layers even counting their weights overflows
# What UNet2DModel takes where its config.json says nothing; of _OPTIONAL it takes null too.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1.0,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
}
_OPTIONAL: dict[str, str | int | None] = {
    "sample_size": None,
    "mid_block_type": "UNetMidBlock2D",
    "time_embedding_dim": None,
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "class_embed_type": None,
    "num_class_embeds": None,
}
# Arguments of ours that leave its options as they are; noted under a name that diffusers ignores.
_UNSAID, NOTED = ("num_heads", "num_head_channels", "checkpointing"), "_diffperception"
# Its options that our UNet has at these values alone.
_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
}
# Blocks of a level: whether attention follows its residual blocks, and what resamples (None: as `downsample_type` or
# `upsample_type` says).
_BLOCKS: dict[str, tuple[bool, str | None]] = {
    **{f"{side}Block2D": (False, "conv") for side in ("Down", "Up")},
    **{f"Attn{side}Block2D": (True, None) for side in ("Down", "Up")},
    **{f"Resnet{side}sampleBlock2D": (False, "resnet") for side in ("Down", "Up")},
}
# Names of the parts of our layers, and of theirs, whose weights stand in one of ours one after the other.
_PARTS: dict[type[nn.Module], dict[str, tuple[str, ...]]] = {
    ResBlock: {
        **{name: (name,) for name in ("norm1", "conv1", "norm2", "conv2")},
        **{"time": ("time_emb_proj",), "skip": ("conv_shortcut",)},
    },
    Attention: {
        **{"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)},
        "words": ("add_k_proj", "add_v_proj"),
    },
    SpatialTransformer: {
        **{name: (name,) for name in ("norm", "proj_in", "proj_out")},
        **{f"block.{norm}": (f"transformer_blocks.0.{norm}",) for norm in ("norm1", "norm2", "norm3")},
        **{
            f"block.{ours}.{layer}": (f"transformer_blocks.0.{theirs}.{name}",)
            for ours, theirs in (("self_attention", "attn1"), ("cross_attention", "attn2"))
            for layer, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0"))
        },
        **{"block.gate": ("transformer_blocks.0.ff.net.0.proj",), "block.out": ("transformer_blocks.0.ff.net.2",)},
    },
    Resample: {"conv": ("conv",)},
}
_FIRST_AND_LAST = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "stem": "conv_in",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}


def read_object(path: Path) -> Config:
    """The content of a JSON file of diffusers; ValueError if it is none."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no configuration of diffusers: it must be a JSON object")
    return content


def unet_options(path: Path) -> Config:
    """All options of the UNet2DModel that a config.json describes; ValueError for another class, or odd values."""
    config = read_object(path)
    if config.get("_class_name") != "UNet2DModel":
        raise ForeignLayoutError(f"{path} is of the class {config.get('_class_name')}, and our UNet only a UNet2DModel")
    options = {name: config.get(name, default) for name, default in (_DEFAULTS | _OPTIONAL).items()}
    for name, value in options.items():
        if not _is_value(name, value):
            raise ValueError(f"{path}: {name} = {as_json(value)} is no value that it can have")
    if len({len(options[name]) for name in ("block_out_channels", "down_block_types", "up_block_types")}) > 1:
        raise ValueError(f"{path}: block_out_channels, down_block_types and up_block_types are not of as many levels")
    noted = config.get(NOTED)
    return options | {NOTED: noted if isinstance(noted, dict) else {}}


def _is_value(name: str, value: Any) -> bool:
    """Whether an option has a value of its kind."""
    if name in _OPTIONAL:
        if name.endswith("_type"):
            return value is None or isinstance(value, str)
        sides = value if name == "sample_size" and isinstance(value, list) and len(value) == 2 else [value]
        return value is None or all(isinstance(side, int) and is_number(side) and side > 0 for side in sides)
    default = _DEFAULTS[name]
    if isinstance(default, list):
        return isinstance(value, list) and all(_is_alike(item, default[0]) and item for item in value)
    return _is_alike(value, default)


def _is_alike(value: Any, default: Any) -> bool:
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    return is_number(value) and isinstance(value, int | type(default))


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number of a usual size, 0 or more."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST


def unet_layout(config: Config) -> dict[str, Any]:
    """The arguments of our UNet for all options of a UNet2DModel; ForeignLayoutError for one that it lacks."""
    for name, values in _FIXED.items():
        if config[name] not in values:
            _refuse(config, name, f"only {' or '.join(map(as_json, values))}")
    widths, scale_shift = config["block_out_channels"], config["resnet_time_scale_shift"] == "scale_shift"
    if config["time_embedding_dim"] not in (None, 4 * widths[0]):
        _refuse(config, "time_embedding_dim", f"only 4 times the first of block_out_channels, {4 * widths[0]}")
    in_the_middle = config["attn_norm_num_groups"] or (None if scale_shift else config["norm_num_groups"])
    if in_the_middle != config["norm_num_groups"]:
        _refuse(config, "attn_norm_num_groups", f"only norm_num_groups, {config['norm_num_groups']}")
    attends, resampling = _levels(config)
    head = config["attention_head_dim"]
    attended = [width for width, level in zip(widths, attends, strict=True) if level] + widths[-1:]
    if head is not None and (head < 1 or any(width % head for width in attended)):
        _refuse(config, "attention_head_dim", f"only what divides the widths that attention has, {attended}")
    heads = {"num_heads": 1} if head is None else {"num_head_channels": head}
    layout = heads | {
        "in_channels": config["in_channels"],
        "out_channels": None if config["out_channels"] == config["in_channels"] else config["out_channels"],
        "channels": widths[0],
        "channel_mult": [width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attention": [2**level for level, follows in enumerate(attends) if follows],
        "dropout": config["dropout"],
        "scale_shift": scale_shift,
        "resampling": resampling,
        "norm_groups": config["norm_num_groups"],
        "norm_eps": config["norm_eps"],
        "frequency_shift": config["freq_shift"],
        "one_sided_padding": resampling == "conv" and config["downsample_padding"] == 0,
    }
    return _as_noted(layout, config[NOTED])


def _as_noted(layout: dict[str, Any], noted: Mapping[str, Any]) -> dict[str, Any]:
    """The layout with what was noted of a UNet of ours, unless that is no longer the same network."""
    known = {n: noted[n] for n in _UNSAID if n in noted and (noted[n] is None or isinstance(noted[n], int))}
    try:
        with torch.device("meta"):
            same = unet_config(UNet(**layout | known)) == unet_config(UNet(**layout)) | {NOTED: known}
    except ValueError:
        return layout
    return layout | known if same else layout


def _levels(config: Config) -> tuple[list[bool], str]:
    """Which levels, from the outermost, have attention, and our `resampling`; ValueError if the ways differ in them."""
    sides = {}
    for side in ("down", "up"):
        blocks = [str(name).removeprefix("UNetRes") for name in config[f"{side}_block_types"]]  # its prefix before 0.1
        known = [name for name in _BLOCKS if side.capitalize() in name]
        if any(name not in known for name in blocks):
            _refuse(config, f"{side}_block_types", f"only {', '.join(known)}")
        found = [_BLOCKS[name] for name in blocks]
        sides[side] = [(attends, resampler or config[f"{side}sample_type"]) for attends, resampler in found]
    down, up = sides["down"], sides["up"][::-1]
    if [attends for attends, _ in down] != [attends for attends, _ in up]:
        _refuse(config, "up_block_types", "only attention at the levels of down_block_types")
    # The innermost level is not halved, and the outermost not doubled.
    resamplers = {resampler for _, resampler in (*down[:-1], *up[1:])}
    if len(resamplers) > 1:
        _refuse(config, "down_block_types", "only one kind of resampling, conv or resnet, on all levels and both ways")
    return [attends for attends, _ in down], "block" if resamplers == {"resnet"} else "conv"


def unet_config(network: UNet) -> dict[str, Any]:
    """The options of the UNet2DModel that computes the same; ValueError naming an option of ours that it lacks."""
    options = network.arguments
    _require_expressible(network)
    widths = [round(network.channels * factor) for factor in options["channel_mult"]]
    by_block, heads = options["resampling"] == "block", options["num_heads"]
    head = None if heads == 1 else _attended(network)[0] // heads if heads else options["num_head_channels"]

    def block(level: int, side: str) -> str:
        if 2**level in options["attention"]:
            return f"Attn{side}Block2D"
        return f"Resnet{side}sampleBlock2D" if by_block else f"{side}Block2D"

    levels = range(len(widths))
    return {
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "block_out_channels": widths,
        "layers_per_block": options["num_res_blocks"],
        "down_block_types": [block(level, "Down") for level in levels],
        "up_block_types": [block(level, "Up") for level in reversed(levels)],
        "downsample_type": "resnet" if by_block else "conv",
        "upsample_type": "resnet" if by_block else "conv",
        "downsample_padding": 0 if options["one_sided_padding"] else 1,
        "attention_head_dim": head,
        "norm_num_groups": options["norm_groups"],
        "attn_norm_num_groups": options["norm_groups"],  # without it the middle's attention has no norm in scale_shift
        "norm_eps": options["norm_eps"],
        "freq_shift": options["frequency_shift"],
        "flip_sin_to_cos": True,
        "resnet_time_scale_shift": "scale_shift" if options["scale_shift"] else "default",
        "dropout": options["dropout"],
        NOTED: {name: options[name] for name in _UNSAID},
    }


def _require_expressible(network: UNet) -> None:
    options = network.arguments
    if options["context"] is not None:
        raise ValueError(f"diffusers cannot say context = {options['context']}: its UNet2DModel attends to no words")
    widths, heads = _attended(network), options["num_heads"]
    if options["resampling"] == "pool" and len(options["channel_mult"]) > 1:
        raise ValueError("diffusers cannot say resampling = pool: its UNet resamples by conv or block")
    if network.stem.out_channels != network.channels:
        raise ValueError(
            f"diffusers cannot say channel_mult = {list(options['channel_mult'])}: the first must be 1, for its UNet"
            " has as many sinusoids of time as channels at the first level"
        )
    if heads not in (None, 1) and len(widths) > 1:
        raise ValueError(
            f"diffusers cannot say num_heads = {heads} where attention has {' and '.join(map(str, widths))} channels:"
            " heads of its UNet have as many channels at every level"
        )


def _attended(network: UNet) -> list[int]:
    """The widths of the maps that have attention."""
    return sorted({layer.qkv.in_features for _, _, layer in _layers(network) if isinstance(layer, Attention)})


def assign_theirs(network: UNet, state: Mapping[str, Tensor], sines_first: bool, folder: Path) -> None:
    """Give the network the weights of a UNet2DModel; ValueError, in their names, if these are not all, or more.

    Args:
        sines_first: the time's embedding reads sines before cosines (`flip_sin_to_cos` is false).
        folder: for messages.
    """
    expected = {name: value.shape for name, value in to_theirs(network, network.state_dict())}
    # Attention's layers were convolutions of one position once.
    flat = {n: v.flatten(1) if v.ndim == 4 and len(expected.get(n, ())) == 2 else v for n, v in state.items()}
    if wrong := complaints(flat, expected):
        raise ValueError(f"{folder}: the weights are not those of its config.json. {wrong}")
    renamed, half = dict(_to_ours(network, flat)), network.channels // 2
    if sines_first:
        sines, cosines, rest = renamed["time_embed.0.weight"].tensor_split([half, 2 * half], dim=1)
        renamed["time_embed.0.weight"] = torch.cat([cosines, sines, rest], dim=1)
    assign(network, renamed, f"{folder} does not fit the UNet")


def to_theirs(network: UNet, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights of ours under their names."""
    for ours, theirs in _names(network):
        for kind in ("weight", "bias"):
            if (value := state.get(f"{ours}.{kind}")) is not None:
                yield from zip((f"{name}.{kind}" for name in theirs), value.chunk(len(theirs)), strict=True)


def _to_ours(network: UNet, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights of theirs under our names."""
    for ours, theirs in _names(network):
        for kind in ("weight", "bias"):
            if values := [state[f"{name}.{kind}"] for name in theirs if f"{name}.{kind}" in state]:
                yield f"{ours}.{kind}", torch.cat(values) if len(values) > 1 else values[0]


def _names(network: UNet) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The name of each layer with weights, and theirs of the layers that it stands for."""
    for ours, theirs in _FIRST_AND_LAST.items():
        yield ours, (theirs,)
    for ours, theirs, layer in _layers(network):
        for part, parts in _PARTS[type(layer)].items():
            yield f"{ours}.{part}", tuple(f"{theirs}.{name}" for name in parts)


def _layers(network: UNet) -> Iterator[tuple[str, str, nn.Module]]:
    """Our name, their name and the layer, of all but the first and last ones."""
    for ours, theirs, sampler in (("encoder", "down_blocks", "downsamplers"), ("decoder", "up_blocks", "upsamplers")):
        level = index = 0
        for number, stage in enumerate(getattr(network, ours)):
            place = f"{theirs}.{level}"
            resamples = False
            for part, layer in enumerate(stage):
                name = (
                    f"attentions.{index}" if isinstance(layer, Attention | SpatialTransformer) else f"resnets.{index}"
                )
                if isinstance(layer, Resample) or getattr(layer, "resample", None) is not None:
                    name, resamples = f"{sampler}.0", True
                yield f"{ours}.{number}.{part}", f"{place}.{name}", layer
            level, index = (level + 1, 0) if resamples else (level, index + 1)
    for part, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle.{part}", f"mid_block.{name}", network.middle[part]


def _refuse(config: Config, name: str, has: str) -> None:
    raise ForeignLayoutError(f"our UNet does not have {name} = {as_json(config[name])}, {has}")


def as_json(value: Any) -> str:
    """A value as its file has it, cut short if it is long."""
    return shorten(json.dumps(value), 100, placeholder=" ...")
