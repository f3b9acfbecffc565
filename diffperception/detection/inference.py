"""Scoring a detector on a data set, in one process or in several. No lightning here: it is what `evaluate` runs."""

import inspect
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from diffperception.data import CocoDetection
from diffperception.data.batches import collate
from diffperception.detection import Detector
from diffperception.detection.evaluator import CocoEvaluator, CocoResult
from diffperception.detection.lvis import LvisEvaluator
from diffperception.diffusion import sample_seed

Protocol = Literal["coco", "lvis"]
EVALUATORS: dict[Protocol, type[CocoEvaluator]] = {"coco": CocoEvaluator, "lvis": LvisEvaluator}


def evaluate_detector(
    detector: Detector,
    dataset: CocoDetection,
    images: int | None = None,
    batch_size: int = 8,
    workers: int = 0,
    max_dets: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    protocol: Protocol = "coco",
) -> CocoResult:
    """COCO metrics of `detector`, which is left in evaluation mode.

    The noise of an image depends on `seed` and its id alone, so AP depends neither on the batch size nor on the number
    of processes. Every process must call this; each predicts its share of the images and returns the score of all.

    Args:
        images: use this many images, spread over the data set; all by default.
        batch_size: images in one prediction.
        workers: processes that read images, for each process that predicts.
        max_dets: how many detections count in an image; the protocol's number by default.
        options: for `detector.predict`, such as `steps` and `num_boxes`, or DiffusionDet's `options`.
        protocol: whose rules the score follows.

    Raises:
        ValueError: the detector has other classes than the data set, or knows no such option; or the annotations are
            not what the protocol needs.
    """
    require_classes(detector.classes, dataset)
    options = dict(options or {})
    require_options(detector, options)
    share_statistics(detector)
    chosen = spread(len(dataset), images)
    evaluator = EVALUATORS[protocol](dataset.annotations, max_dets, [dataset.image_ids[i] for i in chosen])
    batches = share_of_batches(dataset, chosen, batch_size, workers)
    detector.eval()
    with torch.no_grad():
        for batch, targets in tqdm(batches, desc="evaluate", leave=False, disable=hide_bar()):
            ids = [target["image_id"] for target in targets]
            seeds = [sample_seed(seed, image_id) for image_id in ids]
            on_device = [image.to(detector.device) for image in batch]
            evaluator.update(ids, detector.predict(on_device, seeds=seeds, **options))
    evaluator.gather()
    return evaluator.compute()


def share_of_batches(dataset: CocoDetection, chosen: Sequence[int], batch_size: int, workers: int) -> DataLoader[Any]:
    """Batches (images, targets) of those of the chosen images that this process predicts."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = Subset(dataset, chosen[rank::processes])
    return DataLoader(share, batch_size, num_workers=workers, collate_fn=collate, worker_init_fn=ignore_interrupts)


def hide_bar() -> bool | None:
    """For tqdm's `disable`: the first of several processes has a bar, and that only in a terminal."""
    return True if dist.is_initialized() and dist.get_rank() else None


def require_classes(classes: Sequence[str], dataset: CocoDetection) -> None:
    """ValueError that names the difference unless the model's classes are the annotation file's."""
    if list(classes) == dataset.classes:
        return
    if list(classes) == [str(label) for label in range(len(dataset.classes))]:
        raise ValueError(
            f"the model's {len(classes)} classes are numbers, as the checkpoint it was converted from has no names:"
            f" convert it again with --annotations {dataset.annotations}, if it was trained for those categories"
        )
    raise ValueError(
        f"the model has {len(classes)} classes ({_short(classes)}), but {dataset.annotations} has"
        f" {len(dataset.classes)} ({_short(dataset.classes)}): use the annotations it was trained for, or train it anew"
    )


def require_options(detector: Detector, options: Mapping[str, Any]) -> None:
    """ValueError if `detector.predict` has no such options."""
    unknown = options.keys() - inspect.signature(detector.predict).parameters.keys()
    if unknown:
        raise ValueError(f"{type(detector).__name__} has no option {', '.join(sorted(unknown))} in prediction")


def share_statistics(detector: Detector) -> None:
    """Give all processes the first one's statistics of batch norm, which each has gathered from batches of its own."""
    if dist.is_initialized():
        for buffer in detector.buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, 0)


def spread(total: int, wanted: int | None) -> list[int]:
    """`wanted` of the indices 0..total-1, evenly spread; all if None."""
    count = min(total, wanted or total)
    return [i * total // count for i in range(count)]


def join_processes() -> None:
    """Connect to the other processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def ignore_interrupts(worker: int) -> None:
    """For workers that read images: Ctrl-C reaches them too, but it is the main process that ends the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
