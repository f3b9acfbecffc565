"""The ADM UNet (Diffusion Models Beat GANs, arXiv 2105.05233): the generator whose activations perception reads."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception.models.condition import Condition
from diffperception.models.convert import adm
from diffperception.models.feature_info import FeatureInfo, strides_in_words
from diffperception.models.ops.normalization import group_norm
from diffperception.models.unet.blocks import NORM_GROUPS, Told, zeroed
from diffperception.models.unet.encoder import AttentionKind, Encoder, Layers, Resampling, require_positive


class UNet(Encoder):
    """Noisy images and times to a prediction, for any height and width that halve evenly between levels.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the prediction; as many by default, twice as many for a learned variance.
        channels: width that ``channel_mult`` multiplies.
        channel_mult: width of each level, in ``channels``; between levels height and width halve.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        attention: downsampling factors, 1, 2, 4, ..., whose blocks are followed by attention.
        num_heads: attention heads, the same at every width; if None, one for every ``num_head_channels``.
        num_head_channels: channels of a head where ``num_heads`` is None.
        dropout: fraction of activations dropped in residual blocks.
        scale_shift: time scales and shifts normalised activations (adaptive group norm); else it is added to them.
        resampling: down- and upsampling by residual blocks, by convolutions, or without weights.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        norm_groups: groups of channels that are normalised together; every level's width is a multiple.
        norm_eps: added to variances.
        frequency_shift: of the time's K sinusoids the k-th has the frequency 10000^(-k / (K - frequency_shift)).
        one_sided_padding: downsampling convolutions pad the right and the lower side alone, as in DDPM's own code.
        context: D, how wide the tokens of words are that attention reads; None for a network without words.
        attention_kind: how it reads them: their keys and values are added to those of the positions (GLIDE), or a
            transformer attends to them on their own (latent diffusion, Stable Diffusion), which says where a word is.

    Attributes:
        block_info: the decoder blocks, from the innermost as the reference's ``output_blocks``; strides are in cells of
            the input.
        embedding: E, channels of the time's embedding, to which a condition's vector is added.

    Raises:
        ValueError: if a number is not above 0, a width is not a multiple of norm_groups or of its heads, no level has
            a factor in ``attention``, or transformers are without ``context``.
    """

    kind = "UNet"

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention: Sequence[int] = (4, 8),
        num_heads: int | None = None,
        num_head_channels: int = 64,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resampling: Resampling = "block",
        checkpointing: bool = False,
        norm_groups: int = NORM_GROUPS,
        norm_eps: float = 1e-5,
        frequency_shift: int = 0,
        one_sided_padding: bool = False,
        context: int | None = None,
        attention_kind: AttentionKind = "added",
    ) -> None:
        sizes = (in_channels, channels, channel_mult, num_res_blocks)
        layers = Layers(
            *sizes,
            attention,
            num_heads,
            num_head_channels,
            dropout,
            scale_shift,
            resampling,
            norm_groups=norm_groups,
            norm_eps=norm_eps,
            frequency_shift=frequency_shift,
            one_sided_padding=one_sided_padding,
            context=context,
            attention_kind=attention_kind,
        )
        super().__init__(layers, checkpointing)
        require_positive({"out_channels": out_channels})
        self.context = context
        self.decoder, self.block_info = layers.decoder(self.skip_widths)
        self.out_channels = out_channels or in_channels
        self.out_norm = layers.norm(layers.widths[0])
        self.out_conv = zeroed(nn.Conv2d(layers.widths[0], self.out_channels, 3, padding=1))

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Tensor],
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        new_attention_order: bool = False,
    ) -> "UNet":
        """The UNet of a guided-diffusion or improved-diffusion checkpoint, with its weights.

        Args:
            state: the checkpoint's state dict; its tensors become the model's.
            num_heads, num_head_channels: attention heads at every width, or channels of a head (64 in ADM's models).
            new_attention_order: q, k, v come before heads in the qkv weights (``use_new_attention_order`` there).

        Raises:
            ValueError: if the checkpoint has labels (:meth:`DiffusionModel.from_reference` takes those), not one of
                ``num_heads`` and ``num_head_channels`` is given or it does not divide a width, or if weights are
                missing, left over or of another shape.
        """
        return adm.build(cls, adm.unet_arguments(state), state, num_heads, num_head_channels, new_attention_order)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The prediction (B, out_channels, H, W).

        ValueError for a size that does not halve evenly, another number of channels, or a condition in other slots.

        Args:
            x: (B, C, H, W) noisy images, -1..1.
            t: (B,) times, 0..1000, whole or not.
            condition: its vector (B, E) is added to the time's embedding; with :attr:`context` its tokens (B, L, D),
                all or those that its mask counts, are attended to; no other slot is read.
        """
        *_, h = self._decoder_outputs(x, t, condition)
        return self.out_conv(group_norm(self.out_norm, h, activate=True)).contiguous()

    def activations(
        self, x: Tensor, t: Tensor, blocks: Sequence[int | str], condition: Condition | None = None
    ) -> list[Tensor]:
        """What decoder blocks give, (B, channels, H / stride, W / stride) each; later ones are not computed.

        Args:
            x, t, condition: as for :meth:`forward`, as are the errors.
            blocks: indices or names among :attr:`block_info`, in the order wanted; ValueError for one that does not
                exist.
        """
        numbers = self._numbers(blocks)
        missing = [i for i in numbers if i not in range(len(self.block_info))]
        if missing or not blocks:
            raise ValueError(f"Name decoder blocks among 0 to {len(self.block_info) - 1}, not {missing or 'none'}.")
        outputs = islice(self._decoder_outputs(x, t, condition), max(numbers) + 1)
        wanted = {i: h for i, h in enumerate(outputs) if i in numbers}
        return [wanted[i] for i in numbers]

    def info_of(self, blocks: Sequence[int | str], condition: Condition | None = None) -> list[FeatureInfo]:
        """What :meth:`activations` gives of these blocks; ValueError for one that does not exist."""
        numbers = self._numbers(blocks)
        unknown = [number for number in numbers if number not in range(len(self.block_info))]
        if unknown or not blocks:
            choice = strides_in_words(self.block_info)
            raise ValueError(f"this UNet has no decoder blocks {unknown or list(blocks)}; it has {choice}")
        return [self.block_info[number] for number in numbers]

    def _numbers(self, blocks: Sequence[int | str]) -> list[Any]:
        """The indices of blocks, where they are named; names of none as they are."""
        names = [info.name for info in self.block_info]
        return [names.index(block) if block in names else block for block in blocks]

    def attention_blocks(self, blocks: Sequence[int | str]) -> list[str]:
        """ValueError: there are none, as there are in networks of diffusers that are told words."""
        raise ValueError("this UNet attends to no words: leave attention out")

    def unused(self, blocks: Sequence[int | str]) -> list[nn.Parameter]:
        """The parameters that :meth:`activations` of these blocks do not depend on."""
        later = [*self.decoder[max(self._numbers(blocks)) + 1 :], self.out_norm, self.out_conv]
        return [parameter for module in later for parameter in module.parameters()]

    def _decoder_outputs(self, x: Tensor, t: Tensor, condition: Condition | None) -> Iterator[Tensor]:
        told = self._told(self.embed(x, t), condition or Condition())
        *skips, h = self.encode(x, told)
        for stage in self.decoder:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), told)
            yield h

    def _told(self, emb: Tensor, condition: Condition) -> Told:
        """What the layers are told; ValueError for slots of a condition that they do not read, or lack."""
        if condition.labels is not None or condition.maps is not None:
            raise ValueError("This UNet is told a condition's vector and tokens: it has no layers for labels or maps.")
        tokens = condition.tokens
        if (None if tokens is None else tokens.shape[2]) != self.context:
            takes = "no tokens" if self.context is None else f"tokens {self.context} wide, as its context says"
            given = "none" if tokens is None else f"some {tokens.shape[2]} wide"
            raise ValueError(f"This UNet takes {takes}, and is told {given}.")
        emb = F.silu(emb if condition.vector is None else emb + condition.vector)
        return Told(emb, None if tokens is None else tokens.to(emb.dtype), condition.mask)
