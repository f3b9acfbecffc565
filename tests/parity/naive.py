"""Backbones of the reference as plain functions of its weights, written for clarity alone."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
BODY = "backbone.bottom_up."


def resnet_maps(state: State, images: Tensor) -> list[Tensor]:
    """(B, 3, H, W) -> the outputs of res2 to res5."""

    def convolve(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{BODY}{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return F.batch_norm(
            x, *(state[f"{BODY}{name}.norm.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
        )

    x = F.max_pool2d(F.relu(convolve(images, "stem.conv1", stride=2)), kernel_size=3, stride=2, padding=1)
    maps = []
    for stage in (2, 3, 4, 5):
        for block in range(_count(state, f"{BODY}res{stage}.")):
            name, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            shortcut = convolve(x, f"{name}.shortcut", stride) if block == 0 else x
            x = F.relu(convolve(x, f"{name}.conv1"))
            x = F.relu(convolve(x, f"{name}.conv2", stride))
            x = F.relu(convolve(x, f"{name}.conv3") + shortcut)
        maps.append(x)
    return maps


def swin_maps(state: State, images: Tensor, window: int) -> list[Tensor]:
    """(B, 3, H, W) -> the normalised outputs of the four stages, (B, C, H', W')."""
    x = F.conv2d(images, state[f"{BODY}patch_embed.proj.weight"], state[f"{BODY}patch_embed.proj.bias"], stride=4)
    x = _norm(state, f"{BODY}patch_embed.norm", x.permute(0, 2, 3, 1))
    maps = []
    for stage in range(4):
        for block in range(_count(state, f"{BODY}layers.{stage}.blocks.")):
            shift = window // 2 if block % 2 else 0
            x = _swin_block(state, f"{BODY}layers.{stage}.blocks.{block}", x, window, shift)
        maps.append(_norm(state, f"{BODY}norm{stage}", x).permute(0, 3, 1, 2))
        if stage < 3:
            four = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            normed = _norm(state, f"{BODY}layers.{stage}.downsample.norm", four)
            x = F.linear(normed, state[f"{BODY}layers.{stage}.downsample.reduction.weight"])
    return maps


def _swin_block(state: State, name: str, x: Tensor, window: int, shift: int) -> Tensor:
    """(B, H, W, C): every pixel attends to every other, but for a bias of minus infinity outside its window."""
    height, width = x.shape[1:3]
    table = state[f"{name}.attn.relative_position_bias_table"]
    padded = F.pad(_norm(state, f"{name}.norm1", x), (0, 0, 0, -width % window, 0, -height % window))
    qkv = _linear(state, f"{name}.attn.qkv", padded.flatten(1, 2)).unflatten(-1, (3, table.shape[1], -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, H * W, C / heads)
    scores = q @ k.mT / q.shape[-1] ** 0.5 + _window_bias(table, *padded.shape[1:3], window, shift)
    attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(padded.shape)
    x = x + _linear(state, f"{name}.attn.proj", attended)[:, :height, :width]
    hidden = F.gelu(_linear(state, f"{name}.mlp.fc1", _norm(state, f"{name}.norm2", x)))
    return x + _linear(state, f"{name}.mlp.fc2", hidden)


def _window_bias(table: Tensor, height: int, width: int, window: int, shift: int) -> Tensor:
    """(heads, H * W, H * W): the table by offset; -100 between parts that the shift brought together."""
    indices, together, apart = [], [], []
    for side in (height, width):
        place = (torch.arange(side) - shift) % side  # of each row or column after the cyclic shift
        part = (place >= side - window).int() + (place >= side - shift) if shift else torch.zeros(side)
        indices.append((place[:, None] - place + window - 1).clamp(0, 2 * window - 2))
        together.append(place[:, None] // window == place // window)
        apart.append(part[:, None] != part)

    def both_axes(of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor, Tensor]:
        shape = (height, width, height, width)
        return (
            of_rows[:, None, :, None].expand(shape).reshape(height * width, -1),
            of_columns[None, :, None, :].expand(shape).reshape(height * width, -1),
        )

    rows, columns = both_axes(*indices)
    bias = table[rows * (2 * window - 1) + columns]
    bias = bias - 100.0 * torch.logical_or(*both_axes(*apart))[..., None]
    return bias.masked_fill(~torch.logical_and(*both_axes(*together))[..., None], -torch.inf).permute(2, 0, 1)


def pyramid(state: State, maps: list[Tensor]) -> list[Tensor]:
    """FPN over maps of strides 4 to 32, finest first."""
    result: list[Tensor] = []
    above = None
    for level in (5, 4, 3, 2):
        x = F.conv2d(maps[level - 2], *(state[f"backbone.fpn_lateral{level}.{kind}"] for kind in ("weight", "bias")))
        above = x if above is None else x + above.repeat_interleave(2, -1).repeat_interleave(2, -2)
        out = (state[f"backbone.fpn_output{level}.{kind}"] for kind in ("weight", "bias"))
        result.insert(0, F.conv2d(above, *out, padding=1))
    return result


def _count(state: State, beginning: str) -> int:
    return len({name[len(beginning) :].split(".")[0] for name in state if name.startswith(beginning)})


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])
