"""Label-efficient segmentation: pixel classifiers on the features of generators and other networks."""

from diffperception.segmentation.ensemble import PixelEnsemble, Segmentation, image_score
from diffperception.segmentation.evaluator import MeanIoU
from diffperception.segmentation.features import DiffusionFeatures, FeatureExtractor, RGBFeatures, TimmFeatures
from diffperception.segmentation.maps import FeatureMaps
from diffperception.segmentation.pixels import FitOptions
from diffperception.segmentation.probe import ProbeScore, probe_features
from diffperception.segmentation.segmenter import PixelSegmenter

__all__ = [
    "DiffusionFeatures",
    "FeatureExtractor",
    "FeatureMaps",
    "FitOptions",
    "MeanIoU",
    "PixelEnsemble",
    "PixelSegmenter",
    "ProbeScore",
    "RGBFeatures",
    "Segmentation",
    "TimmFeatures",
    "image_score",
    "probe_features",
]
