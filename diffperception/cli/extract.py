"""`diffperception extract`."""

from diffperception.segmentation import extract_features

command = extract_features
