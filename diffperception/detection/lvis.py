"""LVIS's average precision on the lvis package: classes are judged only where their presence was looked at."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from diffperception.detection.evaluation import (
    CocoEvaluator,
    GroundTruth,
    Measurement,
    as_detections,
    mean_defined,
    precision_metrics,
)

FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}  # in under 10, under 100, and more training images


class LvisEvaluator(CocoEvaluator):
    """Collects predictions image by image and scores them as LVIS does (arXiv 1908.03195).

    An image's detections of a class count only if the class is known to be there or not to be there, and unmatched ones
    not where its objects were not all annotated. Beside COCO's metrics there are APr, APc and APf, of rare, common and
    frequent classes.

    Args:
        annotations: LVIS JSON file.
        max_dets: how many detections of all classes count in an image, the best scores first; by default LVIS's 300.
        image_ids: evaluate these images of the file only.

    Raises:
        FileNotFoundError, ValueError: the file is missing or is no LVIS annotation file, `max_dets` is below 1, or the
            lvis package is not installed.
    """

    default_max_dets = 300

    def __init__(
        self, annotations: str | Path, max_dets: int | None = None, image_ids: Iterable[int] | None = None
    ) -> None:
        self.lvis = import_lvis()
        super().__init__(annotations, max_dets, image_ids)
        _require_lvis_file(self.truth)

    def measure(self, rows: list[dict[str, Any]]) -> Measurement:
        """Metrics of rows of a COCO results file, by LVIS's rules."""
        results, truth = self.lvis.LVISResults, self.truth
        objects = _in_memory(self.lvis.LVIS, truth.content(truth.annotations))
        found = _in_memory(
            results, truth.content(as_detections(results.limit_dets_per_image(None, rows, self.max_dets)))
        )
        evaluation = self.lvis.LVISEval(objects, found, "bbox")
        with _numpy_of_2020():
            evaluation.evaluate()
            evaluation.accumulate()
        precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]  # (T, R, K, A) and (T, K, A)
        metrics = precision_metrics(precision)
        for name, classes in zip(FREQUENCIES, evaluation.freq_groups, strict=True):
            metrics[f"AP{name}"] = mean_defined(precision[:, :, classes, 0])
        metrics[f"AR{self.max_dets}"] = mean_defined(recall[..., 0])
        return Measurement(metrics, precision[..., 0], evaluation.ious)


def import_lvis() -> ModuleType:
    """The lvis package; ValueError where it cannot be imported."""
    try:
        import lvis
    except ImportError as error:
        raise ValueError(
            f"evaluation by LVIS's protocol needs the lvis package ({error}): pip install 'diffperception[lvis]'"
        ) from None
    logging.getLogger("lvis").setLevel(logging.ERROR)
    return lvis


def _require_lvis_file(truth: GroundTruth) -> None:
    lists = {"neg_category_ids", "not_exhaustive_category_ids"}
    has_lists = all(lists <= image.keys() for image in truth.images)
    if has_lists and all(category.get("frequency") in FREQUENCIES for category in truth.categories):
        return
    raise ValueError(
        f"{truth.name} is not an LVIS annotation file: its images must have {' and '.join(sorted(lists))}, its"
        f" categories a frequency ({', '.join(FREQUENCIES)}); evaluate other files with --protocol coco"
    )


def _in_memory(kind: type, content: dict[str, Any]) -> Any:
    """An LVIS or LVISResults of content that is no file; their constructors fail without detections, too."""
    made: Any = object.__new__(kind)
    made.logger = logging.getLogger("lvis")
    made.dataset = content
    made._create_index()
    return made


@contextmanager
def _numpy_of_2020() -> Iterator[None]:
    """The last release of lvis, 0.5.3, calls np.float, which numpy has not had since 1.24."""
    np.float = float  # type: ignore[attr-defined]  # noqa: NPY001
    try:
        yield
    finally:
        del np.float  # type: ignore[attr-defined]  # noqa: NPY001
