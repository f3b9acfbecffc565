"""Tiny folders of diffusers with random weights, a family each."""

from pathlib import Path
from typing import Any

import diffusers
import torch

WORD, POOLED = 24, 16  # widths of the embeddings of a word and of a prompt
UNET = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
TOKENS = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4}
JOINT = {"joint_attention_dim": WORD, "pooled_projection_dim": POOLED}
CROSS = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WORD,
    "attention_head_dim": 8,
}
TIMES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "unconditional": (
        "UNet2DModel",
        {
            **UNET,
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "num_class_embeds": 3,
        },
    ),
    "sd": ("UNet2DConditionModel", {**UNET, **CROSS}),
    "sdxl": (
        "UNet2DConditionModel",
        {**UNET, **CROSS, **TIMES, "projection_class_embeddings_input_dim": POOLED + 48, "use_linear_projection": True},
    ),
    "dit": (
        "DiTTransformer2DModel",
        {**TOKENS, "out_channels": 8, "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 5},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **TOKENS,
            **JOINT,
            "sample_size": 8,
            "num_layers": 3,
            "caption_projection_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {**TOKENS, **JOINT, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 4, 8)},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            **TOKENS,
            "out_channels": 8,
            "num_layers": 3,
            "sample_size": 8,
            "cross_attention_dim": 32,
            "caption_channels": WORD,
        },
    ),
    "flat": (
        "UNetFlatConditionModel",
        {
            **UNET,
            "down_block_types": ("CrossAttnDownBlockFlat", "DownBlockFlat"),
            "up_block_types": ("UpBlockFlat", "CrossAttnUpBlockFlat"),
            "cross_attention_dim": WORD,
            "attention_head_dim": 8,
        },
    ),
}
TRANSFORMERS = ("dit", "sd3", "flux", "pixart")
FLOW = ("sd3", "flux")


def network_of(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random network of diffusers, of which no layer gives zeros."""
    from diffperception.integrations.diffusers.families import class_of

    name, config = NETWORKS[family]
    torch.manual_seed(seed)
    network = class_of(name)(**config | changes).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return network


def autoencoder(**changes: Any) -> Any:
    """A random autoencoder whose cells are 4 pixels wide."""
    torch.manual_seed(1)
    config = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "shift_factor": 0.1,
    }
    return diffusers.AutoencoderKL(**config | changes).eval()


def write_pipeline(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A pipeline's folder, without its index and its text encoders."""
    network_of(family, seed, **changes).save_pretrained(folder / ("transformer" if family in TRANSFORMERS else "unet"))
    if family != "unconditional":
        autoencoder().save_pretrained(folder / "vae")
    if family in FLOW:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    elif family == "unconditional":
        scheduler = diffusers.DDPMScheduler()
    else:
        scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.save_pretrained(folder / "scheduler")
    return folder
