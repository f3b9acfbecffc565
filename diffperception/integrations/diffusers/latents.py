"""The space of diffusers' autoencoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffperception.integrations.diffusers.families import AUTOENCODERS, class_of
from diffperception.integrations.diffusers.weights import plain, read_component
from diffperception.models import Space


class Latents(Space):
    """What an autoencoder of diffusers makes of images, scaled and shifted to about unit variance.

    Of a distribution of codes its mode is taken, so that features do not depend on chance.

    Args:
        architecture: the class in diffusers: AutoencoderKL, VQModel or AutoencoderTiny.
        config: of the autoencoder, as its config.json has it.

    Raises:
        ImportError, ValueError: diffusers is absent; another class.
    """

    kind = "autoencoder of diffusers"
    bounded = False
    shift: Tensor  # (C, 1, 1)
    spread: Tensor  # (C, 1, 1)

    def __init__(self, architecture: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        if architecture not in AUTOENCODERS:
            raise ValueError(f"{architecture} is no autoencoder that is run here: these are {', '.join(AUTOENCODERS)}")
        self.architecture = architecture
        self.network = class_of(architecture).from_config(plain(config))
        full = self.network.config
        self.record(config=plain(full))
        self.channels, self.image_channels = full["latent_channels"], full["in_channels"]
        self.stride = 2 ** (len(full.get("block_out_channels") or full["encoder_block_out_channels"]) - 1)
        self.scale, shift = full.get("scaling_factor") or 1.0, full.get("shift_factor") or 0.0
        means, deviations = full.get("latents_mean"), full.get("latents_std")
        shifts, spreads = means or [shift] * self.channels, deviations or [1.0] * self.channels
        self.register_buffer("shift", torch.tensor(shifts).view(-1, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(spreads).view(-1, 1, 1), persistent=False)

    def weights_at(self, place: Path, part: str) -> dict[str, Tensor]:
        """The weights in a folder of diffusers."""
        return read_component(place / part, self.architecture, "network.")

    def compress(self, pixels: Tensor) -> Tensor:
        found = self.network.encode(pixels.to(self.network.dtype))
        codes = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        return (codes - self.shift) / self.spread * self.scale

    def expand(self, signal: Tensor) -> Tensor:
        codes = signal / self.scale * self.spread + self.shift
        return self.network.decode(codes.to(self.network.dtype)).sample
