"""Inside detectron2: our detectors as its models, its backbones under ours, our UNet under its detectors.

Importing it registers the meta-architecture `NoiseToBox` and the backbones `build_diffusion_unet_backbone` and
`build_diffusion_unet_fpn_backbone`; `add_config` adds their options. LazyConfig needs no registration.
"""

from diffperception.doctor import require_installed

require_installed(
    "detectron2",
    "diffperception.integrations.detectron2",
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'",
)

# ruff: noqa: E402 (what is absent is said in one sentence first)
from diffperception.integrations.detectron2.backbones import (
    Detectron2Backbone,
    DiffusionUNetBackbone,
    build_diffusion_unet_backbone,
    build_diffusion_unet_fpn_backbone,
)
from diffperception.integrations.detectron2.model import NoiseToBox
from diffperception.integrations.detectron2.options import add_config
from diffperception.integrations.detectron2.training import EmaHook, NoiseToBoxTrainer, build_optimizer, global_clip
