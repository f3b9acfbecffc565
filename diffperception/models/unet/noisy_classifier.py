"""The classifier of noisy images that guides a diffusion model (Diffusion Models Beat GANs, arXiv 2105.05233)."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception.diffusion import ScheduleName, named_schedule
from diffperception.models.convert import adm
from diffperception.models.convert.checkpoints import class_names
from diffperception.models.ops.normalization import group_norm
from diffperception.models.unet.blocks import Told, zeroed
from diffperception.models.unet.encoder import Encoder, Layers, Resampling, both_sides

Pooling = Literal["attention", "adaptive"]


class NoisyClassifier(Encoder):
    """Noisy images and times to classes: the encoder half of the UNet, and a pooling head.

    Args:
        classes: names of the labels 0..K-1.
        schedule, num_timesteps, beta_start, beta_end, betas: the path its images are noised on, that of the diffusion
            model it is to guide.
        rescale_timesteps: it is told times of 0 to 1000 whatever their number is.
        image_size: height and width of the images, or one number for both; ValueError if they do not halve evenly
            between levels. Attention pooling takes this size alone.
        pool: one query of attention, made of the mean, over all positions of the last map; or the mean alone.
        in_channels, channels, channel_mult, num_res_blocks, attention, num_heads, num_head_channels, dropout,
            scale_shift, resampling, checkpointing: as for :class:`~diffperception.models.UNet`, as are the errors.
    """

    kind = "classifier"
    class_layers: ClassVar = {"pool.out": 0}

    def __init__(
        self,
        classes: Sequence[str],
        schedule: ScheduleName = "linear",
        num_timesteps: int = 1000,
        image_size: int | Sequence[int] = 64,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        num_res_blocks: int = 2,
        attention: Sequence[int] = (2, 4, 8),
        num_heads: int | None = None,
        num_head_channels: int = 64,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resampling: Resampling = "block",
        pool: Pooling = "attention",
        checkpointing: bool = False,
        rescale_timesteps: bool = False,
        beta_start: float | None = None,
        beta_end: float | None = None,
        betas: Sequence[float] | None = None,
    ) -> None:
        sizes = (in_channels, channels, channel_mult, num_res_blocks)
        layers = Layers(*sizes, attention, num_heads, num_head_channels, dropout, scale_shift, resampling)
        super().__init__(layers, checkpointing)
        self.image_size = both_sides(image_size)
        self.classes = list(classes)
        self.schedule = named_schedule(schedule, num_timesteps, rescale_timesteps, beta_start, beta_end, betas)
        self.check_size(*self.image_size)
        width = layers.widths[-1]
        self.out_norm = layers.norm(width)
        self.pool: nn.Module
        if pool == "attention":
            positions = math.prod(side // self.stride for side in self.image_size)
            self.pool = AttentionPool(positions, width, layers.heads_of(width), len(self.classes))
        else:
            self.pool = AveragePool(width, len(self.classes))

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Tensor],
        classes: Sequence[str] | None = None,
        schedule: ScheduleName = "linear",
        num_timesteps: int = 1000,
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        new_attention_order: bool = False,
        num_res_blocks: int | None = None,
        rescale_timesteps: bool | None = None,
    ) -> "NoisyClassifier":
        """The classifier of a guided-diffusion checkpoint, with its weights.

        Args:
            state, num_heads, num_head_channels, new_attention_order: as for :meth:`UNet.from_reference`, as are the
                errors; published classifiers have 64 channels per head too.
            classes: names of the classes; numbers by default.
            schedule, num_timesteps: of the path it was trained on, which a checkpoint does not tell.
            rescale_timesteps: whether it is told times of 0 to 1000 whatever their number is; false by default, as
                classifiers are trained.
            num_res_blocks: residual blocks per level; needed where the names fit several numbers.
        """
        layout, number = adm.classifier_arguments(state, num_res_blocks)
        names = class_names(classes, number)
        make = partial(cls, names, schedule, num_timesteps, rescale_timesteps=bool(rescale_timesteps))
        return adm.build(make, layout, state, num_heads, num_head_channels, new_attention_order)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noisy images (B, C, H, W), -1..1, and times (B,), 0..1000, whole or not -> (B, K) logits.

        ValueError for another number of channels or a size that the classifier does not take.
        """
        *_, h = self.encode(x, Told(F.silu(self.embed(x, t))))
        return self.pool(F.silu(group_norm(self.out_norm, h)))

    def _check_image(self, x: Tensor) -> None:
        super()._check_image(x)
        if isinstance(self.pool, AttentionPool) and x.shape[2:] != self.image_size:
            height, width = self.image_size
            raise ValueError(
                f"This NoisyClassifier pools by attention over images of {height} x {width} pixels, not {x.shape[2]} x "
                f"{x.shape[3]}: resize them, or train one with pool = adaptive, which takes any size."
            )

    def log_probability(self, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """What :func:`~diffperception.diffusion.classifier_guidance` needs: (x (B, C, H, W), t (B,)) -> (B,) log p.

        ``labels`` (B,) int64 are the classes wanted; times are those of :attr:`schedule`.
        """

        def log_probability(x: Tensor, t: Tensor) -> Tensor:
            logits = self(x, self.schedule.conditioning(t))
            return -F.cross_entropy(logits.to(x.dtype), labels.expand(len(x)), reduction="none")

        return log_probability


class AttentionPool(nn.Module):
    """Attention of the mean, as a query, to itself and all positions, height x width (as in CLIP, arXiv 2103.00020)."""

    def __init__(self, positions: int, channels: int, num_heads: int, out_channels: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positions = nn.Parameter(torch.randn(channels, 1 + positions) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        x = x.flatten(2)
        tokens = (torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positions).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q[:, :, :1], k, v).flatten(1))


class AveragePool(nn.Module):
    """The mean of all positions of a (B, C, H, W) map, and a linear layer that starts at zero, to (B, K)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.out = zeroed(nn.Linear(channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.mean((2, 3)))
