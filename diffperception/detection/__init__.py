"""Detection: boxes from noise."""

from diffperception.detection.detector import Detector, DiffusionDet
from diffperception.detection.fcos import FCOS
from diffperception.detection.sampler import SamplerOptions, image_seed

__all__ = ["FCOS", "Detector", "DiffusionDet", "SamplerOptions", "image_seed"]
