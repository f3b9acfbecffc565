"""Label-efficient segmentation: pixel classifiers on the features of generators and other networks."""

from diffperception.models.convert.ddpm_segmentation import load_reference_ensemble
from diffperception.segmentation.ensemble import PixelEnsemble, Segmentation, image_score
from diffperception.segmentation.evaluator import MeanIoU
from diffperception.segmentation.features import DiffusionFeatures, FeatureExtractor, RGBFeatures, TimmFeatures
from diffperception.segmentation.pixels import FitOptions
from diffperception.segmentation.probe import Probe, search
from diffperception.segmentation.segmenter import PixelSegmenter

__all__ = [
    "DiffusionFeatures",
    "FeatureExtractor",
    "FeatureMaps",
    "FitOptions",
    "MeanIoU",
    "PixelEnsemble",
    "PixelSegmenter",
    "Probe",
    "RGBFeatures",
    "Segmentation",
    "TimmFeatures",
    "image_score",
    "load_reference_ensemble",
    "search",
]
