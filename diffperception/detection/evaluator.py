"""Average precision by the rules of COCO and LVIS, for any number of detections and predictions spread over processes.

Numbers are faster-coco-eval's, which agree with those of pycocotools and of the lvis package.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_convert

from diffperception.data.annotations import LVIS_LISTS, CocoTable, tabulate
from diffperception.data.formats import Format, open_annotations
from diffperception.data.outlines import encode_masks
from diffperception.data.soundness import check_boxes, require_entries
from diffperception.detection.results import read_results
from diffperception.devices import gather
from diffperception.table import format_table

Protocol = Literal["coco", "lvis"]
IouType = Literal["bbox", "segm"]
MAX_DETS: dict[Protocol, int] = {"coco": 100, "lvis": 300}  # of each class (COCO), of all (LVIS)
PREFIX: dict[IouType, str] = {"bbox": "", "segm": "mask_"}  # of the names of metrics, by what is compared
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}  # in under 10, under 100, and more training images
NEARLY_ZERO = 5e-4  # an AP that a table with three digits shows as 0
CLASSES_AT_A_TIME = 100  # the evaluation keeps something for each image and class, objects or not


@dataclass(frozen=True)
class CocoResult:
    """What an evaluation found.

    Attributes:
        metrics: AP, AP50, AP75, APs, APm, APl, AR1, AR10 and AR<max_dets>, each in 0..1, or nan where the file has no
            object to find (of that size); for LVIS APr, APc and APf too, but of the recalls the last alone. Those of
            masks are mask_AP, ...
        detections: the predictions as rows of a COCO results file: image_id, category_id, bbox (xywh, pixels), score,
            and segmentation where masks are scored.
    """

    metrics: dict[str, float]
    per_class: dict[str, float]  # AP of what is compared first, the boxes; nan for a class without objects
    objects: dict[str, int]  # number of objects of each class, crowds not counted
    detections: list[dict[str, Any]]
    notes: list[str]  # what was left out of the evaluation or is missing from it, one sentence each
    explanation: str | None  # why AP is 0 or undefined, in one sentence; None where there is nothing to explain

    def with_notes(self, notes: Sequence[str]) -> "CocoResult":
        """The same with these notes before its own."""
        return replace(self, notes=[*notes, *self.notes])

    @property
    def remarks(self) -> list[str]:
        """The notes and, if there is one, the explanation."""
        return [*self.notes, *([self.explanation] if self.explanation else [])]

    def table(self) -> str:
        """The metrics, the AP of each class, and the remarks, as lines of text."""
        summary = format_table([[_number(value) for value in self.metrics.values()]], list(self.metrics))
        rows = [(name, _number(ap), self.objects[name]) for name, ap in self.per_class.items()]
        parts = [summary, format_table(rows, ["class", "AP", "objects"]), "\n".join(self.remarks)]
        return "\n\n".join(part for part in parts if part)


def iou_types(masks: bool) -> tuple[IouType, ...]:
    """What is compared where masks are scored beside the boxes, or not."""
    return ("bbox", "segm") if masks else ("bbox",)


class CocoEvaluator:
    """Collects predictions image by image and scores them against a COCO annotation file.

    Every image of the file counts, whether it was predicted or not. Boxes without area are left out, in the file and
    among the predictions: nothing can overlap them, so they could only lower the best score that is possible.

    By LVIS's rules (arXiv 1908.03195) an image's detections of a class count only if the class is known to be there or
    not to be there, and unmatched ones not where its objects were not all annotated.

    Args:
        annotations: COCO JSON file, LVIS's, or what `format` says, with the ground truth; or the table of one, with
            outlines for masks.
        iou_types: what is compared: boxes (`bbox`), masks (`segm`) or both.
        max_dets: how many detections count per image, the best scores first: of each class, by default 100 (COCO), or
            of all classes, by default 300 (LVIS).
        image_ids: evaluate these images of the file only.
        protocol: coco, or lvis for annotation files of LVIS.
        classes: names of the labels 0..K-1 of predictions; by default, the categories in the order of their ids.
        format: of the annotations: coco, voc (Pascal VOC), yolo, cvat, labelstudio, labelme or csv; auto looks for
            itself.
        images: the folder of the images, for formats that need them; by default where the format has them.

    Raises:
        FileNotFoundError, ValueError: the file is missing, cannot be used (see `tabulate`) or is not what the protocol
            needs, masks are asked for and it has none, it has other classes, or `max_dets` is below 1.
    """

    def __init__(
        self,
        annotations: str | Path | CocoTable,
        iou_types: Sequence[IouType] = ("bbox",),
        max_dets: int | None = None,
        image_ids: Iterable[int] | None = None,
        protocol: Protocol = "coco",
        classes: Sequence[str] | None = None,
        format: Format = "coco",
        images: str | Path | None = None,
    ) -> None:
        self.iou_types = tuple(iou_types)
        self.masks = "segm" in self.iou_types
        self.notes: list[str] = []  # on what reading the format passed over
        if not self.iou_types or not PREFIX.keys() >= set(self.iou_types):
            raise ValueError(f"iou_types must be some of {', '.join(PREFIX)}, not {iou_types!r}")
        self.protocol: Protocol = protocol
        self.max_dets = MAX_DETS[protocol] if max_dets is None else max_dets
        if self.max_dets < 1:
            raise ValueError(f"max_dets is {max_dets}: at least 1 detection per image must count")
        if not isinstance(annotations, CocoTable):
            found = open_annotations(annotations, images, format, self.masks)
            annotations = tabulate(found.content, found.source, self.masks)
            require_entries(annotations)
            self.notes = [f"{found.source}: {note}." for note in found.notes]
        self.truth = GroundTruth(annotations, image_ids, self.masks, classes)
        if protocol == "lvis":
            _require_lvis_file(self.truth)
        self.reset()

    def reset(self) -> None:
        """Forget the predictions; the annotations stay."""
        self._rows: dict[int, list[dict[str, Any]]] = {}  # by image

    def update(self, image_ids: Sequence[int], predictions: Sequence[dict[str, Tensor]]) -> None:
        """Take the predictions of images with these ids in the file; an image that was taken before is ignored.

        Those of an image are `boxes` (n, 4) xyxy in pixels of the original image, `scores` (n,) and `labels` (n,) in
        0..K-1; where masks are scored, `masks` (n, H, W) of the original image too, bool or 0..1.
        """
        names = ("boxes", "scores", "labels", *(["masks"] if self.masks else []))
        for image_id, prediction in zip(image_ids, predictions, strict=True):
            scored = {name: prediction[name] for name in names}
            self._rows.setdefault(int(image_id), results_rows(int(image_id), scored, self.truth.category_ids))

    def gather(self) -> None:
        """Give every process the predictions of all, each image once; does nothing in a single process."""
        # Lower ranks win, so that every process keeps the same copy of an image that a sampler has handed out twice.
        self._rows = {image_id: rows for part in reversed(gather([self._rows])) for image_id, rows in part.items()}

    def compute(self) -> CocoResult:
        """Score the predictions taken so far. The order in which they came does not matter."""
        result = self._score([row for i in sorted(self._rows) for row in self._rows[i]], self._rows.keys())
        absent, total = len(self.truth.image_ids - self._rows.keys()), len(self.truth.image_ids)
        if absent:
            result.notes.append(f"{absent} of {total} images were not predicted: their objects count as missed.")
        return result

    def score_results(self, results: str | Path) -> CocoResult:
        """Score a COCO results file, a JSON list of rows with image_id, category_id, bbox and score (`read_results`).

        Where masks are scored, rows must have a segmentation too, as run lengths. ValueError, or FileNotFoundError,
        says what is wrong with the file.
        """
        found = read_results(results, self.truth.table, self.masks)
        if not found.rows:
            note = f"{results} has no rows: nothing was found in any image."
            return self._score([], self.truth.image_ids).with_notes([*found.notes, note])
        return self._score(found.rows, {row["image_id"] for row in found.rows}).with_notes(found.notes)

    def _score(self, rows: list[dict[str, Any]], seen: Set[int]) -> CocoResult:
        usable = [row for row in rows if self.truth.can_score(row)]
        measured = [self._measure(usable, iou_type) for iou_type in self.iou_types]
        _, precision, overlap = measured[0]
        found = mean_defined(precision) >= NEARLY_ZERO
        return CocoResult(
            metrics={name: value for metrics, *_ in measured for name, value in metrics.items()},
            per_class={name: mean_defined(precision[:, :, k]) for k, name in enumerate(self.truth.classes)},
            objects=self.truth.objects,
            detections=usable,
            notes=[*self.notes, *_notes(self.truth, len(rows), len(usable))],
            explanation=None if found else _explain(self.truth, rows, seen, overlap),
        )

    def _measure(self, rows: list[dict[str, Any]], iou_type: IouType) -> tuple[dict[str, float], np.ndarray, float]:
        """What the protocol measures of the boxes (`bbox`), or masks (`segm`), in rows of a COCO results file.

        Metrics; precision (T, R, K) at T thresholds of IoU and R of recall, -1 where a class has no object; and the
        best IoU of a prediction with an object of its class.
        """
        limits = sorted({1, 10, self.max_dets})
        if self.protocol == "lvis":
            rows, limits = self.truth.judged(best_of_each_image(rows, self.max_dets)), [self.max_dets]
        ids = self.truth.category_ids
        chunks = (ids[k : k + CLASSES_AT_A_TIME] for k in range(0, len(ids), CLASSES_AT_A_TIME))
        parts = [self._run(rows, iou_type, limits, chunk) for chunk in chunks]
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
        found = []
        for number, row in enumerate(rows, 1):  # the evaluation takes a match with id 0 for no match
            if row["category_id"] in chosen:
                by_box = row["bbox"][2] * row["bbox"][3]
                area = by_box if iou_type == "bbox" else float(coco_mask.area(row["segmentation"]))
                found.append(row | {"id": number, "area": area, "iscrowd": 0})
        sides = (COCO(file | {"annotations": annotations}) for annotations in (objects, found))
        evaluation = COCOeval_faster(*sides, iou_type, lvis_style=self.protocol == "lvis")
        evaluation.params.maxDets = limits
        evaluation.params.catIds = ids
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation


def best_of_each_image(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Of each image at most so many rows, those with the best scores."""
    ordered = sorted(rows, key=lambda row: (row["image_id"], -row["score"]))
    images = itertools.groupby(ordered, key=lambda row: row["image_id"])
    return [row for _, of_image in images for row in itertools.islice(of_image, limit)]


def mean_defined(values: np.ndarray) -> float:
    """Mean over what is not -1; nan where all is. Rounded: COCOeval divides by tp + fp + 2e-16, so gives 1 - 2e-16."""
    defined = values[values > -1]
    return round(float(defined.mean()), 12) if defined.size else nan


def results_rows(image_id: int, prediction: dict[str, Tensor], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The predictions of an image as rows of a COCO results file; the category of label k is `category_ids[k]`."""
    known = dict(enumerate(category_ids))
    # float32 carries no more than four digits, and JSON is short.
    boxes = box_convert(prediction["boxes"].detach().cpu().double(), "xyxy", "xywh").numpy().round(4).tolist()
    columns = boxes, prediction["scores"].tolist(), prediction["labels"].tolist()
    rows: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": known.get(label), "bbox": box, "score": score}
        for box, score, label in zip(*columns, strict=True)
    ]
    if "masks" not in prediction:
        return rows
    return [row | {"segmentation": mask} for row, mask in zip(rows, encode_masks(prediction["masks"]), strict=True)]


class GroundTruth:
    """What a checked annotation file has in the chosen images; its `annotations` are those with an area."""

    def __init__(
        self,
        table: CocoTable,
        image_ids: Iterable[int] | None,
        with_masks: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.table, self.name = table, table.name
        self.category_ids, self.classes = table.labels(classes)
        self.known_ids = set(self.category_ids)
        frequency = dict(zip(table.category_ids.tolist(), table.frequencies, strict=True))
        # (K,) LVIS's frequency of each class, r, c or f
        self.group = np.array([frequency[number] for number in self.category_ids])
        self.categories = [
            {"id": number, "name": name, "frequency": frequency[number]}
            for number, name in zip(self.category_ids, self.classes, strict=True)
        ]
        known = {number: row for row, number in enumerate(table.image_ids.tolist())}
        self.image_ids = set(known) if image_ids is None else known.keys() & set(image_ids)
        self.images = [self._image(number, known[number]) for number in self.image_ids]
        chosen = np.isin(table.annotation_images, list(self.image_ids))
        rows = np.flatnonzero(chosen & (table.boxes[:, 2:] > 0).all(axis=1))
        self.annotations = self._annotations(rows)
        if with_masks:
            row_of_image = np.array(
                [known[number] for number in table.annotation_images[rows].tolist()], dtype=np.int64
            )
            outlines = table.require_outlines(rows, row_of_image).of(rows)
            for annotation, outline in zip(self.annotations, outlines, strict=True):
                annotation["segmentation"] = outline
        self.without_area = int(chosen.sum()) - len(rows)
        self.doubts = [problem.message for problem in check_boxes(table) if problem.level == "error"]
        counts = Counter(o["category_id"] for o in self.annotations if not o["iscrowd"])
        self.objects = {name: counts[c] for c, name in zip(self.category_ids, self.classes, strict=True)}
        self.extent = max((sum(o["bbox"][i::2]) for o in self.annotations for i in (0, 1)), default=0.0)

    def _image(self, number: int, row: int) -> dict[str, Any]:
        width, height = self.table.sizes[row].tolist()
        lists = {key: of_images[row] for key, of_images in self.table.image_lists.items()}
        return {"id": number, "width": width, "height": height, **lists}

    def _annotations(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Annotations of the table as the evaluation takes them, with ids from 1: it takes 0 for no match."""
        table = self.table
        columns = {
            "image_id": table.annotation_images,
            "category_id": table.annotation_categories,
            "bbox": table.boxes,
            "area": table.areas,
            "iscrowd": table.iscrowd.astype(np.int64),
        }
        values = zip(*(column[rows].tolist() for column in columns.values()), strict=True)
        return [{"id": number, **dict(zip(columns, of_one, strict=True))} for number, of_one in enumerate(values, 1)]

    def can_score(self, row: dict[str, Any]) -> bool:
        """Whether the row's image and class are known, and its box has an area and is, like the score, finite."""
        known = row["image_id"] in self.image_ids and row["category_id"] in self.known_ids
        return known and all(map(isfinite, (*row["bbox"], row["score"]))) and min(row["bbox"][2:]) > 0

    def judged(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of a class that LVIS knows to be in their image or not to be there."""
        known = {(o["image_id"], o["category_id"]) for o in self.annotations}
        known |= {(image["id"], category) for image in self.images for category in image["neg_category_ids"]}
        return [row for row in rows if (row["image_id"], row["category_id"]) in known]


def _require_lvis_file(truth: GroundTruth) -> None:
    if truth.table.image_lists.keys() >= set(LVIS_LISTS) and all(group in FREQUENCIES for group in truth.group):
        return
    raise ValueError(
        f"{truth.name} is not an LVIS annotation file: its images must have {' and '.join(LVIS_LISTS)}, its"
        f" categories a frequency ({', '.join(FREQUENCIES)}); evaluate other files with --protocol coco"
    )


def _number(value: float) -> str:
    return "-" if isnan(value) else f"{value:.3f}"


def _notes(truth: GroundTruth, predicted: int, usable: int) -> list[str]:
    notes = [f"In {truth.name} {doubt}." for doubt in truth.doubts]
    if truth.without_area:
        notes.append(f"{truth.without_area} objects of {truth.name} have no area and are left out.")
    if usable < predicted:
        notes.append(
            f"{predicted - usable} of {predicted} predicted boxes are left out: "
            "their image or class is unknown, or they are not finite or have no area."
        )
    return notes


def _explain(truth: GroundTruth, rows: list[dict[str, Any]], seen: Set[int], overlap: float) -> str:
    """The first reason for an AP of 0 that the data show."""
    low, size = np.hsplit(np.array([row["bbox"] for row in rows]).reshape(-1, 4), 2)
    if not any(truth.objects.values()):
        return f"AP is undefined: {truth.name} has no object to find in the {len(truth.image_ids)} images evaluated."
    if not seen:
        return "AP is 0 because no image was predicted."
    if truth.image_ids.isdisjoint(seen):
        example = f"{min(seen)} is predicted, {min(truth.image_ids)} is in the file"
        return f"AP is 0 because none of the predicted image ids is in {truth.name} ({example})."
    if not rows:
        return f"AP is 0 because no box was predicted in any of the {len(seen)} images."
    if not np.isfinite(low + size).all():
        return "AP is 0 and predicted boxes are not finite: the model has diverged."
    if not all(row["category_id"] in truth.known_ids for row in rows):
        classes = len(truth.classes)
        return (
            f"AP is 0 and predicted classes are not those of {truth.name}: "
            f"labels count its {classes} categories, in the order of their ids, from 0 to {classes - 1}."
        )
    if max(np.abs(low).max(), np.abs(low + size).max()) <= 2 < truth.extent:
        return "AP is 0 and the predicted boxes look normalised to 0..1: give them in pixels of the original image."
    if (size <= 0).any(axis=1).mean() > 0.25:
        return "AP is 0 and many predicted boxes end before they begin: give x1, y1, x2, y2, not width and height."
    if overlap >= 0.5:
        return "AP is nearly 0, though some box meets an object of its class: the model has learnt too little."
    return (
        f"AP is 0 because the predicted boxes miss the objects (the best IoU within a class is {overlap:.2f}): "
        "the model has learnt too little, or the boxes are in pixels of another size."
    )
