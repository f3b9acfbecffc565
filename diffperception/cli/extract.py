"""`diffperception extract`."""

from diffperception.segmentation import extract_features

extract = extract_features
