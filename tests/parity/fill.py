"""Deterministic weights by parameter name, so that two implementations can be given the same ones."""

import zlib

import numpy as np


def fill(name, shape):
    """Return a float32 array for parameter or buffer `name` of `shape`: the same on every machine."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    noise = rng.standard_normal(shape)
    if name.endswith("running_var"):
        return (1 + 0.1 * np.abs(noise)).astype(np.float32)
    if len(shape) > 1:
        fan_in = int(np.prod(shape[1:]))
        return (noise / np.sqrt(fan_in)).astype(np.float32)
    if name.endswith("weight"):
        return (1 + 0.1 * noise).astype(np.float32)
    return (0.1 * noise).astype(np.float32)
