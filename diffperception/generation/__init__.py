"""Generators of images: the model, drawing samples, and judging them."""

from diffperception.generation.model import DiffusionModel
from diffperception.generation.sampling import SamplingOptions, sample

__all__ = ["DiffusionModel", "SamplingOptions", "sample"]
