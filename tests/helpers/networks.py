"""Small networks whose output depends on everything in them: layers that begin at zero would hide what comes before."""

import torch
from torch import nn

from diffperception.models import DiffusionModel, TextConditioner, UNet

CLASSES = ["disc", "square"]


def tiny_unet(**changes: object) -> UNet:
    """A UNet of three levels: decoder blocks 0 to 5 of strides 4, 2, 2, 1, 1, 1."""
    torch.manual_seed(0)
    arguments = {
        "channels": 32,
        "channel_mult": (1, 1, 2),
        "num_res_blocks": 1,
        "attention": (4,),
        "num_head_channels": 16,
    }
    unet = UNet(**arguments | changes)  # type: ignore[arg-type]
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return unet.eval()


def two_level_unet(**changes: object) -> UNet:
    """A UNet of two levels, for images of even sides, with more noise in its weights."""
    unet = tiny_unet(**{"channel_mult": (1, 2), "attention": (2,), "num_head_channels": 32} | changes)
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return unet


def conditional_generator(null_class: bool = True) -> DiffusionModel:
    """Of images of 8 x 8 pixels of two classes."""
    return DiffusionModel(CLASSES, two_level_unet(), image_size=8, null_class=null_class)


def captioned_generator() -> DiffusionModel:
    """Of images of 8 x 8 pixels by the words of two captions."""
    texts = TextConditioner(width=12, num_heads=2)
    texts.prepare(["a red star", "a blue ring"])
    unet = two_level_unet(context=12, attention_kind="transformer")
    return DiffusionModel(None, unet, texts.eval(), image_size=8).eval()


def plain_classifier(channels: int, first: int, second: int, classes: int) -> nn.Sequential:
    """A member of an ensemble as the reference builds it."""
    return nn.Sequential(
        nn.Linear(channels, first),
        nn.ReLU(),
        nn.BatchNorm1d(first),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.BatchNorm1d(second),
        nn.Linear(second, classes),
    )
