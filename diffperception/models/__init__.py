"""Networks that know nothing of a task: backbones and the diffusion UNet."""

from diffperception.models.backbone import FPN, TimmBackbone, pad_images
from diffperception.models.unet import BlockInfo, UNet

__all__ = ["FPN", "BlockInfo", "TimmBackbone", "UNet", "pad_images"]
