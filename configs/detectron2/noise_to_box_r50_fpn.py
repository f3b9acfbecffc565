"""Noise-to-box detection on detectron2's own ResNet-50 with FPN; no second pyramid is built on it.

Change: `classes`, and the data sets in training.py. Other backbones of detectron2 (ViTDet, Swin, MViT) go in place of
`backbone`, with the pixel mean, pixel std and input format of its weights; ViTDet is padded to its squares.
"""

from functools import partial

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog

from diffperception.detection import BoxSampler, DiffusionDet, DynamicHead
from diffperception.integrations.detectron2 import Detectron2Backbone, NoiseToBox

from .training import dataloader, lr_multiplier, optimizer, train

_rcnn = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model

model = L(NoiseToBox)(
    detector=L(DiffusionDet)(
        classes=list(MetadataCatalog.get("coco_2017_train").thing_classes),
        backbone=L(Detectron2Backbone)(
            backbone=_rcnn.backbone,
            pixel_mean=list(_rcnn.pixel_mean),
            pixel_std=list(_rcnn.pixel_std),
            input_format="BGR",  # of the weights
        ),
        strides=[4, 8, 16, 32],
        head=partial(DynamicHead, stages=6, width=256),
        sampler=L(BoxSampler)(steps=1),
        num_boxes=300,
        min_size=800,  # as the mapper of tests resizes images: change both together
        max_size=1333,
    ),
    input_format="${dataloader.train.mapper.image_format}",
)
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
