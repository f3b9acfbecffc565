"""Networks that know nothing of a task: the base of all models, the UNet and its generator, backbones, their parts."""

from diffperception.models.backbones.base import Backbone, any_size, pad_images
from diffperception.models.backbones.fpn import FPN, build_pyramid
from diffperception.models.backbones.reader import UNetBackbone
from diffperception.models.backbones.timm import TimmBackbone, build_backbone
from diffperception.models.base import Model
from diffperception.models.condition import Condition
from diffperception.models.conditioners import ClassLabels, Conditioner
from diffperception.models.feature_info import FeatureInfo
from diffperception.models.generator import DiffusionModel
from diffperception.models.reader import ActivationReader
from diffperception.models.space import Pixels, Space
from diffperception.models.text_conditioner import TextConditioner
from diffperception.models.unet.noisy_classifier import NoisyClassifier
from diffperception.models.unet.unet import UNet
