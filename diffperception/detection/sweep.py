"""What the settings of the sampler are worth: AP and seconds of their combinations."""

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffperception.data import CocoDetection
from diffperception.data.batches import collate
from diffperception.data.images import LazyMap, read_ahead
from diffperception.data.tiles import Tiling
from diffperception.detection.detector import Detector, DiffusionDet
from diffperception.detection.evaluator import CocoEvaluator, Protocol
from diffperception.detection.inference import require_classes, require_start, start_in_words, starts_of
from diffperception.detection.sampler import NOISE, BoxSampler
from diffperception.detection.start import read_start
from diffperception.devices import Precision, autocast, gather, hide_bar, share
from diffperception.diffusion import sample_seed
from diffperception.files import OutputFolder, write_json
from diffperception.table import format_table
from diffperception.visualization.draw import save_png

# What the seconds of rows with a `start_time` hold beside those of the others.
OF_PROPOSALS = "the auxiliary head's proposals; they are no pass through the head, but their seconds are counted"
OF_A_FILE = "What made those boxes is not counted."


@dataclass
class Score:
    """A metric in 0..1 for each seed, nan where the data set has nothing to find; its mean and standard deviation."""

    by_seed: list[float]
    mean: float = field(init=False)
    spread: float = field(init=False)  # nan for one seed, or where the metric is

    def __post_init__(self) -> None:
        self.mean = statistics.fmean(self.by_seed)
        several = len(self.by_seed) > 1 and not math.isnan(self.mean)
        self.spread = statistics.stdev(self.by_seed) if several else math.nan

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if math.isnan(self.spread) else f" ± {self.spread:.3f}")


@dataclass(frozen=True)
class SweepRow:
    """What a combination of settings gave: COCO's AP and AP50, and the seconds that one image takes."""

    sampler: BoxSampler
    ap: Score
    ap50: Score
    seconds: float

    def content(self) -> dict[str, Any]:
        """For a JSON file."""
        settings = {"mode": self.sampler.mode} | asdict(self.sampler) | {"head_passes": self.sampler.steps}
        return settings | {"AP": asdict(self.ap), "AP50": asdict(self.ap50), "seconds_per_image": self.seconds}


@dataclass(frozen=True)
class Sweep:
    """What all combinations gave, and how that was measured."""

    rows: list[SweepRow]
    seeds: list[int]
    images: int
    batch_size: int
    device: str
    started: str = ""  # what is to be said of rows with a `start_time`

    def table(self) -> str:
        """A line per combination, and how to read it."""
        warm = {"start_time": "start"} if any(row.sampler.start_time is not None for row in self.rows) else {}
        finer = warm | {"renewal_threshold": "renewal", "ensemble": "ensemble", "eta": "eta", "nms_threshold": "nms"}
        finer |= {"box_voting": "voting", "spread": "spread"}
        same = {name for name in finer if len({getattr(row.sampler, name) for row in self.rows}) == 1}
        varied = {name: title for name, title in finer.items() if name not in same}
        columns = {"mode": "mode", "num_boxes": "boxes"} | varied | {"steps": "steps"}
        lines = [
            [*(_shown(row.sampler, name) for name in columns), row.ap, row.ap50, f"{row.seconds:.4f}"]
            for row in self.rows
        ]
        settings = ", ".join(f"{name} {getattr(self.rows[0].sampler, name)}" for name in sorted(same))
        seeds = ", ".join(map(str, self.seeds))
        over = f"mean ± standard deviation over the seeds {seeds}" if len(self.seeds) > 1 else f"seed {seeds}"
        return (
            f"{format_table(lines, [*columns.values(), 'AP', 'AP50', 's/image'])}\n\n"
            f"steps: passes through the head, per image{'; the same in all rows: ' + settings if settings else ''}\n"
            f"AP, AP50: {over}, {self.images} images\n"
            f"s/image: features + head + post-processing on {self.device} in batches of {self.batch_size}, median over"
            " the batches; the features are computed once and counted in every row, reading and scoring are not"
            + (self.started and f"\nstart: {self.started}")
        )

    def content(self) -> dict[str, Any]:
        """For a JSON file."""
        return vars(self) | {"rows": [row.content() for row in self.rows]}


def _shown(sampler: BoxSampler, name: str) -> object:
    """A setting as a table has it."""
    return NOISE if name == "start_time" and sampler.start_time is None else getattr(sampler, name)


def combine(detector: Detector, settings: Mapping[str, Any]) -> list[BoxSampler | None]:
    """The detector's sampler, if it has one, with every combination of settings: a value each, several in a list, or
    None for the sampler's own. ValueError for those that it does not have, or that are out of range.
    """
    values = {name: x if isinstance(x, list) else [x] for name, x in settings.items() if x is not None}
    combinations = itertools.product(*map(dict.fromkeys, values.values()))
    return [detector.sampler_with(**dict(zip(values, chosen, strict=True))) for chosen in combinations]


def write_sweep(sweep: Sweep, folder: OutputFolder) -> None:
    """sweep.json (null where undefined) and sweep.png, its curves."""
    from diffperception.visualization.curves import sweep_curves  # matplotlib takes a second to import

    content = sweep.content()
    write_json(folder.file("sweep.json"), content)
    save_png(sweep_curves(content["rows"]), folder.file("sweep.png"))


@dataclass
class _Run:
    """One combination with one seed: detections by image id, and the seconds per image in each batch."""

    sampler: BoxSampler
    seed: int
    detections: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


def sweep_sampler(
    detector: Detector,
    dataset: CocoDetection,
    combinations: Sequence[BoxSampler | None],
    seeds: Sequence[int],
    batch_size: int = 8,
    workers: int = 0,
    max_dets: int | None = None,
    protocol: Protocol = "coco",
    precision: Precision = "32",
    tile: int | None = None,
    overlap: int | None = None,
    start: str | Path | None = None,
) -> Sweep:
    """AP and seconds of `detector` for every combination; it is left in evaluation mode.

    An image's features are computed once for all combinations and seeds; all detections are kept until the end. A
    combination's AP with one seed is what `evaluate_detector` gives. Every process must call this, as it.

    Args:
        combinations: settings, such as `combine` gives.
        seeds: of the noise; each combination is scored with each.
        batch_size, workers, max_dets, protocol, precision: as in `evaluate_detector`.
        tile, overlap: as there, but a sweep takes images whole.
        start: as there, for the combinations that have a `start_time`; the others start from noise, unless none has.

    Raises:
        ValueError: the detector has no sampler or other classes than the data set, the annotations are not for the
            protocol, masks are to be scored, or images to be cut.
    """
    if not isinstance(detector, DiffusionDet):
        name = type(detector).__name__
        raise ValueError(f"{name} has no sampler to sweep: give one seed, and one value of each option")
    require_classes(detector.classes, dataset)
    if dataset.masks:
        raise ValueError("a sweep scores boxes alone: leave masks out, or give one seed and one value of each option")
    if (tiling := Tiling(tile, overlap)).tile is not None:
        raise ValueError("a sweep takes images whole: leave tile out, or give one seed and one value of each option")
    samplers = [sampler or detector.sampler for sampler in combinations]
    warm = [sampler for sampler in samplers if sampler.start_time is not None]
    for sampler in samplers:
        require_start(detector, sampler, start is not None and (sampler.start_time is not None or not warm), tiling)
    begin = None if start is None else read_start(start, dataset.table)
    truth = dataset.table or dataset.annotations
    evaluator = CocoEvaluator(truth, ("bbox",), max_dets, dataset.image_ids, protocol, detector.classes)
    detector.eval()
    runs = [[_Run(sampler, seed) for seed in seeds] for sampler in samplers]
    images = LazyMap(dataset.__getitem__, share(range(len(dataset))))
    with autocast(detector.device, precision):
        _predict(detector, read_ahead(images, batch_size, workers), list(itertools.chain(*runs)), begin)
    rows = [_row(group, evaluator) for group in tqdm(runs, desc="score", leave=False, disable=hide_bar())]
    started = "" if not warm else OF_PROPOSALS
    if begin is not None:
        started = f"{start_in_words(begin, dataset.image_ids, start)} {OF_A_FILE}"
    return Sweep(rows, list(seeds), len(dataset), batch_size, str(detector.device), started)


def _predict(
    detector: DiffusionDet,
    batches: DataLoader[Any],
    runs: Sequence[_Run],
    start: Mapping[int | str, Tensor] | None,
) -> None:
    """Fill the runs, all with a batch before the next, so that what disturbs the clock disturbs all alike."""
    passes = sum(run.sampler.steps for run in runs)
    bar = tqdm(total=passes * len(batches.dataset), desc="sweep", unit="pass", leave=False, disable=hide_bar())  # type: ignore[arg-type]
    for batch in batches:
        images, targets = collate(batch)
        ids = [target["image_id"] for target in targets]
        began = _now(detector.device)
        encoded = detector.encode(images)
        features = _now(detector.device) - began
        done: dict[tuple[int, BoxSampler], tuple[list[dict[str, Tensor]], float]] = {}
        for run in runs:
            same = run.seed, _without_idle(run.sampler)
            if same not in done:
                seeds = [sample_seed(run.seed, image_id) for image_id in ids]
                began = _now(detector.device)
                warm = None if run.sampler.start_time is None else start
                boxes = None if warm is None else starts_of(detector, run.sampler, warm, ids)
                found = detector.predict(images, seeds=seeds, sampler=run.sampler, encoded=encoded, start=boxes)
                done[same] = found, (features + _now(detector.device) - began) / len(ids)
            found, seconds = done[same]
            run.seconds.append(seconds)
            for image_id, detections in zip(ids, found, strict=True):
                run.detections[image_id] = {name: value.cpu() for name, value in detections.items()}
            bar.update(run.sampler.steps * len(ids))
    bar.close()


def _without_idle(sampler: BoxSampler) -> BoxSampler:
    """Equal for settings that predict the same: what happens between steps does nothing in a single one."""
    if sampler.steps > 1:
        return sampler
    kept = ("num_boxes", "nms_threshold", "box_voting", "spread", "start_time")
    return BoxSampler(1, **{name: getattr(sampler, name) for name in kept})


def _now(device: torch.device) -> float:
    """The time in seconds, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _row(runs: Sequence[_Run], evaluator: CocoEvaluator) -> SweepRow:
    """The scores of one combination, given its runs, one per seed."""
    metrics = []
    for run in runs:
        evaluator.reset()
        evaluator.update(list(run.detections), list(run.detections.values()))
        evaluator.gather()
        metrics.append(evaluator.compute().metrics)
    seconds = statistics.median(itertools.chain(*gather([[x for run in runs for x in run.seconds]])))
    ap, ap50 = (Score([found[name] for found in metrics]) for name in ("AP", "AP50"))
    return SweepRow(runs[0].sampler, ap, ap50, seconds)
