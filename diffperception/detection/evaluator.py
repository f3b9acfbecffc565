"""Average precision by the rules of COCO and LVIS, for any number of detections and predictions spread over processes.

Numbers are faster-coco-eval's, which agree with those of pycocotools and of the lvis package.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor

from diffperception.data.annotations import labels_of, read_coco
from diffperception.data.outlines import encode_masks, outline_of
from diffperception.devices import gather
from diffperception.table import format_table

Protocol = Literal["coco", "lvis"]
IouType = Literal["bbox", "segm"]
MAX_DETS: dict[Protocol, int] = {"coco": 100, "lvis": 300}  # of each class (COCO), of all (LVIS)
PREFIX: dict[IouType, str] = {"bbox": "", "segm": "mask_"}  # of the metrics' names
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}  # in under 10, under 100, and more training images
NEARLY_ZERO = 5e-4  # an AP that a table with three digits shows as 0
CLASSES_AT_A_TIME = 100  # the evaluation keeps something for each image and class, objects or not


def iou_types(masks: bool) -> tuple[IouType, ...]:
    """What is compared: boxes, and masks where there are some."""
    return ("bbox", "segm") if masks else ("bbox",)


@dataclass(frozen=True)
class CocoResult:
    """What an evaluation found.

    Attributes:
        metrics: AP, AP50, AP75, APs, APm, APl, AR1, AR10 and AR<max_dets>, each in 0..1, or nan where the file has no
            object to find (of that size); for LVIS APr, APc and APf too, but of the recalls the last alone. Those of
            masks are mask_AP, ...
        per_class: AP of each class, of boxes where they are scored; nan for a class without objects.
        objects: number of objects of each class, crowds not counted.
        detections: the predictions as rows of a COCO results file: image_id, category_id, bbox (xywh, pixels), score,
            and segmentation where masks are scored.
        notes: what was left out of the evaluation or is missing from it, one sentence each.
        explanation: why AP is 0 or undefined, in one sentence; None where there is nothing to explain.
    """

    metrics: dict[str, float]
    per_class: dict[str, float]
    objects: dict[str, int]
    detections: list[dict[str, Any]]
    notes: list[str]
    explanation: str | None

    def table(self) -> str:
        """The metrics, the AP of each class, and the notes, as lines of text."""
        summary = format_table([[_number(value) for value in self.metrics.values()]], list(self.metrics))
        rows = [(name, _number(ap), str(self.objects[name])) for name, ap in self.per_class.items()]
        remarks = [*self.notes, *([self.explanation] if self.explanation else [])]
        parts = [summary, format_table(rows, ["class", "AP", "objects"]), "\n".join(remarks)]
        return "\n\n".join(part for part in parts if part)


class CocoEvaluator:
    """Collects predictions image by image and scores them against a COCO annotation file.

    Every image of the file counts, whether it was predicted or not. Boxes without area are left out, in the file and
    among the predictions: nothing can overlap them, so they could only lower the best score that is possible.

    By LVIS's rules (arXiv 1908.03195) an image's detections of a class count only if the class is known to be there or
    not to be there, and unmatched ones not where its objects were not all annotated.

    Args:
        annotations: COCO JSON file, or LVIS's, with the ground truth.
        iou_types: what is compared: `bbox`, `segm` or both.
        max_dets: how many detections count per image, the best scores first: of each class, by default 100 (COCO), or
            of all classes, by default 300 (LVIS).
        image_ids: evaluate these images of the file only.
        protocol: coco, or lvis for annotation files of LVIS.

    Raises:
        FileNotFoundError, ValueError: the file is missing or is not what the protocol needs, masks are asked for and it
            has none, or `max_dets` is below 1.
    """

    def __init__(
        self,
        annotations: str | Path,
        iou_types: Sequence[IouType] = ("bbox",),
        max_dets: int | None = None,
        image_ids: Iterable[int] | None = None,
        protocol: Protocol = "coco",
    ) -> None:
        self.iou_types = tuple(iou_types)
        self.protocol: Protocol = protocol
        self.max_dets = MAX_DETS[protocol] if max_dets is None else max_dets
        if self.max_dets < 1:
            raise ValueError(f"max_dets is {max_dets}: at least 1 detection per image must count")
        self.truth = GroundTruth(annotations, image_ids, with_masks="segm" in self.iou_types)
        self.classes, self.category_ids = self.truth.classes, self.truth.category_ids  # of the labels 0..K-1
        if protocol == "lvis":
            _require_lvis_file(self.truth)
        self.reset()

    def reset(self) -> None:
        """Forget the predictions; the annotations stay."""
        self._predictions: dict[int, dict[str, Any]] = {}

    def update(self, image_ids: Sequence[int], predictions: Sequence[dict[str, Tensor]]) -> None:
        """Take the predictions of some images; an image that was taken before is ignored.

        Args:
            image_ids: ids in the annotation file.
            predictions: for each image `boxes` (n, 4) xyxy in pixels of the original image, `scores` (n,) and `labels`
                (n,) in 0..K-1; where masks are scored, `masks` (n, H, W) of the original image too, bool or 0..1.
        """
        for image_id, prediction in zip(image_ids, predictions, strict=True):
            kept: dict[str, Any] = {key: prediction[key].detach().cpu() for key in ("boxes", "scores", "labels")}
            if "segm" in self.iou_types:
                kept["masks"] = encode_masks(prediction["masks"])
            self._predictions.setdefault(int(image_id), kept)

    def gather(self) -> None:
        """Give every process the predictions of all, each image once; does nothing in a single process."""
        # Lower ranks win, so that every process keeps the same copy of an image that a sampler has handed out twice.
        parts = gather([self._predictions])
        self._predictions = {image_id: kept for part in reversed(parts) for image_id, kept in part.items()}

    def compute(self) -> CocoResult:
        """Score the predictions taken so far. The order in which they came does not matter."""
        ids = sorted(self._predictions)
        result = self._score(_stack(ids, [self._predictions[i] for i in ids]), ids)
        absent = len(self.truth.image_ids - self._predictions.keys())
        if absent:
            total = len(self.truth.image_ids)
            result.notes.append(f"{absent} of {total} images were not predicted: their objects count as missed.")
        return result

    def score_results(self, results: str | Path) -> CocoResult:
        """Score a COCO results file: a JSON list of rows with image_id, category_id, bbox (xywh in pixels) and score.

        Where masks are scored, rows must have a segmentation too, as run lengths.

        Raises:
            FileNotFoundError, ValueError: the file is missing or is not what it should be.
        """
        rows = _read_results(Path(results), with_masks="segm" in self.iou_types)
        detections = _from_rows(rows, self.category_ids)
        return self._score(detections, np.unique(detections.image_ids).tolist())

    def _score(self, detections: "_Detections", seen: Sequence[int]) -> CocoResult:
        usable = _usable(self.truth, detections)
        rows = _rows(detections.where(usable), self.category_ids)
        measured = [self._measure(rows, iou_type) for iou_type in self.iou_types]
        _, precision, overlap = measured[0]
        found = mean_defined(precision) >= NEARLY_ZERO
        return CocoResult(
            metrics={name: value for metrics, _, _ in measured for name, value in metrics.items()},
            per_class={name: mean_defined(precision[:, :, k]) for k, name in enumerate(self.classes)},
            objects=self.truth.objects,
            detections=rows,
            notes=_notes(self.truth, usable),
            explanation=None if found else _explain(self.truth, detections, seen, overlap),
        )

    def _measure(self, rows: list[dict[str, Any]], iou_type: IouType) -> tuple[dict[str, float], np.ndarray, float]:
        """What the protocol measures of boxes, or of masks, of rows of a COCO results file.

        Returns: metrics; precision (T, R, K) at T thresholds of IoU and R of recall, -1 where a class has no object;
        and the best IoU of a prediction with an object of its class.
        """
        limits = sorted({1, 10, self.max_dets})
        if self.protocol == "lvis":
            rows, limits = self.truth.judged(best_of_each_image(rows, self.max_dets)), [self.max_dets]
        chunks = range(0, len(self.category_ids), CLASSES_AT_A_TIME)
        parts = [self._run(rows, iou_type, limits, self.category_ids[k : k + CLASSES_AT_A_TIME]) for k in chunks]
        # (T, R, K, A, M) and (T, K, A, M) for A ranges of area and M limits
        precision = np.concatenate([part.eval["precision"] for part in parts], axis=2)
        recall = np.concatenate([part.eval["recall"] for part in parts], axis=1)
        best = precision[..., limits.index(self.max_dets)]
        cuts = {"AP": best[..., 0], "AP50": best[0, ..., 0], "AP75": best[5, ..., 0]}
        cuts |= {name: best[..., area] for area, name in enumerate(("APs", "APm", "APl"), 1)}
        if self.protocol == "lvis":
            cuts |= {f"AP{name}": best[:, :, self.truth.group == name, 0] for name in FREQUENCIES}
        cuts |= {f"AR{limit}": recall[:, :, 0, m] for m, limit in enumerate(limits)}
        ious = (iou.max() for part in parts for iou in part.ious.values() if np.size(iou))
        metrics = {PREFIX[iou_type] + name: mean_defined(values) for name, values in cuts.items()}
        return metrics, best[..., 0], float(max(ious, default=0.0))

    def _run(self, rows: list[dict[str, Any]], iou_type: IouType, limits: list[int], ids: list[int]) -> COCOeval_faster:
        """The evaluation of some classes."""
        chosen, file = set(ids), {"images": self.truth.images, "categories": self.truth.categories}
        objects = [o for o in self.truth.annotations if o["category_id"] in chosen]
        found = [
            row | {"id": number, "area": _area(row, iou_type), "iscrowd": 0}
            for number, row in enumerate(rows, 1)  # the evaluation takes a match with id 0 for no match
            if row["category_id"] in chosen
        ]
        sides = (COCO(file | {"annotations": annotations}) for annotations in (objects, found))
        evaluation = COCOeval_faster(*sides, iou_type, lvis_style=self.protocol == "lvis")
        evaluation.params.maxDets = limits
        evaluation.params.catIds = ids
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation


def best_of_each_image(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most so many rows of an image, those with the best scores."""
    ordered = sorted(rows, key=lambda row: (row["image_id"], -row["score"]))
    images = itertools.groupby(ordered, key=lambda row: row["image_id"])
    return [row for _, of_image in images for row in itertools.islice(of_image, limit)]


def mean_defined(values: np.ndarray) -> float:
    """Mean over what is not -1; nan where all is. Rounded: COCOeval divides by tp + fp + 2e-16, so gives 1 - 2e-16."""
    defined = values[values > -1]
    return round(float(defined.mean()), 12) if defined.size else nan


def results_rows(
    image_ids: Sequence[int], predictions: Sequence[dict[str, Tensor]], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Predictions as rows of a COCO results file; label k has the category id `category_ids[k]`."""
    encoded = [p | {"masks": encode_masks(p["masks"])} if "masks" in p else p for p in predictions]
    return _rows(_stack(image_ids, encoded), category_ids)


class _Detections(NamedTuple):
    image_ids: np.ndarray  # (n,)
    labels: np.ndarray  # (n,)
    boxes: np.ndarray  # (n, 4) xyxy
    scores: np.ndarray  # (n,)
    masks: np.ndarray  # (n,) run lengths, None where only boxes count

    def where(self, mask: np.ndarray) -> "_Detections":
        return _Detections._make(column[mask] for column in self)


class GroundTruth:
    """What an annotation file has in the chosen images: `annotations` with an area, of which `count` are to find.

    Attributes:
        group: (K,) LVIS's frequency of each class, r, c or f; None in other files.
    """

    def __init__(self, path: str | Path, image_ids: Iterable[int] | None, with_masks: bool = False) -> None:
        content = read_coco(path, outlines=with_masks)
        self.name = Path(path).name
        self.categories = content["categories"]
        self.category_ids, self.classes = labels_of(self.categories)
        known = {image["id"]: image for image in content["images"]}
        self.image_ids = set(known) if image_ids is None else known.keys() & set(image_ids)
        self.images = [known[i] for i in self.image_ids]
        found = [a for a in content["annotations"] if a["image_id"] in self.image_ids]
        with_area = [a for a in found if len(a.get("bbox") or []) == 4 and all(side > 0 for side in a["bbox"][2:])]
        if with_masks:
            with_area = [a | {"segmentation": outline_of(a, self.name)} for a in with_area]
        self.annotations = [
            {"area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0} | a | {"id": i} for i, a in enumerate(with_area, 1)
        ]
        ordered = sorted(self.categories, key=lambda category: category["id"])
        self.group = np.array([category.get("frequency") for category in ordered])
        self.without_area = len(found) - len(self.annotations)
        counts = Counter(o["category_id"] for o in self.annotations if not o["iscrowd"])
        self.objects = {name: counts[c] for c, name in zip(self.category_ids, self.classes, strict=True)}
        self.count = sum(self.objects.values())
        self.extent = max((sum(o["bbox"][i::2]) for o in self.annotations for i in (0, 1)), default=0.0)

    def judged(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of a class that LVIS knows to be in their image or not to be there."""
        known = {(o["image_id"], o["category_id"]) for o in self.annotations}
        known |= {(image["id"], category) for image in self.images for category in image["neg_category_ids"]}
        return [row for row in rows if (row["image_id"], row["category_id"]) in known]


def _area(row: dict[str, Any], iou_type: IouType) -> float:
    return float(coco_mask.area(row["segmentation"])) if iou_type == "segm" else row["bbox"][2] * row["bbox"][3]


def _stack(ids: Sequence[int], predictions: Sequence[dict[str, Any]]) -> _Detections:
    def column(key: str, empty: Tensor) -> np.ndarray:
        return torch.cat([empty, *(p[key].cpu() for p in predictions)]).numpy()

    return _Detections(
        image_ids=np.repeat(np.array(ids, dtype=np.int64), [len(p["scores"]) for p in predictions]),
        labels=column("labels", torch.zeros(0, dtype=torch.int64)),
        boxes=column("boxes", torch.zeros(0, 4, dtype=torch.float64)),
        scores=column("scores", torch.zeros(0, dtype=torch.float64)),
        masks=np.fromiter((m for p in predictions for m in p.get("masks", [None] * len(p["scores"]))), object),
    )


def _read_results(path: Path, with_masks: bool) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no results file {path}")
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file ({error}): was it cut short?") from None
    keys = {"image_id", "category_id", "bbox", "score", *(["segmentation"] if with_masks else [])}
    if isinstance(rows, list) and all(
        isinstance(row, dict) and keys <= row.keys() and len(row["bbox"]) == 4 for row in rows
    ):
        return rows
    raise ValueError(f"{path} is not a COCO results file: it must be a list of rows with {', '.join(sorted(keys))}")


def _from_rows(rows: list[dict[str, Any]], category_ids: Sequence[int]) -> _Detections:
    label = {category_id: k for k, category_id in enumerate(category_ids)}
    xywh = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
    return _Detections(
        image_ids=np.array([row["image_id"] for row in rows], dtype=np.int64),
        labels=np.array([label.get(row["category_id"], -1) for row in rows], dtype=np.int64),
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        scores=np.array([row["score"] for row in rows], dtype=np.float64),
        masks=np.fromiter((row.get("segmentation") for row in rows), object),
    )


def _sizes(boxes: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # infinite boxes are left out, not warned about
        return boxes[:, 2:] - boxes[:, :2]


def _usable(truth: GroundTruth, detections: _Detections) -> np.ndarray:
    known = np.isin(detections.image_ids, list(truth.image_ids))
    labelled = (detections.labels >= 0) & (detections.labels < len(truth.classes))
    finite = np.isfinite(detections.boxes).all(axis=1) & np.isfinite(detections.scores)
    return known & labelled & finite & (_sizes(detections.boxes) > 0).all(axis=1)


def _rows(detections: _Detections, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    boxes = detections.boxes.astype(np.float64)
    xywh = np.concatenate([boxes[:, :2], _sizes(boxes)], axis=1).round(4)  # float32 carries no more, and JSON is short
    ids = np.array(category_ids, dtype=np.int64)[detections.labels].tolist()
    columns = (detections.image_ids.tolist(), ids, xywh.tolist(), detections.scores.tolist())
    names = ("image_id", "category_id", "bbox", "score")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    masked = zip(rows, detections.masks, strict=True)
    return [row if mask is None else row | {"segmentation": mask} for row, mask in masked]


def _require_lvis_file(truth: GroundTruth) -> None:
    lists = {"neg_category_ids", "not_exhaustive_category_ids"}
    has_lists = all(lists <= image.keys() for image in truth.images)
    if has_lists and all(group in FREQUENCIES for group in truth.group):
        return
    raise ValueError(
        f"{truth.name} is not an LVIS annotation file: its images must have {' and '.join(sorted(lists))}, its"
        f" categories a frequency ({', '.join(FREQUENCIES)}); evaluate other files with --protocol coco"
    )


def _number(value: float) -> str:
    return "-" if isnan(value) else f"{value:.3f}"


def _notes(truth: GroundTruth, usable: np.ndarray) -> list[str]:
    notes = []
    if truth.without_area:
        notes.append(f"{truth.without_area} objects of {truth.name} have no area and are left out.")
    if not usable.all():
        left_out = np.count_nonzero(~usable)
        notes.append(
            f"{left_out} of {usable.size} predicted boxes are left out: "
            "their image or class is unknown, or they are not finite or have no area."
        )
    return notes


def _explain(truth: GroundTruth, detections: _Detections, seen: Sequence[int], overlap: float) -> str:
    """The first reason for an AP of 0 that the data show."""
    boxes, labels, classes = detections.boxes, detections.labels, len(truth.classes)
    if not truth.count:
        return f"AP is undefined: {truth.name} has no object to find in the {len(truth.image_ids)} images evaluated."
    if not seen:
        return "AP is 0 because no image was predicted."
    if truth.image_ids.isdisjoint(seen):
        example = f"{min(seen)} is predicted, {min(truth.image_ids)} is in the file"
        return f"AP is 0 because none of the predicted image ids is in {truth.name} ({example})."
    if not len(boxes):
        return f"AP is 0 because no box was predicted in any of the {len(seen)} images."
    if not np.isfinite(boxes).all():
        return "AP is 0 and predicted boxes are not finite: the model has diverged."
    if ((labels < 0) | (labels >= classes)).any():
        return (
            f"AP is 0 and predicted classes are not those of {truth.name}: "
            f"labels count its {classes} categories, in the order of their ids, from 0 to {classes - 1}."
        )
    if np.abs(boxes).max() <= 2 < truth.extent:
        return "AP is 0 and the predicted boxes look normalised to 0..1: give them in pixels of the original image."
    if (_sizes(boxes) <= 0).any(axis=1).mean() > 0.25:
        return "AP is 0 and many predicted boxes end before they begin: give x1, y1, x2, y2, not width and height."
    return (
        f"AP is 0 because the predicted boxes miss the objects (the best IoU within a class is {overlap:.2f}): "
        "the model has learnt too little, or the boxes are in pixels of another size."
    )
