"""Networks whose features the scores of generated images compare: timm's, or the backbone of a detector of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from torch import Tensor
from torchvision.transforms import v2

from diffperception.models import TimmBackbone
from diffperception.models.base import Model

RANDOM = "random:"  # before the name of a timm model: untrained, its weights drawn with RANDOM_SEED
RANDOM_SEED = 0
BACKBONE_SIDE = 224


class FeatureNetwork(nn.Module):
    """A network that turns images into rows of features; ValueError if it cannot take images of that size.

    Args:
        body: normalised images (B, 3, H, W) -> features (B, D).
        size: H and W of its images.
        mean, std: of the channels, for the normalisation of pixels in 0..1.

    Attributes:
        transform: uint8 or 0..1 float image (3, H', W') of any size -> resized, normalised (3, H, W), for `forward`.
        channels: D.
    """

    def __init__(
        self,
        body: nn.Module,
        size: tuple[int, int],
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__()
        self.body = body
        self.size = size
        resize = v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True)  # what Clean-FID recommends
        self.transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), resize, v2.Normalize(mean, std)])
        self.eval()
        try:
            self.channels = self(torch.zeros(1, 3, *size)).shape[1]
        except (RuntimeError, AssertionError) as error:  # timm asserts the sizes of transformers
            sides = " x ".join(map(str, size))
            raise ValueError(f"the feature network cannot take images of {sides} pixels: {error}") from None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), as `transform` makes them -> (B, D)."""
        return self.body(images).flatten(1)


def feature_network(name: str, weights: Mapping[str, Tensor] | None = None, side: int | None = None) -> FeatureNetwork:
    """The feature network of that name, in evaluation mode on the CPU.

    None of timm's is the Inception of published FIDs (`pt_inception-2015-12-05`); `inception_v3.tf_in1k` is its nearest
    relative.

    Args:
        name: a timm model, whose pooled features are taken; or `random:` and a timm model, always of the same weights,
            which sees noise far better than blur (take a shallow one: without training the features of deep ones
            explode or vanish); or a detector's file, for the coarsest map of its backbone, averaged over space.
        weights: of the timm model, instead of those from the network, under timm's names.
        side: as `ScoringOptions.size`.

    Raises:
        ValueError: there is no such network; its weights cannot be fetched; or `weights` or `side` do not fit it.
    """
    if Path(name).suffix == ".safetensors":
        if weights is not None:
            raise ValueError(f"{name} has weights of its own: leave out the others, or name a timm model")
        return FeatureNetwork(BackboneFeatures(name), (side or BACKBONE_SIDE,) * 2)
    model = name.removeprefix(RANDOM)
    if not timm.is_model(model):
        raise ValueError(f"there is no feature network {name}: name a timm model, or a detector's .safetensors file")
    if model == name:
        body = _fetched(model) if weights is None else _with_weights(model, weights)
    elif weights is None:
        body = _random(model)
    else:
        raise ValueError(f"{name} has random weights: leave out the others, or name {model}")
    data = resolve_model_data_config(body)
    size = (side, side) if side else data["input_size"][1:]
    return FeatureNetwork(body, size, data["mean"], data["std"])


class BackboneFeatures(nn.Module):
    """The coarsest map of the timm backbone in a model file of ours, averaged over space; ValueError if it has none."""

    def __init__(self, path: str):
        super().__init__()
        model = Model.load(path)
        found = [module for module in model.modules() if isinstance(module, TimmBackbone)]
        if not found:
            kind = type(model).__name__
            raise ValueError(f"{path} holds a {kind}: features come from a detector with a timm backbone")
        self.backbone = found[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)[-1].mean((-2, -1))


def _fetched(model: str) -> nn.Module:
    try:
        return timm.create_model(model, pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as error:  # no network, or timm has no weights or no such variant of the model
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"the weights of {model} could not be fetched ({reason}): give a file with them (--weights), take a"
            f" detector of yours (--features model.safetensors), or untrained features (--features {RANDOM}resnet18)"
        ) from None


def _random(model: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        body: Any = timm.create_model(model, num_classes=0)
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts the last of a residual block at zero, which would be no block
    return body


def _with_weights(model: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model with these weights, those of a classifier left out; ValueError if any are missing or left over."""
    body: Any = timm.create_model(model, num_classes=0)
    classifier = body.pretrained_cfg.get("classifier") or ()
    heads = ("AuxLogits", *([classifier] if isinstance(classifier, str) else classifier))  # Inception's second is aux
    kept = {key: value for key, value in weights.items() if not key.startswith(tuple(f"{head}." for head in heads))}
    try:
        body.load_state_dict(kept)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:2])
        raise ValueError(f"these weights are not those of timm's {model}: {reason[:200]}") from None
    return body
