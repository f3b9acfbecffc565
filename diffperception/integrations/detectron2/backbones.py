"""detectron2's backbones under our detectors, and a diffusion UNet under detectron2's."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2 import modeling
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor, nn

from diffperception.integrations.detectron2.options import add_config
from diffperception.models import Backbone, DiffusionModel, FeatureInfo, UNet, UNetBackbone, any_size

PIXEL_MEAN = (103.53, 116.28, 123.675)  # detectron2's defaults, of pixels 0..255 in the order BGR
PIXEL_STD = (1.0, 1.0, 1.0)


class Detectron2Backbone(Backbone):
    """A backbone of detectron2 under our detectors; images are padded as it wants them (to squares, for ViTDet).

    Where it is a pyramid of one width already, a head of that width needs no other FPN.

    Args:
        backbone: a backbone that is built; or the yacs options that describe one, `{"MODEL": ..., "INPUT": ...}`, which
            our model files can keep.
        features: names of its maps, finest first; by default all but those that a top block adds (p6).
        pixel_mean, pixel_std: what images are normalised with, of pixels 0..255 in the order of `input_format`.
        input_format: the order of the colours that its weights know, BGR or RGB.

    Raises:
        ValueError: there are no such maps, or their strides are no pyramid's; or another format than BGR and RGB.
    """

    def __init__(
        self,
        backbone: nn.Module | Mapping[str, Any],
        features: Sequence[str] | None = None,
        pixel_mean: Sequence[float] = PIXEL_MEAN,
        pixel_std: Sequence[float] = PIXEL_STD,
        input_format: str = "BGR",
    ):
        super().__init__()
        self.backbone = _built(backbone) if isinstance(backbone, Mapping) else backbone
        self.is_described = isinstance(backbone, Mapping)
        shapes = self.backbone.output_shape()  # type: ignore[operator]
        self.features = list(features) if features else _own_maps(self.backbone)
        unknown = [name for name in self.features if name not in shapes]
        if unknown:
            raise ValueError(f"the backbone has no maps {', '.join(unknown)}; it has {', '.join(shapes)}")
        self.info = [FeatureInfo(name, shapes[name].channels, int(shapes[name].stride)) for name in self.features]
        if self.strides != [self.strides[0] * 2**level for level in range(len(self.info))]:
            raise ValueError(
                f"the maps {', '.join(self.features)} have strides {self.strides}, but a pyramid needs one per stride,"
                " each twice the one before: name others in features"
            )
        self.is_pyramid = len(self.info) > 1 and len(set(self.channels)) == 1
        wanted = getattr(self.backbone, "padding_constraints", {})  # newer than release 0.6
        # The Swin there names a property that it has no number for: then there is none.
        divisors = (
            getattr(self.backbone, "size_divisibility", 0),
            wanted.get("size_divisibility", 0),
            self.strides[-1],
        )
        self.multiple = math.lcm(*(int(number) for number in divisors if number > 1))
        self.square = int(wanted.get("square_size", 0))
        self.is_bgr = is_bgr(input_format)
        self.mean, self.std = _rgb(pixel_mean, self.is_bgr), _rgb(pixel_std, self.is_bgr)

    @property
    def arguments(self) -> dict[str, Any]:  # type: ignore[override]
        if not self.is_described:
            raise ValueError(
                f"the {type(self.backbone).__name__} that detectron2 built cannot be described in our model file: keep"
                " detectron2's checkpoint, or have it built from yacs options (MODEL.BACKBONE), which a file can keep"
            )
        return self.__dict__["arguments"]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W), RGB, normalised -> one (B, channels[l], H / strides[l], W / strides[l]) per level."""
        multiple = self.multiple
        if self.square:
            side = max(self.square, *images.shape[-2:])
            multiple *= -(-side // multiple)
        return any_size(self._read, images.flip(1) if self.is_bgr else images, multiple, self.strides)

    def _read(self, images: Tensor) -> list[Tensor]:
        maps = self.backbone(images)
        return [maps[name] for name in self.features]


class DiffusionUNetBackbone(modeling.Backbone):
    """The activations of a diffusion UNet as a backbone of detectron2; its maps are s1, s2, ..., by their strides.

    Images of any size are padded as the UNet needs it, and brought to the generator's -1..1 whatever they were
    normalised with. A frozen UNet stays as it is, while the norms of its maps learn.

    Args:
        unet, blocks, timestep, frozen, label, prompt: as of a `UNetBackbone`.
        pixel_mean, pixel_std: what images were normalised with, of pixels 0..255 in the order of `input_format`.
        input_format: the order of their colours, BGR or RGB.

    Raises:
        FileNotFoundError, ImportError, ValueError: as a `UNetBackbone`; or another format.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        unet: str | Path | DiffusionModel | UNet,
        blocks: Sequence[int | str],
        timestep: float = 50,
        frozen: bool = True,
        label: int | None = None,
        prompt: str | Path | None = None,
        pixel_mean: Sequence[float] = (127.5, 127.5, 127.5),
        pixel_std: Sequence[float] = (127.5, 127.5, 127.5),
        input_format: str = "RGB",
    ):
        super().__init__()
        self.net = UNetBackbone(unet, blocks, timestep, frozen, label, prompt)
        names = [f"s{stride}" for stride in self.net.strides]
        self._out_features = names
        self._out_feature_channels = dict(zip(names, self.net.channels, strict=True))
        self._out_feature_strides = dict(zip(names, self.net.strides, strict=True))
        self.is_bgr = is_bgr(input_format)
        given = [_rgb(values, self.is_bgr) for values in (pixel_mean, pixel_std)]
        theirs_mean, theirs_std, mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (*given, self.net.mean, self.net.std)
        )
        self.register_buffer("scale", theirs_std / std, persistent=False)
        self.register_buffer("shift", (theirs_mean - mean) / std, persistent=False)

    @property
    def size_divisibility(self) -> int:
        return self.net.multiple

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W), normalised -> (B, channels, ceil(H / stride), ceil(W / stride)) by name."""
        images = (images.flip(1) if self.is_bgr else images) * self.scale + self.shift
        # detectron2's FPN asks for multiples of its own coarsest map, not of what is below it.
        maps = any_size(self.net, images, self.net.multiple, self.net.strides)
        return dict(zip(self._out_features, maps, strict=True))


@BACKBONE_REGISTRY.register()
def build_diffusion_unet_backbone(cfg: CfgNode, input_shape: Any) -> DiffusionUNetBackbone:
    """The UNet of MODEL.DIFFUSION_UNET; ValueError if that names no file."""
    options = cfg.MODEL.DIFFUSION_UNET
    if not options.FILE:
        raise ValueError("MODEL.DIFFUSION_UNET.FILE names no file: give that of a generator, or a folder of diffusers")
    timestep = {} if options.TIMESTEP is None else {"timestep": options.TIMESTEP}
    return DiffusionUNetBackbone(
        options.FILE,
        options.BLOCKS,
        frozen=options.FROZEN,
        label=options.LABEL,
        prompt=options.PROMPT,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        input_format=cfg.INPUT.FORMAT,
        **timestep,
    )


@BACKBONE_REGISTRY.register()
def build_diffusion_unet_fpn_backbone(cfg: CfgNode, input_shape: Any) -> FPN:
    """An FPN over the UNet: p0, p1, ... for strides 1, 2, ..., and a coarser level by pooling."""
    body, options = build_diffusion_unet_backbone(cfg, input_shape), cfg.MODEL.FPN
    pool = LastLevelMaxPool()
    pool.in_feature = f"p{int(math.log2(body.net.strides[-1]))}"
    return FPN(body, body._out_features, options.OUT_CHANNELS, options.NORM, pool, options.FUSE_TYPE)


def is_bgr(input_format: str) -> bool:
    if input_format not in ("BGR", "RGB"):
        raise ValueError(f"the input format is {input_format!r}, but our detectors see colours: give BGR or RGB")
    return input_format == "BGR"


def _rgb(values: Sequence[float], is_bgr: bool) -> tuple[float, float, float]:
    """Three numbers of pixels 0..255 as ours: of 0..1, in the order RGB."""
    if len(values) != 3:
        raise ValueError(f"pixel mean and std are of {len(values)} channels, but our detectors see three colours")
    first, second, third = (float(value) / 255 for value in (reversed(values) if is_bgr else values))
    return first, second, third


def _own_maps(backbone: nn.Module) -> list[str]:
    """Names of the maps of a backbone, finest first, without those that a top block adds to a pyramid."""
    shapes = backbone.output_shape()  # type: ignore[operator]
    names = sorted(shapes, key=lambda name: shapes[name].stride)
    return names[: len(names) - getattr(getattr(backbone, "top_block", None), "num_levels", 0)]


def _built(described: Mapping[str, Any]) -> nn.Module:
    """The backbone that yacs options describe."""
    cfg = get_cfg()
    add_config(cfg)
    cfg.set_new_allowed(True)  # options of other projects, whose builders read them
    cfg.merge_from_other_cfg(CfgNode({name: dict(part) for name, part in described.items()}))
    return modeling.build_backbone(cfg)
