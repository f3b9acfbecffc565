"""Data sets, transforms, sampling and checks."""

from diffperception.data.batches import SeededSamples, StepBatchSampler, collate
from diffperception.data.coco import CocoDetection
from diffperception.data.shapes import ShapesSettings
from diffperception.data.shapes_dataset import write_shapes
from diffperception.data.transforms import TrainingTransforms
