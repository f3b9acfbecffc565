"""Data sets, transforms and their checks."""

from diffperception.data.coco import CocoDetection

__all__ = ["CocoDetection"]
