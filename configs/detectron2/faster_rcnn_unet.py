"""detectron2's Faster R-CNN with FPN on the activations of a frozen generator, whose strides are not 4, 8, 16, 32.

Change: `num_classes`, the data sets in training.py, the generator (see noise_to_box_unet.py), with `_STRIDES` of its
blocks, finest first: all that depends on them follows.
"""

import math

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from diffperception.integrations.detectron2 import DiffusionUNetBackbone

from .training import dataloader, lr_multiplier, optimizer, train

_STRIDES = [2, 4, 8]
_LEVELS = [f"p{int(math.log2(stride))}" for stride in _STRIDES]  # as detectron2's FPN names its maps

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
del model.roi_heads.mask_in_features, model.roi_heads.mask_pooler, model.roi_heads.mask_head
model.roi_heads.num_classes = 6
model.input_format = "${dataloader.train.mapper.image_format}"

model.backbone.bottom_up = L(DiffusionUNetBackbone)(
    unet="runs/shapes_ddpm/model.safetensors",
    blocks=[4, 2, 0],
    timestep=50,
    frozen=True,
    label=6,
    # What images are normalised with does not matter: the backbone undoes it.
    pixel_mean="${model.pixel_mean}",
    pixel_std="${model.pixel_std}",
    input_format="${model.input_format}",
)
model.backbone.in_features = [f"s{stride}" for stride in _STRIDES]
model.backbone.top_block = None  # LastLevelMaxPool wants a map p5
model.proposal_generator.in_features = _LEVELS
model.proposal_generator.anchor_generator.strides = _STRIDES
model.proposal_generator.anchor_generator.sizes = [[8 * stride] for stride in _STRIDES]
model.roi_heads.box_in_features = _LEVELS
model.roi_heads.box_pooler.scales = [1 / stride for stride in _STRIDES]
