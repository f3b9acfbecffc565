"""What tells the networks of diffusers apart: what they are told and how, and which blocks are worth reading."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffperception.doctor import require_installed
from diffperception.models import Condition

Config = Mapping[str, Any]  # of a network, as its config.json has it
FLAT_UNET = "diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet"
FLAT_CELLS = 4  # that its layers see at once
GUIDANCE = 3.5  # that Flux's distilled networks are told, its pipeline's default


class Family(ABC):
    """Networks that are called alike."""

    schedule: ClassVar[Mapping[str, Any]] = {}  # its path where no scheduler says one, as arguments of a DiffusionModel
    latent: bool = True  # whether it works in an autoencoder's space, whatever its channels
    square: bool = False  # whether its output, unlike its blocks, is right for squares alone

    @abstractmethod
    def run(self, network: nn.Module, x: Tensor, t: Tensor, told: Condition, pixels: int) -> Any:
        """The network's output for x (B, C, h, w), whose cells are so many pixels wide, and times (B,)."""

    @abstractmethod
    def blocks(self, network: nn.Module) -> list[str]:
        """Names of the modules that features are taken from by number."""

    def multiple(self, config: Config) -> int:
        """What h and w must be multiples of."""
        return int(config["patch_size"])

    def probed(self, config: Config) -> tuple[int, int]:
        """h and w of a small input, of which no module makes as many cells as there are probed words."""
        return 2 * self.multiple(config), 2 * self.multiple(config)

    def fold(self, x: Tensor) -> Tensor:
        """The samples that the network sees of x (B, C, h, w), in the order of B: x itself, or parts (B n, C, ...)."""
        return x

    def unfold(self, parts: Tensor, x: Tensor) -> Tensor:
        """Maps of the parts of x put together to (B, channels, h / stride, w / stride)."""
        return parts

    def largest(self, config: Config) -> int | None:
        """What h and w are at most."""
        return None

    def channels(self, config: Config) -> tuple[int, int]:
        """Of its input and its output."""
        return config["in_channels"], config.get("out_channels") or config["in_channels"]

    def word_width(self, config: Config) -> int | None:
        """D of the words (B, L, D) that it attends to, if any."""
        return None

    def vector_widths(self, config: Config) -> tuple[int, ...]:
        """What E of a vector (B, E) may be that it is told beside its time, such as that of a whole prompt."""
        return ()

    def labels(self, config: Config) -> tuple[int, bool]:
        """How many classes it has embeddings of, and whether there is one more, for none of them."""
        return 0, False

    def problem(self, config: Config) -> str:
        """Why such a network cannot be run here, if it cannot."""
        return ""


class UNetFamily(Family):
    """UNets: the middle block, and the layers of the blocks that go up, each with its attention and its upsampling."""

    def blocks(self, network: Any) -> list[str]:
        names = [] if network.mid_block is None else ["mid_block"]
        for i, block in enumerate(network.up_blocks):
            layers = "attentions" if getattr(block, "attentions", None) else "resnets"
            names += [f"up_blocks.{i}.{layers}.{j}" for j in range(len(block.resnets) - 1)]
            names.append(f"up_blocks.{i}")
        return names

    def multiple(self, config: Config) -> int:
        return 2 ** (len(config["block_out_channels"]) - 1)


class UnconditionalFamily(UNetFamily):
    """UNet2DModel: DDPM's UNet, with classes or without."""

    schedule: ClassVar = {"schedule": "linear"}
    latent = False

    def run(self, network: Any, x: Tensor, t: Tensor, told: Condition, pixels: int) -> Any:
        return network(x, t, class_labels=told.labels).sample

    def labels(self, config: Config) -> tuple[int, bool]:
        return config.get("num_class_embeds") or 0, False

    def problem(self, config: Config) -> str:
        if config.get("time_embedding_type") == "fourier":
            return "its times are noise levels of a path that we do not have (score SDE)"
        return "its classes are vectors" if config.get("class_embed_type") else ""


class WordsFamily(UNetFamily):
    """UNet2DConditionModel: Stable Diffusion and its descendants."""

    schedule: ClassVar = {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    latent = False

    def run(self, network: Any, x: Tensor, t: Tensor, told: Condition, pixels: int) -> Any:
        config = network.config
        more: dict[str, Any] = {}
        classes = told.labels
        if config.get("addition_embed_type") == "text_time":
            assert told.vector is not None
            ids = self._sizes(config, x, told.vector.shape[1], pixels)
            more["added_cond_kwargs"] = {"text_embeds": told.vector, "time_ids": ids}
        elif told.vector is not None:
            classes = told.vector
        return network(x, t, told.tokens, class_labels=classes, encoder_attention_mask=told.mask, **more).sample

    def _sizes(self, config: Config, x: Tensor, width: int, pixels: int) -> Tensor:
        """What SDXL is told of an image that is nowhere cut; its refiner (5 numbers) a good aesthetic score."""
        height, breadth = (side * pixels for side in x.shape[-2:])
        count = (config["projection_class_embeddings_input_dim"] - width) // config["addition_time_embed_dim"]
        ids = [height, breadth, 0, 0, *([6.0] if count == 5 else [height, breadth])]
        return torch.tensor([ids], dtype=x.dtype, device=x.device).expand(len(x), -1)

    def word_width(self, config: Config) -> int | None:
        width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
        return int(width if isinstance(width, int) else width[0])

    def vector_widths(self, config: Config) -> tuple[int, ...]:
        width = int(config.get("projection_class_embeddings_input_dim") or 0)
        if config.get("addition_embed_type") == "text_time":  # beside it SDXL is told six numbers, its refiner five
            return tuple(width - count * config["addition_time_embed_dim"] for count in (6, 5))
        return (width,) if config.get("class_embed_type") in ("projection", "simple_projection") else ()

    def labels(self, config: Config) -> tuple[int, bool]:
        return (config.get("num_class_embeds") or 0) if config.get("class_embed_type") is None else 0, False

    def problem(self, config: Config) -> str:
        if config.get("addition_embed_type") not in (None, "text", "text_time"):
            return f"it is told images beside words (addition_embed_type {config['addition_embed_type']})"
        if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
            return f"it is told images in place of words (encoder_hid_dim_type {config['encoder_hid_dim_type']})"
        if config.get("class_embed_type") not in (None, "projection", "simple_projection"):
            return f"its classes are told in a way that we do not know (class_embed_type {config['class_embed_type']})"
        return ""


class FlatFamily(WordsFamily):
    """Versatile Diffusion's UNetFlatConditionModel (arXiv 2211.08332): it sees columns of four cells, each alone."""

    def multiple(self, config: Config) -> int:
        return FLAT_CELLS

    def probed(self, config: Config) -> tuple[int, int]:
        return FLAT_CELLS, 1

    def fold(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, FLAT_CELLS)).permute(0, 2, 4, 1, 3).flatten(0, 2)[..., None]

    def unfold(self, parts: Tensor, x: Tensor) -> Tensor:
        columns = parts[..., 0].unflatten(0, (len(x), -1, x.shape[3]))  # (B, h / 4, w, C, 4)
        return columns.permute(0, 3, 1, 4, 2).flatten(2, 3)


class TransformerFamily(Family):
    """Transformers: all of their blocks."""

    def blocks(self, network: Any) -> list[str]:
        lists = ("transformer_blocks", "single_transformer_blocks")
        return [f"{name}.{i}" for name in lists for i in range(len(getattr(network, name, [])))]


class DiTFamily(TransformerFamily):
    """DiT (arXiv 2212.09748), which is told classes."""

    schedule: ClassVar = {"schedule": "linear"}
    square = True

    def run(self, network: Any, x: Tensor, t: Tensor, told: Condition, pixels: int) -> Any:
        return network(x, timestep=t, class_labels=told.labels).sample

    def labels(self, config: Config) -> tuple[int, bool]:
        return config["num_embeds_ada_norm"], True


class PixArtFamily(TransformerFamily):
    """PixArt-alpha (arXiv 2310.00426) and PixArt-sigma, which attend to words."""

    schedule: ClassVar = {"schedule": "linear"}

    def run(self, network: Any, x: Tensor, t: Tensor, told: Condition, pixels: int) -> Any:
        size = torch.tensor([x.shape[-2:]], dtype=x.dtype, device=x.device).expand(len(x), 2) * pixels
        more = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        known = more if network.use_additional_conditions else dict.fromkeys(more)
        return network(x, told.tokens, timestep=t, added_cond_kwargs=known, encoder_attention_mask=told.mask).sample

    def word_width(self, config: Config) -> int | None:
        return config.get("caption_channels") or config["cross_attention_dim"]


class StableDiffusion3Family(TransformerFamily):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

    schedule: ClassVar = {"schedule": "flow"}

    def run(self, network: Any, x: Tensor, t: Tensor, told: Condition, pixels: int) -> Any:
        return network(x, told.tokens, pooled_projections=told.vector, timestep=t).sample

    def largest(self, config: Config) -> int | None:
        return config["pos_embed_max_size"] * config["patch_size"]

    def word_width(self, config: Config) -> int | None:
        return config["joint_attention_dim"]

    def vector_widths(self, config: Config) -> tuple[int, ...]:
        return (config["pooled_projection_dim"],)


class FluxFamily(StableDiffusion3Family):
    """Flux, whose tokens are 2 x 2 cells, packed outside of the network."""

    def run(self, network: Any, x: Tensor, t: Tensor, told: Condition, pixels: int) -> Any:
        assert told.tokens is not None
        height, width = (side // 2 for side in x.shape[-2:])
        packed = nn.functional.pixel_unshuffle(x, 2).flatten(2).mT
        rows, columns = torch.meshgrid(*(torch.arange(n, device=x.device) for n in (height, width)), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(x.dtype)
        guidance = torch.full((len(x),), GUIDANCE, device=x.device) if network.config.guidance_embeds else None
        out = network(
            packed,
            encoder_hidden_states=told.tokens,
            pooled_projections=told.vector,
            timestep=t / 1000,
            img_ids=places,
            txt_ids=places.new_zeros(told.tokens.shape[1], 3),
            guidance=guidance,
        ).sample
        return nn.functional.pixel_shuffle(out.mT.unflatten(2, (height, width)), 2)

    def multiple(self, config: Config) -> int:
        return 2

    def largest(self, config: Config) -> int | None:
        return None

    def channels(self, config: Config) -> tuple[int, int]:
        inside, outside = super().channels(config)
        return inside // 4, outside // 4


FAMILIES: dict[str, Family] = {
    "UNet2DModel": UnconditionalFamily(),
    "UNet2DConditionModel": WordsFamily(),
    "UNetFlatConditionModel": FlatFamily(),
    "DiTTransformer2DModel": DiTFamily(),
    "PixArtTransformer2DModel": PixArtFamily(),
    "SD3Transformer2DModel": StableDiffusion3Family(),
    "FluxTransformer2DModel": FluxFamily(),
}
AUTOENCODERS = ("AutoencoderKL", "VQModel", "AutoencoderTiny")


def class_of(architecture: str) -> Any:
    """The class of diffusers of this name; ImportError if diffusers is absent, ValueError for one that we do not run.

    Names come from files: only networks that are known here are made, of json and safetensors.
    """
    require_installed("diffusers", "a network of diffusers", "pip install diffusers")
    if architecture not in (*FAMILIES, *AUTOENCODERS):
        raise ValueError(f"{architecture} is no network of diffusers that is run here: these are {', '.join(FAMILIES)}")
    home = FLAT_UNET if architecture == "UNetFlatConditionModel" else "diffusers"
    return getattr(importlib.import_module(home), architecture)
