"""LVIS's average precision on the lvis package: classes are judged only where their presence was looked at."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from diffperception.detection.evaluator import (
    CocoEvaluator,
    GroundTruth,
    Measurement,
    as_detections,
    best_overlap,
    mean_defined,
    precision_metrics,
)

FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}  # in under 10, under 100, and more training images
CLASSES_AT_A_TIME = 100  # the package keeps 0.6 KB for each image and class, objects or not


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
        counted = as_detections(results.limit_dets_per_image(None, rows, self.max_dets))
        objects = _in_memory(self.lvis.LVIS, truth.content(truth.annotations))
        found = _in_memory(results, truth.content(counted))
        parts = [
            self._measure_classes(objects, found, truth.category_ids[first : first + CLASSES_AT_A_TIME])
            for first in range(0, len(truth.category_ids), CLASSES_AT_A_TIME)
        ]
        precision = np.concatenate([part[0] for part in parts], axis=2)  # (T, R, K, A)
        recall = np.concatenate([part[1] for part in parts], axis=1)  # (T, K, A)
        metrics = precision_metrics(precision)
        frequency = {category["id"]: category["frequency"] for category in truth.categories}
        group = np.array([frequency[number] for number in truth.category_ids])
        metrics |= {f"AP{name}": mean_defined(precision[:, :, group == name, 0]) for name in FREQUENCIES}
        metrics[f"AR{self.max_dets}"] = mean_defined(recall[..., 0])
        return Measurement(metrics, precision[..., 0], max(part[2] for part in parts))

    def _measure_classes(
        self, objects: Any, found: Any, category_ids: list[int]
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Precision (T, R, k, A), recall (T, k, A) and the best IoU of some classes, which LVIS judges one by one."""
        evaluation = self.lvis.LVISEval(objects, found, "bbox")
        evaluation.params.cat_ids = category_ids
        with _numpy_of_2020():
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation.eval["precision"], evaluation.eval["recall"], best_overlap(evaluation.ious)


def import_lvis() -> ModuleType:
    """The lvis package; ValueError where it cannot be imported."""
    try:
        import lvis
    except ImportError as error:
        raise ValueError(
            f"evaluation by LVIS's protocol needs the lvis package ({error}): install this program with its extra,"
            " pip install -e '.[lvis]'"
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
