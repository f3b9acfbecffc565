"""Features and classifiers in one file: what is exported."""

from collections.abc import Sequence

from torch import Tensor

from diffperception.data.images import resize_short_side
from diffperception.data.masks import check_names
from diffperception.models import Model
from diffperception.segmentation.ensemble import PixelEnsemble, Segmentation
from diffperception.segmentation.features import FeatureExtractor


class PixelSegmenter(Model):
    """An extractor and the ensemble that was trained on its features; works alone once loaded.

    Args:
        features: the extractor; of one that keeps maps of certain images, what computes them.
        classifier: the ensemble.
        classes: names of labels 0..K-1.
        short_side: images are resized to this short side, and what is found is brought back to theirs; null for not.

    Raises:
        ValueError: the ensemble is for other features or another number of classes, or two have one name.
    """

    kind = "segmenter"

    def __init__(
        self,
        features: FeatureExtractor,
        classifier: PixelEnsemble,
        classes: Sequence[str],
        short_side: int | None = None,
    ) -> None:
        super().__init__()
        self.features = features.portable()
        self.record(features=self.features)
        self.classifier, self.classes, self.short_side = classifier, check_names(classes), short_side
        if (classifier.channels, classifier.num_classes) != (features.channels, len(classes)):
            raise ValueError(
                f"the classifier takes {classifier.channels} features and has {classifier.num_classes} classes; the"
                f" extractor gives {features.channels}, and {len(classes)} classes are named"
            )

    def segment(self, image: Tensor, probabilities: bool = False) -> Segmentation:
        """What the members make of an image (3, H, W; RGB, 0..1), at its size; see :class:`Segmentation`."""
        resized = resize_short_side(image.to(self.features.device), self.short_side)
        found = self.classifier.segment(self.features.maps(resized), probabilities)
        return found.resized(*image.shape[-2:])
