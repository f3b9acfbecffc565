"""Scores of tracks against a COCO-video file: HOTA, IDF1 and MOTA, as the library trackeval computes them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from diffperception.data.clips import ClipTable
from diffperception.detection.results import Row, read_results
from diffperception.doctor import require_installed
from diffperception.table import format_table


@dataclass(frozen=True)
class TrackScores:
    """Scores from 0 to 1, MOTA from minus infinity, and the number of identity switches.

    Attributes:
        metrics: of all objects. HOTA (arXiv 2009.07736) is the mean over 19 overlaps of the geometric mean of how well
            objects are found (DetA) and how well they keep their track (AssA); LocA is how well boxes fit. IDF1 and
            MOTA are at an overlap of 0.5.
        per_class: HOTA of each class that objects or tracks have.
        notes: what was left out.
    """

    metrics: dict[str, float]
    per_class: dict[str, float]
    notes: list[str]

    def table(self) -> str:
        """The metrics, HOTA of each class, and the notes, as lines of text."""
        summary = [str(value) if name == "switches" else f"{value:.3f}" for name, value in self.metrics.items()]
        rows = [(name, f"{hota:.3f}") for name, hota in self.per_class.items()]
        parts = [format_table([summary], list(self.metrics)), format_table(rows, ["class", "HOTA"])]
        return "\n\n".join([*parts, *(["\n".join(self.notes)] if self.notes else [])])


def read_tracks(results: str | Path, truth: ClipTable) -> tuple[list[Row], list[str]]:
    """Rows of a results file with a track_id each, see `read_results`, and what was done to them.

    Raises:
        FileNotFoundError, ValueError: as of `read_results`; or a track has two boxes in one image.
    """
    found = read_results(results, truth.table, with_tracks=True)
    count = Counter((row["image_id"], row["track_id"]) for row in found.rows)
    for number, row in enumerate(found.rows, 1):
        if count[row["image_id"], row["track_id"]] > 1:
            raise ValueError(
                f"{results}, row {number}: track {row['track_id']} has two boxes in image {row['image_id']}, but an"
                " object is in one place of an image"
            )
    return found.rows, found.notes


def require_trackeval() -> None:
    """ModuleNotFoundError, with what installs it, if the library that scores tracks is not there."""
    require_installed("trackeval", "scoring tracks", "pip install 'diffperception[tracks]'")


def score_tracks(truth: ClipTable, rows: Sequence[Row], notes: Sequence[str] = ()) -> TrackScores:
    """Score tracks, rows of a results file with a track_id; every class by itself, then all objects together.

    Raises:
        ModuleNotFoundError: trackeval is not installed.
        ValueError: the file of annotations has no object.
    """
    require_trackeval()
    from trackeval.metrics import CLEAR, HOTA, Identity

    table, measures = truth.table, (HOTA(), Identity({"PRINT_CONFIG": False}), CLEAR({"PRINT_CONFIG": False}))
    if not len(objects := truth.objects):
        raise ValueError(f"{table.source} has no object that tracks could be scored on")
    left_out = len(table.boxes) - len(objects)
    said = [f"{left_out} objects of {table.name} are crowds or have no area: they are left out."] if left_out else []
    columns = table.annotation_images, table.annotation_categories, truth.tracks, table.boxes
    true = list(zip(*(column[objects].tolist() for column in columns), strict=True))
    found = [(row["image_id"], row["category_id"], row["track_id"], row["bbox"]) for row in rows]
    by_class: list[dict[str, Any]] = [{} for _ in measures]
    for category, name in zip(*table.labels(), strict=True):
        own = [_by_image(side, category) for side in (true, found)]
        if any(own):
            clips = [[table.image_ids[row].item() for row in clip] for clip in truth.images]
            data = {str(number): _sequence(own[0], own[1], clip) for number, clip in enumerate(clips)}
            for of_measure, measure in zip(by_class, measures, strict=True):
                results = {number: measure.eval_sequence(of_clip) for number, of_clip in data.items()}
                of_measure[name] = measure.combine_sequences(results)
    hota, identity, clear = (m.combine_classes_det_averaged(of) for m, of in zip(measures, by_class, strict=True))
    metrics = {name: float(np.mean(hota[name])) for name in ("HOTA", "DetA", "AssA", "LocA")}
    metrics |= {"IDF1": float(identity["IDF1"]), "MOTA": float(clear["MOTA"]), "switches": int(clear["IDSW"])}
    per_class = {name: float(np.mean(of_class["HOTA"])) for name, of_class in by_class[0].items()}
    return TrackScores(metrics, per_class, [*notes, *said])


_Boxes = dict[int, list[tuple[int, list[float]]]]  # of each image: the track and the box of its objects


def _by_image(objects: Sequence[tuple[int, int, int, list[float]]], wanted: int) -> _Boxes:
    found: _Boxes = {}
    for image, category, track, bbox in objects:
        if category == wanted:
            found.setdefault(image, []).append((track, bbox))
    return found


def _sequence(true: _Boxes, found: _Boxes, images: Sequence[int]) -> dict[str, Any]:
    """A clip as trackeval takes it: tracks are numbered from 0, similarity is the overlap of boxes."""
    sides = [[side.get(image, []) for image in images] for side in (true, found)]
    numbers = [{t: k for k, t in enumerate(sorted({t for f in side for t, _ in f}))} for side in sides]
    ids = [[np.array([n[t] for t, _ in f], dtype=int) for f in side] for n, side in zip(numbers, sides, strict=True)]
    return {
        "num_timesteps": len(images),
        "num_gt_ids": len(numbers[0]),
        "num_tracker_ids": len(numbers[1]),
        "num_gt_dets": sum(map(len, sides[0])),
        "num_tracker_dets": sum(map(len, sides[1])),
        "gt_ids": ids[0],
        "tracker_ids": ids[1],
        "similarity_scores": [_overlaps(*pair) for pair in zip(*sides, strict=True)],
    }


def _overlaps(*sides: list[tuple[int, list[float]]]) -> np.ndarray:
    boxes = [torch.tensor([box for _, box in side], dtype=torch.float64).reshape(-1, 4) for side in sides]
    return box_iou(*(box_convert(each, "xywh", "xyxy") for each in boxes)).numpy()
