"""Detection: boxes from noise, assembled from a backbone, a head, a criterion and a sampler."""

from diffperception.detection.criterion import Criterion, SetCriterion, Term
from diffperception.detection.detector import Detector, DiffusionDet
from diffperception.detection.fcos import FCOS
from diffperception.detection.heads.boxes import DynamicHead, Head, HeadOutput
from diffperception.detection.heads.dense import AuxiliaryHead, DenseHead
from diffperception.detection.heads.masks import DynamicMaskHead, MaskLoss
from diffperception.detection.matcher import SetWeights
from diffperception.detection.rcnn import FasterRCNN, MaskRCNN
from diffperception.detection.sampler import BoxSampler
