"""The ADM UNet (Diffusion Models Beat GANs, arXiv 2105.05233): the generator whose activations perception reads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception import weights
from diffperception.models import adm
from diffperception.models.blocks import NORM_GROUPS, Stage, zeroed
from diffperception.models.encoder import Encoder, Layers, Resampling, level_widths, require_positive
from diffperception.models.normalization import group_norm


@dataclass(frozen=True)
class BlockInfo:
    """What a decoder block gives: its index, its channels, and how many input pixels wide one of its pixels is."""

    index: int
    channels: int
    stride: int


class UNet(Encoder):
    """Noisy images and times to a prediction, for any height and width that halve evenly between levels.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the prediction; those of the image if None, twice as many for a learned variance.
        channels: width that the multipliers multiply.
        multipliers: width of each level; between levels height and width halve.
        depth: residual blocks a level of the encoder; the decoder has one more.
        attention: downsampling factors, 1, 2, 4, ..., whose blocks are followed by attention.
        heads: attention heads, the same at every width; if None, one for every ``head_channels``.
        head_channels: channels of a head where ``heads`` is None.
        num_classes: number of labels, None for a model without. Count the absent label of classifier-free guidance
            as one more.
        dropout: share of activations dropped in residual blocks.
        scale_shift: time scales and shifts normalised activations (adaptive group norm); else it is added to them.
        resampling: down- and upsampling by residual blocks, by convolutions, or without weights.
        checkpointing: recompute activations in the backward pass instead of keeping them.

    Attributes:
        block_info: the decoder blocks there are, counted from the innermost as the reference's ``output_blocks``.

    Raises:
        ValueError: if a number is not above 0, a width is not a multiple of 32 or of its heads, or no level has a
            factor in ``attention``.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 128,
        multipliers: Sequence[float] = (1, 2, 2, 2),
        depth: int = 2,
        attention: Sequence[int] = (4, 8),
        heads: int | None = None,
        head_channels: int = 64,
        num_classes: int | None = None,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resampling: Resampling = "block",
        checkpointing: bool = False,
    ) -> None:
        layers = Layers(4 * channels, attention, heads, head_channels, dropout, scale_shift, resampling)
        widths = level_widths(channels, multipliers, attention)
        super().__init__(in_channels, channels, layers, widths, depth, checkpointing)
        self.arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": channels,
            "multipliers": list(multipliers),
            "depth": depth,
            "attention": list(attention),
            "heads": heads,
            "head_channels": head_channels,
            "num_classes": num_classes,
            "dropout": dropout,
            "scale_shift": scale_shift,
            "resampling": resampling,
            "checkpointing": checkpointing,
        }
        require_positive({"num_classes": num_classes, "out_channels": out_channels})
        self.num_classes = num_classes
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes, layers.embedding)
        self.decoder, self.block_info = _decoder(layers, list(self.skip_widths), widths, depth)
        self.out_channels = out_channels or in_channels
        self.out_norm = nn.GroupNorm(NORM_GROUPS, widths[0])
        self.out_conv = zeroed(nn.Conv2d(widths[0], self.out_channels, 3, padding=1))

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Tensor],
        heads: int | None = None,
        head_channels: int | None = None,
        new_attention_order: bool = False,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> "UNet":
        """The UNet of a guided-diffusion or improved-diffusion checkpoint, with its weights.

        The arguments are what shapes cannot tell; those of the reference are named ``num_heads``,
        ``num_head_channels`` and ``use_new_attention_order``. ADM's models have 64 channels a head.

        Args:
            state: the checkpoint's state dict; its tensors become the model's.
            heads: attention heads at every width.
            head_channels: channels of a head; this or ``heads``.
            new_attention_order: q, k, v come before heads in the qkv weights.
            dropout, checkpointing: as for :class:`UNet`.

        Raises:
            ValueError: if not one of ``heads`` and ``head_channels`` is given or it does not divide a width, or if
                weights are missing, left over or of another shape.
        """
        layout = adm.unet_arguments(state) | {"dropout": dropout, "checkpointing": checkpointing}
        return adm.build(cls, layout, state, heads, head_channels, new_attention_order)

    def save(self, path: str | Path) -> None:
        """Write weights and constructor arguments to one safetensors file."""
        weights.save_model(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "UNet":
        """Read what :meth:`save` wrote, or take the UNet of a generator's file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds another model, or none.
        """
        model = weights.load_model(path)
        model = getattr(model, "unet", model)
        if not isinstance(model, cls):
            raise ValueError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            x: (B, C, H, W) noisy images, -1..1.
            t: (B,) times, 0..1000, whole or not.
            labels: (B,) int64 classes, where the model has any.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: for a size that does not halve evenly, another number of channels, or labels that are missing
                or not wanted.
        """
        *_, h = self._decoder_outputs(x, t, labels)
        return self.out_conv(group_norm(self.out_norm, h, activate=True)).contiguous()

    def activations(self, x: Tensor, t: Tensor, blocks: Sequence[int], labels: Tensor | None = None) -> list[Tensor]:
        """What decoder blocks give; those after the last one named are not computed.

        Args:
            x, t, labels: as for :meth:`forward`.
            blocks: indices among :attr:`block_info`, which tells their channels and strides.

        Returns:
            A (B, channels, H / stride, W / stride) tensor for each, in the order named.

        Raises:
            ValueError: for a block that does not exist, and as :meth:`forward`.
        """
        missing = [i for i in blocks if i not in range(len(self.block_info))]
        if missing or not blocks:
            raise ValueError(f"Name decoder blocks among 0 to {len(self.block_info) - 1}, not {missing or 'none'}.")
        outputs = islice(self._decoder_outputs(x, t, labels), max(blocks) + 1)
        wanted = {i: h for i, h in enumerate(outputs) if i in blocks}
        return [wanted[i] for i in blocks]

    def _decoder_outputs(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Iterator[Tensor]:
        self._check_labels(labels)
        emb = self.embed(x, t)
        if self.label_emb is not None:
            emb = emb + self.label_emb(labels)
        emb = F.silu(emb)
        *skips, h = self.encode(x, emb)
        for stage in self.decoder:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), emb)
            yield h

    def _check_labels(self, labels: Tensor | None) -> None:
        if labels is not None and self.label_emb is None:
            raise ValueError("This UNet has no classes; leave the labels out, or build it with num_classes.")
        if labels is None and self.label_emb is not None:
            raise ValueError(f"This UNet has {self.num_classes} classes; give the labels of the images.")


def _decoder(layers: Layers, skips: list[int], widths: list[int], depth: int) -> tuple[nn.ModuleList, list[BlockInfo]]:
    """The decoder's stages and what they give."""
    width = widths[-1]
    stages, info = nn.ModuleList(), []
    for level, level_width in reversed(list(enumerate(widths))):
        for i in range(depth + 1):
            stage = layers.stage(width + skips.pop(), level_width, 2**level)
            width = level_width
            rises = level > 0 and i == depth
            info.append(BlockInfo(len(stages), width, 2 ** (level - rises)))
            stages.append(Stage([*stage, layers.up(width)] if rises else stage))
    return stages, info
