"""Networks that know nothing of a task: backbones, the diffusion UNet and the classifier that guides it."""

from diffperception.models.backbone import FPN, TimmBackbone, pad_images
from diffperception.models.classifier import NoisyClassifier
from diffperception.models.unet import BlockInfo, UNet

__all__ = ["FPN", "BlockInfo", "NoisyClassifier", "TimmBackbone", "UNet", "pad_images"]
