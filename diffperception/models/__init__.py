"""Networks that know nothing of a task: backbones and the diffusion UNet."""

from diffperception.models.backbone import FPN, TimmBackbone, pad_images

__all__ = ["FPN", "TimmBackbone", "pad_images"]
