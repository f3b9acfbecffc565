"""Generators of images: the model, drawing samples, and judging them."""

from diffperception.generation.sampling import SamplingOptions, sample
from diffperception.models import DiffusionModel
