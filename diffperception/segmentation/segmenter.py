"""Features and classifiers in one file: what is exported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from diffperception import weights
from diffperception.segmentation.classifier import PixelEnsemble, Segmentation
from diffperception.segmentation.features import FeatureExtractor, build_extractor


class PixelSegmenter(nn.Module):
    """An extractor and the ensemble that was trained on its features; works alone once loaded.

    Args:
        features: the extractor; or its class name and its constructor's arguments, as a file tells them.
        classifier: the ensemble; or its constructor's arguments.
        classes: names of labels 0..K-1.
        short_side: images are resized to this short side, and what is found is brought back to theirs; null for not.

    Raises:
        ValueError: if the ensemble is for other features or another number of classes, or two have one name.
    """

    def __init__(
        self,
        features: FeatureExtractor | tuple[str, dict[str, Any]],
        classifier: PixelEnsemble | dict[str, Any],
        classes: Sequence[str],
        short_side: int | None = None,
    ) -> None:
        super().__init__()
        self.features = features if isinstance(features, FeatureExtractor) else build_extractor(*features)
        self.classifier = classifier if isinstance(classifier, PixelEnsemble) else PixelEnsemble(**classifier)
        self.classes = check_names(classes)
        self.short_side = short_side
        if self.classifier.channels != self.features.channels or self.classifier.num_classes != len(self.classes):
            raise ValueError(
                f"the classifier takes {self.classifier.channels} features and has {self.classifier.num_classes} "
                f"classes; the extractor gives {self.features.channels}, and {len(self.classes)} classes are named"
            )
        self.arguments = {
            "features": [type(self.features).__name__, self.features.arguments],
            "classifier": self.classifier.arguments,
            "classes": self.classes,
            "short_side": short_side,
        }

    def segment(self, image: Tensor, probabilities: bool = False) -> Segmentation:
        """What the members make of an image (3, H, W; RGB, 0..1), at its size; see :class:`Segmentation`."""
        resized = image if self.short_side is None else TF.resize(image, [self.short_side], antialias=True)
        found = self.classifier.segment(self.features.maps(resized), probabilities)
        return found.resized(*image.shape[-2:])

    def save(self, path: str | Path) -> None:
        """Write weights, the shared noise, constructor arguments and class names to one safetensors file."""
        weights.save_model(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "PixelSegmenter":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds another model, or none.
        """
        model = weights.load_model(path)
        if not isinstance(model, cls):
            raise ValueError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model


def check_names(classes: Sequence[str]) -> list[str]:
    """The names of classes; ValueError if two are alike, for scores are told by name."""
    doubled = [name for i, name in enumerate(classes) if name in classes[:i]]
    if doubled:
        raise ValueError(f"two classes are named {doubled[0]}: give every class a name of its own")
    return list(classes)
