"""UNets of diffusers that attend to words, and CLIP's text tower, of tiny weights by name.

`python -m tests.parity.conditional_unets` writes their numbers anew and needs diffusers and transformers; the tests
need the numbers alone.
"""

import importlib
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffperception.models import UNet
from tests.parity import FOLDER, fill_state

NAME = "conditional_unets"
WIDTH = 24  # of a word's token
LAYERS = {"layers_per_block": 1, "norm_num_groups": 32, "cross_attention_dim": WIDTH}
GLIDE: dict[str, Any] = {  # the kind of GLIDE, unCLIP, Kandinsky and DeepFloyd
    **LAYERS,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 16,
    "resnet_time_scale_shift": "scale_shift",
}
LATENT: dict[str, Any] = {  # of latent and Stable Diffusion 1, which have a number of heads
    **LAYERS,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
}
STABLE_2: dict[str, Any] = {  # of Stable Diffusion 2: heads of a width, and linear layers around its transformers
    **LATENT,
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
}
# Each kind of network by its options in diffusers, and the arguments of ours.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "glide": (
        GLIDE,
        {"out_channels": 6, "channels": 32, "channel_mult": (1, 2, 3), "attention": (2, 4), "num_head_channels": 16},
    ),
    "latent": (
        LATENT,
        {
            **{"in_channels": 4, "channels": 32, "channel_mult": (1, 2, 4), "attention": (1, 2), "num_heads": 2},
            **{"scale_shift": False, "resampling": "conv", "attention_kind": "transformer"},
        },
    ),
}
SAME["stable_2"] = (STABLE_2, SAME["latent"][1] | {"num_heads": None, "num_head_channels": 16})


def ours(kind: str) -> UNet:
    """Our network of a kind, with new weights."""
    return UNet(num_res_blocks=1, context=WIDTH, **SAME[kind][1]).eval()


def inputs(channels: int) -> dict[str, Tensor]:
    """Noisy images, times, tokens and which of these count."""
    rng = np.random.default_rng(channels)
    shapes = {"x": (2, channels, 8, 12), "tokens": (2, 5, WIDTH)}
    drawn = {name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
    return {
        **drawn,
        "t": torch.tensor([3.0, 700.0]),
        "mask": torch.tensor([[True] * 5, [True, True, True, False, False]]),
    }


def theirs(kind: str) -> nn.Module:
    """diffusers' network of a kind, with weights that are a function of each name."""
    network = importlib.import_module("diffusers").UNet2DConditionModel(sample_size=8, **SAME[kind][0])
    network.load_state_dict(fill_state({name: tuple(value.shape) for name, value in network.state_dict().items()}))
    return network.eval()


@torch.no_grad()
def outputs(network: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers' network gives, with all of the tokens and with those that count."""
    x, t, tokens, mask = (given[name] for name in ("x", "t", "tokens", "mask"))
    return {
        "all": network(x, t, tokens).sample,
        "counted": network(x, t, tokens, encoder_attention_mask=mask).sample,
    }


CLIP = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = [[38, 5, 17, 3, 39, 39, 39], [38, 1, 2, 3, 4, 5, 39]]


def clip_text_tower() -> nn.Module:
    """CLIP's text tower of transformers, with weights that are a function of each name."""
    transformers = importlib.import_module("transformers")
    options = {**CLIP, "intermediate_size": 128, "max_position_embeddings": 9, "hidden_act": "quick_gelu"}
    tower = transformers.CLIPTextModel(transformers.CLIPTextConfig(**options))
    shapes = {_ours_of_clip(name): (name, tuple(value.shape)) for name, value in tower.state_dict().items()}
    filled = fill_state({ours: shape for ours, (_, shape) in shapes.items() if "position_ids" not in ours})
    tower.load_state_dict({shapes[ours][0]: value for ours, value in filled.items()}, strict=False)
    return tower.eval()


def _ours_of_clip(name: str) -> str:
    """The name of a weight of CLIP's text tower in our TextEncoder."""
    renames = (
        (r"^text_model\.", ""),
        (r"embeddings\.token_embedding", "embedding"),
        (r"embeddings\.position_embedding\.weight", "positions"),
        (r"encoder\.layers", "blocks"),
        (r"layer_norm", "norm"),
        (r"final_norm", "norm"),
        (r"self_attn\.(\w+)_proj", r"attention.\1"),
        (r"mlp\.fc1", "wide"),
        (r"mlp\.fc2", "out"),
    )
    for pattern, ours in renames:
        name = re.sub(pattern, ours, name)
    return name


if __name__ == "__main__":
    with torch.no_grad():
        numbers = {"clip": clip_text_tower()(torch.tensor(IDS)).last_hidden_state.numpy()}
    for kind, (options, _) in SAME.items():
        found = outputs(theirs(kind), inputs(options["in_channels"]))
        numbers |= {f"{kind}_{name}": value.numpy() for name, value in found.items()}
    np.savez_compressed(FOLDER / f"{NAME}.npz", **numbers)
