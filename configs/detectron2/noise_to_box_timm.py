"""Noise-to-box detection on a timm model. Change: `classes`, `backbone`, and the data sets in training.py."""

from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog

from diffperception.detection import DiffusionDet
from diffperception.integrations.detectron2 import NoiseToBox

from .training import dataloader, lr_multiplier, optimizer, train

model = L(NoiseToBox)(
    detector=L(DiffusionDet)(
        classes=list(MetadataCatalog.get("coco_2017_train").thing_classes),
        backbone="resnet50.tv_in1k",
        pretrained=True,  # timm's weights, which needs the network once
        freeze_norm=True,  # leave it off, and take fpn_norm=True, to train from scratch
        strides=[4, 8, 16, 32],
        num_boxes=300,
        min_size=800,  # as the mapper of tests resizes images: change both together
        max_size=1333,
    ),
    input_format="${dataloader.train.mapper.image_format}",
)
