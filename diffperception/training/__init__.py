"""Training: the only package that imports lightning, and not before something is trained."""

import importlib
from typing import Any

MODULES = {
    "train": "configured",
    "FitOptions": "recipes.segmentation",
    "fit_ensemble": "recipes.segmentation",
    "fit_segmenter": "recipes.segmentation",
    "BaselineOptions": "recipes.baseline",
    "compare_label_efficiency": "label_efficiency",
}


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(importlib.import_module(f"diffperception.training.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
