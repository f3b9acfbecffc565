"""Networks that know nothing of a task: the base of all models, the UNet and its generator, backbones, their parts."""

from diffperception.models.backbones import (
    FPN,
    Backbone,
    TimmBackbone,
    UNetBackbone,
    build_backbone,
    build_pyramid,
    pad_images,
)
from diffperception.models.base import Model
from diffperception.models.condition import Condition
from diffperception.models.conditioners import ClassLabels, Conditioner
from diffperception.models.feature_info import FeatureInfo
from diffperception.models.generator import DiffusionModel
from diffperception.models.reader import ActivationReader
from diffperception.models.space import Pixels, Space
from diffperception.models.unet.noisy_classifier import NoisyClassifier
from diffperception.models.unet.unet import UNet
