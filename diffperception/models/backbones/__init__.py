"""Backbones: timm models, a generator's network, and the pyramid on top."""

from diffperception.models.backbones.base import Backbone, pad_images
from diffperception.models.backbones.fpn import FPN, build_pyramid
from diffperception.models.backbones.reader import UNetBackbone
from diffperception.models.backbones.timm import TimmBackbone, build_backbone
