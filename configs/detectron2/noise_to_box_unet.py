"""Noise-to-box detection on the activations of a frozen generator.

Change: `classes`, the data sets in training.py, and the generator: `unet` is a file of diffperception (`convert`
makes one of foreign checkpoints), `blocks` are those of one per stride, `label` is the class that it is told, if it has
classes. These are of configs/generation/shapes.yaml.
"""

from detectron2.config import LazyCall as L

from diffperception.detection import DiffusionDet
from diffperception.integrations.detectron2 import NoiseToBox
from diffperception.models import UNetBackbone

from .training import dataloader, lr_multiplier, optimizer, train

model = L(NoiseToBox)(
    detector=L(DiffusionDet)(
        classes=["ellipse", "rectangle", "triangle", "star", "cross", "ring"],
        backbone=L(UNetBackbone)(
            unet="runs/shapes_ddpm/model.safetensors", blocks=[4, 2, 0], timestep=50, frozen=True, label=6
        ),
        strides=[2, 4, 8],
        min_size=800,  # as the mapper of tests resizes images: change both together
        max_size=1333,
    ),
    input_format="${dataloader.train.mapper.image_format}",
)
