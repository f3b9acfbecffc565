"""`diffperception extract`."""

from diffperception.segmentation import extract_features as command

__all__ = ["command"]
