"""Label-efficient segmentation: pixel classifiers on the features of generators and other networks."""

from diffperception.segmentation.classifier import PixelEnsemble, Segmentation, image_score
from diffperception.segmentation.evaluation import MeanIoU
from diffperception.segmentation.features import DiffusionFeatures, FeatureExtractor, RGBFeatures, TimmFeatures
from diffperception.segmentation.maps import FeatureMaps, MapInfo
from diffperception.segmentation.reference import load_reference_ensemble
from diffperception.segmentation.search import Probe, search
from diffperception.segmentation.segmenter import PixelSegmenter
from diffperception.segmentation.training import FitOptions

__all__ = [
    "DiffusionFeatures",
    "FeatureExtractor",
    "FeatureMaps",
    "FitOptions",
    "MapInfo",
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
