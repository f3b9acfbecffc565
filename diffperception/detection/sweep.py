"""What the settings of the sampler are worth: AP and seconds of their combinations. No lightning here."""

import itertools
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffperception.data import CocoDetection
from diffperception.detection import DiffusionDet
from diffperception.detection.evaluator import CocoEvaluator
from diffperception.detection.inference import EVALUATORS, Protocol, hide_bar, require_classes, share_of_batches
from diffperception.detection.sampler import BoxSampler
from diffperception.diffusion import sample_seed


@dataclass(frozen=True)
class Score:
    """A metric in 0..1, of each seed; nan where the data set has nothing to find."""

    by_seed: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed)

    @property
    def spread(self) -> float:
        """The sample standard deviation over the seeds; nan for one seed, or where the metric is."""
        if len(self.by_seed) < 2 or math.isnan(self.mean):
            return math.nan
        return statistics.stdev(self.by_seed)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if math.isnan(self.spread) else f" ± {self.spread:.3f}")

    def content(self) -> dict[str, Any]:
        """For a JSON file: null where undefined."""
        values = [_defined(value) for value in self.by_seed]
        return {"mean": _defined(self.mean), "spread": _defined(self.spread), "by_seed": values}


@dataclass(frozen=True)
class AuditRow:
    """What a combination of settings gave.

    Attributes:
        options: the settings.
        ap, ap50: COCO's AP and AP50.
        seconds: that one image takes: features, head and post-processing.
    """

    options: BoxSampler
    ap: Score
    ap50: Score
    seconds: float

    def content(self) -> dict[str, Any]:
        """For a JSON file."""
        names = ("mode", "num_boxes", "renewal_threshold", "ensemble", "eta", "nms_threshold", "steps")
        settings = {name: getattr(self.options, name) for name in names}
        scores = {"AP": self.ap.content(), "AP50": self.ap50.content()}
        return {**settings, "head_passes": self.options.steps, **scores, "seconds_per_image": self.seconds}


@dataclass(frozen=True)
class Audit:
    """What all combinations gave, and how that was measured."""

    rows: list[AuditRow]
    seeds: list[int]
    images: int
    batch_size: int
    device: str

    def table(self) -> str:
        """A line a combination, and how to read it."""
        columns = {"mode": "mode", "num_boxes": "boxes"}
        finer = {"renewal_threshold": "renewal", "ensemble": "ensemble", "eta": "eta", "nms_threshold": "nms"}
        constant = {name for name in finer if len(self._values(name)) == 1}
        columns |= {name: title for name, title in finer.items() if name not in constant} | {"steps": "steps"}
        lines = [[*columns.values(), "AP", "AP50", "s/image"]]
        for row in self.rows:
            settings = [str(getattr(row.options, name)) for name in columns]
            lines.append([*settings, str(row.ap), str(row.ap50), f"{row.seconds:.4f}"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([*padded, "", *self._notes(constant)])

    def _notes(self, constant: Iterable[str]) -> list[str]:
        settings = ", ".join(f"{name} {self._values(name)[0]}" for name in sorted(constant))
        seeds = ", ".join(map(str, self.seeds))
        over = f"mean ± standard deviation over the seeds {seeds}" if len(self.seeds) > 1 else f"seed {seeds}"
        return [
            f"steps: passes through the head, an image{'; the same in all rows: ' + settings if settings else ''}",
            f"AP, AP50: {over}, {self.images} images",
            f"s/image: features + head + post-processing on {self.device} in batches of {self.batch_size}, median over"
            " the batches; the features are computed once and counted in every row, reading and scoring are not",
        ]

    def _values(self, name: str) -> list[Any]:
        return list(dict.fromkeys(getattr(row.options, name) for row in self.rows))

    def content(self) -> dict[str, Any]:
        """For a JSON file."""
        about = {name: getattr(self, name) for name in ("seeds", "images", "batch_size", "device")}
        return {**about, "rows": [row.content() for row in self.rows]}


def combine(base: BoxSampler, choices: Mapping[str, Sequence[Any]]) -> list[BoxSampler]:
    """`base` with every combination of the values that `choices` has for some of its fields.

    Raises:
        ValueError: a value is out of its range.
    """
    return [replace(base, **dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]


@dataclass
class _Run:
    """One combination with one seed: detections by image id, and the seconds an image took in each batch."""

    options: BoxSampler
    seed: int
    detections: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


def audit_detector(
    detector: DiffusionDet,
    dataset: CocoDetection,
    combinations: Sequence[BoxSampler],
    seeds: Sequence[int],
    batch_size: int = 8,
    workers: int = 0,
    max_dets: int | None = None,
    protocol: Protocol = "coco",
) -> Audit:
    """AP and seconds of `detector` for every combination; it is left in evaluation mode.

    An image's features are computed once for all combinations and seeds; all detections are kept until the end. A
    combination's AP with one seed is what `evaluate_detector` gives. Every process must call this, as it.

    Args:
        combinations: settings, such as `combine` gives.
        seeds: of the noise; each combination is scored with each.
        batch_size: images in one prediction.
        workers: processes that read images, for each process that predicts.
        max_dets, protocol: as in `evaluate_detector`.

    Raises:
        ValueError: the detector has other classes than the data set, or the annotations are not for the protocol.
    """
    require_classes(detector.classes, dataset)
    evaluator = EVALUATORS[protocol](dataset.annotations, max_dets, dataset.image_ids)
    detector.eval()
    runs = [[_Run(options, seed) for seed in seeds] for options in combinations]
    batches = share_of_batches(dataset, range(len(dataset)), batch_size, workers)
    _predict(detector, batches, list(itertools.chain(*runs)))
    rows = [_row(group, evaluator) for group in tqdm(runs, desc="score", leave=False, disable=hide_bar())]
    return Audit(rows, list(seeds), len(dataset), batch_size, str(detector.device))


def _predict(detector: DiffusionDet, batches: DataLoader[Any], runs: Sequence[_Run]) -> None:
    """Fill the runs, all with a batch before the next, so that what disturbs the clock disturbs all alike."""
    passes = sum(run.options.steps for run in runs)
    bar = tqdm(total=passes * len(batches.dataset), desc="audit", unit="pass", leave=False, disable=hide_bar())  # type: ignore[arg-type]
    for images, targets in batches:
        ids = [target["image_id"] for target in targets]
        on_device = [image.to(detector.device) for image in images]
        began = _now(detector.device)
        encoded = detector.encode(on_device)
        features = _now(detector.device) - began
        done: dict[Any, tuple[list[dict[str, Tensor]], float]] = {}
        for run in runs:
            what = (run.seed, *astuple(_without_idle(run.options)))
            if what not in done:
                seeds = [sample_seed(run.seed, image_id) for image_id in ids]
                began = _now(detector.device)
                found = detector.predict(on_device, seeds=seeds, options=run.options, encoded=encoded)
                done[what] = found, (features + _now(detector.device) - began) / len(ids)
            found, seconds = done[what]
            run.seconds.append(seconds)
            for image_id, detections in zip(ids, found, strict=True):
                run.detections[image_id] = {name: value.cpu() for name, value in detections.items()}
            bar.update(run.options.steps * len(ids))
    bar.close()


def _without_idle(options: BoxSampler) -> BoxSampler:
    """Equal for settings that predict the same: what happens between steps does nothing in a single one."""
    if options.steps > 1:
        return options
    return replace(options, eta=1.0, mode="ddim", renewal_threshold=None, ensemble=True)


def _now(device: torch.device) -> float:
    """The time in seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _row(runs: Sequence[_Run], evaluator: CocoEvaluator) -> AuditRow:
    """The scores of one combination, given its runs, one a seed."""
    metrics = []
    for run in runs:
        evaluator.reset()
        evaluator.update(list(run.detections), list(run.detections.values()))
        evaluator.gather()
        metrics.append(evaluator.compute().metrics)
    seconds = statistics.median(_of_all_processes([x for run in runs for x in run.seconds]))
    ap, ap50 = (Score([found[name] for found in metrics]) for name in ("AP", "AP50"))
    return AuditRow(runs[0].options, ap, ap50, seconds)


def _of_all_processes(values: list[float]) -> list[float]:
    if not dist.is_initialized():
        return values
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return list(itertools.chain(*parts))


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
