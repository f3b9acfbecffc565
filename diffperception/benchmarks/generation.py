"""The ADM UNet against diffusers' UNet2DModel of the same layout in the same process: 64 pixels, batch 8, float32."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception.benchmarks.timing import Row, Say, best_seconds, ratio_table
from diffperception.models import UNet

SIZE, BATCH = 64, 8
CHANNELS, MULTIPLES, DEPTH, ATTENTION, HEAD_CHANNELS = 64, (1, 2, 2, 4), 2, (4, 8), 64
TARGET = 0.8

_Network = Callable[[], Tensor]


def time_unet(repeats: int, say: Say, device: torch.device | str = "cpu") -> str:
    """Tables of a forward pass and of a training step: diffusers' (the unit), diffusers' with channels last, ours.

    Args:
        repeats: the best of so many runs counts, with the networks taking turns.

    Raises:
        ValueError: diffusers is not installed.
    """
    torch.manual_seed(0)
    widths: dict[str, Any] = {"channels": CHANNELS, "channel_mult": MULTIPLES, "num_head_channels": HEAD_CHANNELS}
    ours = UNet(**widths, num_res_blocks=DEPTH, attention=ATTENTION).to(device)
    peer, peer_last = _diffusers().to(device), _diffusers().to(device, memory_format=torch.channels_last)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, peer)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01, sizes
    x, noise = torch.randn(2, BATCH, 3, SIZE, SIZE).to(device)
    t = torch.randint(1000, (BATCH,)).to(device)
    networks: list[tuple[nn.Module, _Network]] = [
        (peer, lambda: peer(x, t).sample),
        (peer_last, lambda: peer_last(x.contiguous(memory_format=torch.channels_last), t).sample),
        (ours, lambda: ours(x, t)),
    ]
    say("forward passes")
    with torch.no_grad():
        forward = best_seconds([network for _, network in networks], repeats)
    say("training steps")
    steps = best_seconds([_training_step(model, network, noise) for model, network in networks], repeats)
    return f"{_table('forward pass', *forward)}\n{_table('training step', *steps)}"


def _table(what: str, theirs: float, channels_last: float, ours: float) -> str:
    rows = [Row(f"diffusers' UNet2DModel, {what} (unit)", theirs), Row("the same, channels last", channels_last)]
    return ratio_table([*rows, Row(f"our UNet, {what}", ours, TARGET)])


def _training_step(model: nn.Module, network: _Network, noise: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)

    def step() -> None:
        F.mse_loss(network(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _diffusers() -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ValueError("this compares with diffusers, which is not installed: pip install diffusers") from error
    attends = [2**level in ATTENTION for level in range(len(MULTIPLES))]
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)),
        block_out_channels=tuple(CHANNELS * multiplier for multiplier in MULTIPLES),
        layers_per_block=DEPTH,
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=HEAD_CHANNELS,
        norm_num_groups=32,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
    )
