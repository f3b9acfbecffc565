"""Networks that know nothing of a task: backbones, the diffusion UNet and the classifier that guides it."""

from diffperception.models.backbone import FPN, Backbone, TimmBackbone, build_backbone, pad_images
from diffperception.models.classifier import NoisyClassifier
from diffperception.models.unet import BlockInfo, UNet
from diffperception.models.unet_backbone import UNetBackbone

__all__ = [
    "FPN",
    "Backbone",
    "BlockInfo",
    "NoisyClassifier",
    "TimmBackbone",
    "UNet",
    "UNetBackbone",
    "build_backbone",
    "pad_images",
]
