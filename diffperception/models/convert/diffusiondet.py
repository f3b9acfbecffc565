"""Checkpoints of the reference DiffusionDet: what their names and shapes say, and their weights under our names."""

import fnmatch
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from diffperception.diffusion import cosine_schedule
from diffperception.models.convert.checkpoints import class_names, complaints

_COCO_CATEGORIES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_CLASSES = [name for name in _COCO_CATEGORIES if name not in ("__background__", "N/A")]

# Blocks of each of the four stages; of a Swin first the channels of the patches and the side of a window.
RESNETS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
SWINS = {
    "swin_tiny_patch4_window7_224": (96, 7, 2, 2, 6, 2),
    "swin_small_patch4_window7_224": (96, 7, 2, 2, 18, 2),
    "swin_base_patch4_window7_224": (128, 7, 2, 2, 18, 2),
    "swin_base_patch4_window12_384": (128, 12, 2, 2, 18, 2),
}

# Beginnings of names: ours, then the reference's; {} is a number that both have. Names are detectron2's.
_STAGE = [
    ("attention.", "self_attn."),
    ("attention_norm.", "norm1."),
    ("interaction_norm.", "norm2."),
    ("ffn_norm.", "norm3."),
    ("interaction.generate.", "inst_interact.dynamic_layer."),
    ("interaction.norm1.", "inst_interact.norm1."),
    ("interaction.norm2.", "inst_interact.norm2."),
    ("interaction.out.", "inst_interact.out_layer."),
    ("interaction.out_norm.", "inst_interact.norm3."),
    ("ffn.0.", "linear1."),
    ("ffn.2.", "linear2."),
    ("time_modulation.", "block_time_mlp."),
    ("class_tower.", "cls_module."),
    ("box_tower.", "reg_module."),
    ("class_logits.", "class_logits."),
    ("box_deltas.", "bboxes_delta."),
]
_RESNET_BLOCK = [
    ("downsample.0.", "shortcut."),
    ("downsample.1.", "shortcut.norm."),
    *((f"conv{n}.", f"conv{n}.") for n in (1, 2, 3)),
    *((f"bn{n}.", f"conv{n}.norm.") for n in (1, 2, 3)),
]
_BODY = [
    ("conv1.", "stem.conv1."),
    ("bn1.", "stem.conv1.norm."),
    # detectron2 counts a ResNet's stages from 2, timm from 1.
    *((f"layer{n}.{{}}.{a}", f"res{n + 1}.{{}}.{b}") for n in (1, 2, 3, 4) for a, b in _RESNET_BLOCK),
    ("patch_embed.", "patch_embed."),
    ("layers_{}.blocks.", "layers.{}.blocks."),
    # The original Swin downsamples at the end of a stage, timm at the beginning of the next.
    *((f"layers_{n + 1}.downsample.", f"layers.{n}.downsample.") for n in (0, 1, 2)),
]
_NAMES = [
    ("head.time_embedding.0.", "head.time_mlp.1."),
    ("head.time_embedding.2.", "head.time_mlp.3."),
    *((f"head.stages.{{}}.{a}", f"head.head_series.{{}}.{b}") for a, b in _STAGE),
    *((f"backbone.fpn.inner_blocks.{n}.0.", f"backbone.fpn_lateral{n + 2}.") for n in range(4)),
    *((f"backbone.fpn.layer_blocks.{n}.0.", f"backbone.fpn_output{n + 2}.") for n in range(4)),
    *((f"backbone.backbone.body.{a}", f"backbone.bottom_up.{b}") for a, b in _BODY),
    ("backbone.backbone.norms.{}.", "backbone.bottom_up.norm{}."),
]
_PATTERNS = [(re.compile(re.escape(ours).replace(r"\{\}", r"(\d+)")), theirs) for ours, theirs in _NAMES]

# Constants that our model computes, and what only the reference's loss has.
_NOT_WEIGHTS = re.compile(
    r"betas|(sqrt_|sqrt_one_minus_|log_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod|alphas_cumprod_prev"
    r"|posterior_\w+|pixel_mean|pixel_std|criterion\..+|.+\.relative_position_index"
)
_HEAD = "head.head_series."


def constructor_arguments(state: Mapping[str, Tensor], classes: Sequence[str] | None = None) -> dict[str, Any]:
    """The arguments of `DiffusionDet` that a checkpoint's names and shapes tell; those of its head under `head`.

    Each size is what most of the tensors that show it say, so that :func:`rename` can name single ones that are wrong,
    missing or left over; a size that none shows is the reference's own. Attention heads (8), the signal scale and the
    number of boxes leave no trace and keep their defaults.

    Args:
        state: tensors by the reference's names.
        classes: names of labels 0..K-1; by default COCO's if K is 80, else the numbers.

    Raises:
        ValueError: the names are not DiffusionDet's, the backbone is unknown, or `classes` are not K.
    """
    _require_weights(state)
    width = _size(state, f"{_HEAD}?.norm?.*", 0, 256)
    num_classes = _size(state, f"{_HEAD}?.class_logits.*", 0, len(classes or COCO_CLASSES))
    if classes is None and num_classes == len(COCO_CLASSES):
        classes = COCO_CLASSES
    table = state.get("alphas_cumprod")
    return {
        "classes": class_names(classes, num_classes),
        "backbone": _backbone(state),
        "freeze_norm": True,
        "head": {
            "width": width,
            "stages": _count(state, r"head\.head_series\.(\d+)\."),
            "pool_size": isqrt(_size(state, f"{_HEAD}?.inst_interact.out_layer.weight", 1, 49 * width) // width),
            "dynamic_width": _size(state, f"{_HEAD}?.inst_interact.norm1.*", 0, 64),
            "ffn_width": _size(state, f"{_HEAD}?.linear1.*", 0, 2048),
            # The tower's modules are Linear, LayerNorm, ReLU in turn.
            "box_layers": _count(state, r"head\.head_series\.\d+\.reg_module\.(\d+)\.", 8) // 3 + 1,
        },
        "num_timesteps": 1000 if table is None else table.numel(),
    }


def rename(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights in `state`, a checkpoint, under the names of `model`, a `DiffusionDet` of its sizes.

    Warns where the checkpoint's noise schedule or image normalisation is not the model's. ValueError if weights are
    missing, left over or of another shape; they are named as the checkpoint would.
    """
    _warn_of_other_constants(state)
    given = {name: value for name, value in state.items() if not _NOT_WEIGHTS.fullmatch(name)}
    shapes = {reference_name(name): value.shape for name, value in model.state_dict().items()}
    if wrong := complaints(given, shapes):
        raise ValueError(f"the checkpoint does not fit the model that most of its shapes tell. {wrong}")
    return {name: given[reference_name(name)] for name in model.state_dict()}


def reference_name(name: str) -> str:
    """The reference's name of one of our weights."""
    for pattern, theirs in _PATTERNS:
        found = pattern.match(name)
        if found:
            return theirs.format(*found.groups()) + name[found.end() :]
    raise ValueError(f"the reference has no weight like {name}")


def _require_weights(state: Mapping[str, Any]) -> None:
    """ValueError unless there are tensors alone, and some under the names of DiffusionDet's."""
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"give the weights alone, by their names: there are no tensors under {', '.join(others)}")
    prefixes = [name.partition(_HEAD)[0] for name in state if _HEAD in name]
    if not prefixes:
        raise ValueError(f"this is no checkpoint of the reference DiffusionDet: it has no {_HEAD}*")
    if "" not in prefixes:
        raise ValueError(f"the checkpoint's names begin with {prefixes[0]!r}, not as the reference's: take that off")


def _backbone(state: Mapping[str, Tensor]) -> str:
    """timm's name of the backbone."""
    blocks = [_count(state, rf"backbone\.bottom_up\.res{stage}\.(\d+)\.") for stage in range(2, 6)]
    if any(blocks):
        return _nearest("ResNet with blocks", blocks, RESNETS)
    blocks = [_count(state, rf"backbone\.bottom_up\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4)]
    if any(blocks):
        channels = _size(state, "backbone.bottom_up.layers.0.blocks.?.norm?.*", 0, 96)
        offsets = _size(state, "*.relative_position_bias_table", 0, 13**2)  # (2 * window - 1) ** 2
        window = (isqrt(offsets) + 1) // 2
        return _nearest("Swin with channels, window, blocks", [channels, window, *blocks], SWINS)
    raise ValueError("the checkpoint has neither a ResNet (backbone.bottom_up.res2) nor a Swin (...layers.0)")


def _nearest(kind: str, found: list[int], models: Mapping[str, tuple[int, ...]]) -> str:
    """The model most like what was found: a quarter of its blocks may differ, so that missing ones can be named."""
    differences = {
        name: sum(abs(a - b) for a, b in zip(known[-4:], found[-4:], strict=True))
        for name, known in models.items()
        if list(known[:-4]) == found[:-4]
    }
    near = [name for name in differences if 4 * differences[name] <= sum(models[name][-4:])]
    if near:
        return min(near, key=differences.__getitem__)
    choice = "; ".join(f"{', '.join(map(str, known))} ({name})" for name, known in models.items())
    raise ValueError(f"the checkpoint's backbone is a {kind} {', '.join(map(str, found))}; known are {choice}")


def _count(state: Mapping[str, Tensor], pattern: str, otherwise: int = 0) -> int:
    """One more than the largest number that the pattern captures in names; ``otherwise`` if it captures none.

    Rare numbers do not count: a single wrong name does not make a stage or a block.
    """
    numbers = Counter(int(found[1]) for name in state if (found := re.match(pattern, name)))
    usual = max(numbers.values(), default=0)
    return 1 + max((number for number, times in numbers.items() if 2 * times >= usual), default=otherwise - 1)


def _size(state: Mapping[str, Tensor], names: str, axis: int, otherwise: int) -> int:
    """The commonest length along `axis` of the tensors whose names fit a pattern with * and ?; `otherwise` if none."""
    tensors = [state[name] for name in fnmatch.filter(state, names)]
    lengths = Counter(tensor.shape[axis] for tensor in tensors if tensor.dim() > axis)
    return lengths.most_common(1)[0][0] if lengths else otherwise


def _warn_of_other_constants(state: Mapping[str, Tensor]) -> None:
    """A model that was trained with other constants than ours may detect worse than it could."""
    expected = {
        "pixel_mean": ("image normalisation", 255 * torch.tensor(IMAGENET_DEFAULT_MEAN)),
        "pixel_std": ("image normalisation", 255 * torch.tensor(IMAGENET_DEFAULT_STD)),
    }
    if "alphas_cumprod" in state:
        schedule = cosine_schedule(state["alphas_cumprod"].numel())
        expected["alphas_cumprod"] = ("noise schedule", schedule.alpha(torch.arange(schedule.num_timesteps)) ** 2)
    for name, (meaning, ours) in expected.items():
        given = state[name].flatten().double().cpu() if name in state else ours.double()
        if given.shape != ours.shape or not torch.allclose(given, ours.double(), atol=1e-4):
            warnings.warn(
                f"{name} of the checkpoint is not DiffusionDet's {meaning}: expect worse detections", stacklevel=4
            )
