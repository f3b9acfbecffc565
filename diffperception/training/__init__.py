"""Training: the only package that imports lightning, and not before something is trained."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "train":  # which imports lightning
        from diffperception.training.configured import train

        return train
    raise AttributeError(f"module {__name__} has no attribute {name}")
