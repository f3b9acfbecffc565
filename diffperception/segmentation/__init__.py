"""Label-efficient segmentation: pixel classifiers on the features of generators and other networks."""

from diffperception.segmentation.autolabel import autolabel
from diffperception.segmentation.ensemble import PixelEnsemble, Segmentation
from diffperception.segmentation.evaluator import MeanIoU
from diffperception.segmentation.feature_folder import ExtractedFeatures, extract_features
from diffperception.segmentation.features import DiffusionFeatures, FeatureExtractor, RGBFeatures, TimmFeatures
from diffperception.segmentation.inference import evaluate_segmenter, segment_folder
from diffperception.segmentation.maps import FeatureMaps
from diffperception.segmentation.probe import ProbeScore, probe_features
from diffperception.segmentation.segmenter import PixelSegmenter
