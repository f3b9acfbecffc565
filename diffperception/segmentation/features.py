"""Where pixels get their features from: a diffusion model, any timm model, or the colours themselves."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from diffperception.models import ActivationReader, DiffusionModel, FeatureInfo, Model, TimmBackbone, UNet
from diffperception.models.generator import load_generator
from diffperception.segmentation.maps import FeatureMaps, Windows, pad, padded_side

# Windows that are encoded at once: small ones keep no processor busy, large ones need no company and much memory.
CPU_WINDOWS, CPU_WINDOW_PIXELS = 8, 2**16
ACCELERATOR_WINDOW_PIXELS = 2**20


class FeatureExtractor(Model, ABC):
    """Images of any size to feature maps. Its weights are not trained.

    Args:
        info: the maps it gives.
        multiple: images are padded, with their last pixels, until their sides are multiples of this.
        window: larger images are cut into windows of this side, a multiple of ``multiple`` (else ValueError), which
            overlap by a quarter; None takes them whole.
    """

    def __init__(self, info: Sequence[FeatureInfo], multiple: int = 1, window: int | None = None) -> None:
        super().__init__()
        if window is not None and (window % multiple or window < 2 * multiple):
            raise ValueError(
                f"the window must be a multiple of {multiple} pixels, {2 * multiple} at least, not {window}"
            )
        self.info, self.multiple, self.window = list(info), multiple, window

    @property
    def channels(self) -> int:
        """D, the features a pixel has."""
        return sum(info.channels for info in self.info)

    @property
    def strides(self) -> list[int]:
        return [info.stride for info in self.info]

    @abstractmethod
    def encode(self, images: Tensor) -> list[Tensor]:
        """(B, 3, h, w) in 0..1, one window, sides multiples of :attr:`multiple` -> a (B, C, h / s, w / s) a map."""

    @torch.no_grad()
    def maps(self, image: Tensor) -> FeatureMaps:
        """The feature maps, float32, of an image (3, H, W), RGB, 0..1, of any size; ValueError for other shapes."""
        if image.dim() != 3 or len(image) != 3 or not image.numel():
            raise ValueError(f"an image must be of shape (3, height, width), not {tuple(image.shape)}")
        padded = pad(image.to(self.device, torch.float32), self.multiple)[0]
        height, width = padded.shape[1:]
        side = self.window or max(height, width)
        windows = Windows(height, width, side, overlap=side // 4 // self.multiple * self.multiple)
        cut = torch.stack([padded[:, rows, columns] for rows, columns in windows.places])  # all of one size
        pixels = cut[0, 0].numel()
        cpu, accelerator = min(CPU_WINDOW_PIXELS // pixels, CPU_WINDOWS), ACCELERATOR_WINDOW_PIXELS // pixels
        together = max(1, cpu if cut.device.type == "cpu" else accelerator)
        parts = (part for batch in cut.split(together) for part in zip(*self.encode(batch), strict=True))
        return FeatureMaps(windows.blend(parts, self.strides), self.strides, (image.shape[1], image.shape[2]))

    def portable(self) -> "FeatureExtractor":
        """What computes the same maps anywhere: itself, but for extractors that keep maps of certain images."""
        return self

    def map_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Cells, down and across, of each map of an image of any size."""
        height, width = (padded_side(side, self.multiple) for side in (height, width))
        return [(height // stride, width // stride) for stride in self.strides]


class DiffusionFeatures(FeatureExtractor):
    """What a diffusion model's network sees in an image noised to a few times (arXiv 2112.03126).

    The noise is kept among the weights. Maps come time by time, and for each in the order of the blocks.

    Args:
        generator: the model.safetensors file of a generator, which knows its schedule, or of a UNet alone, on the
            linear schedule of 1000 steps; a folder of diffusers; or such a model. It is put into evaluation mode and
            its weights are fixed.
        blocks: decoder blocks, indices among the generator's `block_info`; of a network of diffusers also names of
            modules, such as up_blocks.1.
        timesteps: times of the schedule.
        window: larger images are cut into windows of this side; null for what the generator was trained on.
        seed: seed of the noise.
        label: the class to tell a generator that has classes; null for none, if it has learned that.
        prompt: what to tell a network that attends to words: a .safetensors file with `prompt_embeds`, or a text, for
            which transformers must be installed; null for zeros.
        attention: further maps tell how much each place attends to each word of the prompt, a map per resolution.
        keep_weights: files of models on these features hold the generator's weights too, instead of naming where they
            lie; by default they hold those of our own files, and not those of diffusers' folders.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a folder of diffusers is named, which is not installed.
        ValueError: it holds another model, or a block, a time, the label or the prompt does not suit it.
    """

    def __init__(
        self,
        generator: DiffusionModel | UNet | str | Path,
        blocks: Sequence[int | str] = (5, 6, 7, 8, 12),
        timesteps: Sequence[float] = (50, 150, 250),
        window: int | None = None,
        seed: int = 0,
        label: int | None = None,
        prompt: str | Path | None = None,
        attention: bool = False,
        keep_weights: bool | None = None,
    ) -> None:
        model = load_generator(
            generator, prompt=prompt, keep_weights=keep_weights, named_blocks=any(isinstance(b, str) for b in blocks)
        )
        side = max(model.image_size) if window is None else window
        side = max(padded_side(side, model.stride), 2 * model.stride)
        reader = ActivationReader(model, blocks, timesteps, label, side, seed, attention)
        if attention and isinstance(generator, str | Path):
            told = model.condition(reader.said)
            if told is None or told.tokens is None or not told.tokens.any():
                raise ValueError("attention needs words, for zeros are all attended to alike: give a prompt")
        super().__init__(reader.info, reader.multiple, side if window is None else window)
        self.record(generator=model, window=self.window, prompt=None)
        self.reader = reader.eval().requires_grad_(False)

    @property
    def generator(self) -> DiffusionModel:
        return self.reader.generator

    def encode(self, images: Tensor) -> list[Tensor]:
        return [m.float() for m in self.reader(images)]

    def at_timestep(self, index: int) -> "DiffusionFeatures":
        """The same network and noise with a single one of the times."""
        features = DiffusionFeatures(**self.arguments | {"timesteps": [self.reader.timesteps[index]]})
        features.reader.noise = self.reader.noise
        return features


def untrained(features: DiffusionFeatures) -> DiffusionFeatures:
    """The same features of such a network with random weights."""
    torch.manual_seed(0)
    generator = features.generator
    network = type(generator.network)(**generator.network.arguments)
    model = DiffusionModel(**generator.arguments | {"network": network})
    return DiffusionFeatures(**features.arguments | {"generator": model}).to(features.device)


class TimmFeatures(FeatureExtractor):
    """The feature maps of any timm model that takes images of any size, normalised as those it was trained on.

    Args:
        name: timm model name.
        strides: strides of the maps to take; of several maps of a stride, as transformers have, the last is taken.
        pretrained: start from timm's weights (needs the network once).
        backbone_weights: a file with weights under timm's names (safetensors, .pth), instead of those from the network.
        window: larger images are cut into windows of this side; null takes images whole.

    Raises:
        FileNotFoundError: there is no such file of weights.
        ValueError: there is no such model, it has no map at one of the strides, or takes images of one size alone; or
            weights of the file do not fit it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        strides: Sequence[int] = (4, 8, 16, 32),
        pretrained: bool = False,
        window: int | None = None,
        backbone_weights: str | Path | None = None,
    ) -> None:
        backbone = (
            TimmBackbone(name, strides, pretrained, backbone_weights=backbone_weights).eval().requires_grad_(False)
        )
        try:
            backbone(torch.zeros(1, 3, 2 * max(strides), 3 * max(strides)))
        except (AssertionError, RuntimeError, ValueError) as error:  # timm's models refuse sizes in ways of their own
            raise ValueError(
                f"{name} does not take images of any size ({error}): choose a convolutional network, a ViT or a Swin"
            ) from None
        super().__init__(backbone.info, max(strides), window)
        self.record(pretrained=False, backbone_weights=None)  # loading brings its own weights
        self.backbone = backbone
        about = timm.get_pretrained_cfg(name)
        mean, std = (about.mean, about.std) if about else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def encode(self, images: Tensor) -> list[Tensor]:
        return self.backbone((images - self.mean) / self.std)


class RGBFeatures(FeatureExtractor):
    """The colours of a pixel, -1..1: what any other features should beat."""

    def __init__(self) -> None:
        super().__init__([FeatureInfo("RGB", 3, 1)])

    def encode(self, images: Tensor) -> list[Tensor]:
        return [2 * images - 1]
