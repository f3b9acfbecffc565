"""What networks see in an image, as backbones of mmsegmentation."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor

from diffperception.models import DiffusionModel, UNetBackbone, any_size
from diffperception.models.base import tensors_of, weights_digest
from diffperception.segmentation import DiffusionFeatures, FeatureExtractor, RGBFeatures, TimmFeatures

PIXELS = "pixels in -1..1, RGB: give data_preprocessor mean=[127.5] * 3, std=[127.5] * 3 and bgr_to_rgb=True"
LARGEST = 1.5  # of pixels; what an interpolation makes of them may be a little over 1
FROZEN = "frozen"  # the name in a checkpoint of what stands for the weights that it leaves out

for extractor in (DiffusionFeatures, TimmFeatures, RGBFeatures):
    MODELS.register_module(module=extractor)


def require_normalisation(preprocessor: Any) -> None:
    """ValueError for a preprocessor of mmseg that makes other pixels than -1..1; warns where it swaps no channels."""
    mean, std = (getattr(preprocessor, name, None) for name in ("mean", "std"))
    if mean is None or std is None:  # of another class, or normalising nothing, which the images' range will show
        return
    if not bool(((mean == 127.5) & (std == 127.5)).all()):
        raise ValueError(
            f"data_preprocessor has mean {mean.flatten().tolist()} and std {std.flatten().tolist()}, but this model"
            f" takes {PIXELS}"
        )
    if not -1 <= (fill := getattr(preprocessor, "pad_val", 0)) <= 1:
        raise ValueError(
            f"data_preprocessor has pad_val {fill}, which is filled in after the normalisation to -1..1: give pad_val=0"
        )
    blue = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)  # in BGR
    if preprocessor({"inputs": [blue]})["inputs"][0][0, 0, 0] > 0:  # it is red
        warnings.warn(
            "data_preprocessor swaps no channels, but this model takes RGB and LoadImageFromFile gives BGR: give"
            " bgr_to_rgb=True, unless your pipeline gives RGB",
            stacklevel=2,
        )


def require_signed(images: Tensor) -> None:
    """ValueError for images (B, 3, H, W) that were normalised otherwise than to -1..1, where their range shows it."""
    low, high = (float(extreme) for extreme in images.aminmax())
    if max(-low, high) > LARGEST:
        raise ValueError(f"the images reach from {low:.3g} to {high:.3g}, but this model takes {PIXELS}")


def _require_list(name: str, values: Any, example: str) -> None:
    if isinstance(values, str | int | float):
        raise ValueError(f"{name} is {values!r}, but must be a list, such as {example}")


@MODELS.register_module()
class FrozenBackbone(BaseModule):
    """The maps of a feature extractor, whose weights are not trained, for any decode head.

    Images that are larger than the extractor's window are read window by window. Maps come in the extractor's order.

    Args:
        features: the extractor, or its configuration, such as ``dict(type="TimmFeatures", name="resnet50")``.
        save_frozen: whether checkpoints hold its weights; else they hold a digest of them instead, and a model that is
            built with other weights refuses such a checkpoint.

    Raises:
        ValueError: the configuration is of something else.
    """

    def __init__(
        self,
        features: FeatureExtractor | Mapping[str, Any],
        save_frozen: bool = True,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        built = features if isinstance(features, FeatureExtractor) else MODELS.build(features)
        if not isinstance(built, FeatureExtractor):
            raise ValueError(
                f"features is a {type(built).__name__}, which is no feature extractor: DiffusionFeatures, TimmFeatures,"
                " RGBFeatures, or a subclass of FeatureExtractor"
            )
        self.features: FeatureExtractor = built.eval().requires_grad_(False)
        self.save_frozen = save_frozen
        if save_frozen:
            self.features.keep_weights()  # those of diffusers' folders, too
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_fill_in)

    @property
    def channels(self) -> list[int]:
        """Of each map: what heads call `in_channels`."""
        return [info.channels for info in self.features.info]

    @property
    def strides(self) -> list[int]:
        return self.features.strides

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """As every module's, but the extractor stays in evaluation mode."""
        super().train(mode)
        self.features.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W), RGB, -1..1 -> a (B, C, ceil(H / stride), ceil(W / stride)) a map; ValueError out of range."""
        require_signed(images)
        images = (images + 1) / 2
        side = self.features.window
        if side is None or max(images.shape[2:]) <= side:
            return tuple(any_size(self.features.encode, images, self.features.multiple, self.strides, "replicate"))
        maps = zip(*(self.features.maps(image).cropped().maps for image in images), strict=True)
        return tuple(torch.stack(rows) for rows in maps)


def _leave_out(module: FrozenBackbone, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put a digest of the frozen weights into a state dict in place of the weights."""
    if not module.save_frozen:
        for name in [name for name in state if name.startswith(f"{prefix}features.")]:
            del state[name]
        state[prefix + FROZEN] = _digest(module.features)


def _fill_in(module: FrozenBackbone, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Complete a state dict without frozen weights by the module's own; ValueError if it was made with others."""
    digest = state.pop(prefix + FROZEN, None)
    if digest is None:
        return
    if not torch.equal(digest.cpu(), _digest(module.features)):
        raise ValueError(
            "the checkpoint was trained on other frozen weights than those that its configuration names now, and does"
            " not hold them: name the file that it was trained with"
        )
    state |= {f"{prefix}features.{name}": value for name, value in tensors_of(module.features).items()}


def _digest(features: FeatureExtractor) -> Tensor:
    """Bytes (8,) that tell these weights from others."""
    return torch.tensor(list(bytes.fromhex(weights_digest(tensors_of(features)))), dtype=torch.uint8)


@MODELS.register_module()
class DiffusionBackbone(FrozenBackbone):
    """What a frozen diffusion model sees in an image, for any decode head (arXiv 2112.03126).

    Maps come time by time, and for each in the order of the blocks.

    Args:
        generator: the file of a generator or a UNet, a folder of diffusers, or such a model.
        blocks: indices among the generator's `block_info`; of a network of diffusers also names of modules.
        timesteps: times of its schedule.
        window: images that are larger are read in windows of this side; None for what the generator was trained on.
        label: the class to tell a generator with classes; None for nothing, if it has learned that.
        prompt, attention: what to tell a network that attends to words, and whether maps say how much each place
            attends to each word; see :class:`DiffusionFeatures`.
        seed: of the noise, which is the same for all images.
        save_frozen: as for :class:`FrozenBackbone`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a folder of diffusers is named, which is not installed.
        ValueError: it holds another model, or a block, a time, the label or the prompt does not suit it.
    """

    def __init__(
        self,
        generator: str | Path | DiffusionModel,
        blocks: Sequence[int | str],
        timesteps: Sequence[float] = (50,),
        window: int | None = None,
        label: int | None = None,
        prompt: str | Path | None = None,
        attention: bool = False,
        seed: int = 0,
        save_frozen: bool = True,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        _require_list("blocks", blocks, "[4, 2]")
        _require_list("timesteps", timesteps, "[50]")
        features = DiffusionFeatures(generator, blocks, timesteps, window, seed, label, prompt, attention)
        super().__init__(features, save_frozen, init_cfg)


@MODELS.register_module()
class DiffusionPyramid(BaseModule):
    """A diffusion UNet to be fine-tuned under a decode head: a normalised map per stride, finest first.

    What no map depends on is frozen, so that every trainable parameter has a gradient.

    Args:
        generator: as for :class:`DiffusionBackbone`, as are its label and prompt.
        blocks: one per stride, each stride twice the next.
        timestep: of its schedule: the noise level that images are brought to.

    Raises:
        FileNotFoundError, ImportError, ValueError: as for :class:`DiffusionBackbone`, or strides that are no pyramid's.
    """

    def __init__(
        self,
        generator: str | Path | DiffusionModel,
        blocks: Sequence[int | str],
        timestep: float = 50,
        label: int | None = None,
        prompt: str | Path | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        _require_list("blocks", blocks, "[4, 2]")
        self.body = UNetBackbone(generator, blocks, timestep, frozen=False, label=label, prompt=prompt)

    @property
    def channels(self) -> list[int]:
        """Of each map: what heads call `in_channels`."""
        return self.body.channels

    @property
    def strides(self) -> list[int]:
        return self.body.strides

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W), RGB, -1..1 -> a (B, C, ceil(H / stride), ceil(W / stride)) a map; ValueError out of range."""
        require_signed(images)
        return tuple(any_size(self.body, images, self.body.multiple, self.strides, "replicate"))
