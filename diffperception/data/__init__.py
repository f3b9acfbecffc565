"""Data sets, transforms and their checks."""

from diffperception.data.coco import CocoDetection
from diffperception.data.shapes_dataset import ShapesSettings, write_shapes

__all__ = ["CocoDetection", "ShapesSettings", "write_shapes"]
