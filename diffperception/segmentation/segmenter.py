"""Features and classifiers in one file: what is exported."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffperception.data.images import resize_short_side, to_float
from diffperception.data.masks import check_names
from diffperception.data.tiles import Tiling
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

    def segment(self, image: Tensor, probabilities: bool = False, tiling: Tiling | None = None) -> Segmentation:
        """What the members make of an image (3, H, W; RGB, 0..1 or uint8), at its size; see :class:`Segmentation`.

        Args:
            image: the image.
            probabilities: whether the classes' probabilities are wanted.
            tiling: an image that, at the short side, is larger than a tile is segmented window by window: in no more
                memory than one takes, but for the result, which is on the CPU. Each pixel is that of the window in
                whose middle it lies most.
        """
        resized = image
        if self.short_side is not None:
            resized = resize_short_side(to_float(image.to(self.features.device)), self.short_side)
        if tiling is None or len(tiling.windows(*resized.shape[-2:])) == 1:
            found = self._whole(resized, probabilities)
        else:
            found = self._in_windows(resized, probabilities, tiling)
        return found.resized(*image.shape[-2:])

    def _whole(self, image: Tensor, probabilities: bool) -> Segmentation:
        return self.classifier.segment(self.features.maps(to_float(image.to(self.features.device))), probabilities)

    def _in_windows(self, image: Tensor, probabilities: bool, tiling: Tiling) -> Segmentation:
        size = image.shape[-2:]
        labels, uncertainty = torch.empty(size, dtype=torch.int64), torch.empty(size)
        votes = torch.empty(len(self.classes), *size, dtype=torch.uint8)
        mean = torch.empty(len(self.classes), *size) if probabilities else None
        for window, share in zip(tiling.windows(*size), tiling.shares(*size), strict=True):
            found = self._whole(window.cut(image), probabilities)
            parts = [(labels, found.labels), (uncertainty, found.uncertainty), (votes, found.votes)]
            if mean is not None and found.probabilities is not None:
                parts.append((mean, found.probabilities))
            for whole, part in parts:
                share.cut(whole).copy_(share.within(window).cut(part))
        return Segmentation(labels, uncertainty, votes, mean)
