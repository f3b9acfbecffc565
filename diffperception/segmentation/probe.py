"""Which timesteps and blocks a data set needs, by a quick linear probe of each."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffperception.data.masks import IGNORE_INDEX
from diffperception.devices import Precision, autocast
from diffperception.files import OutputFolder, write_json
from diffperception.segmentation.evaluator import MeanIoU
from diffperception.segmentation.features import DiffusionFeatures
from diffperception.segmentation.pixels import check_size, checked_masks
from diffperception.table import format_table
from diffperception.visualization.curves import heat_map
from diffperception.visualization.draw import save_png

RIDGE = 1e-2  # weight of the penalty beside the mean square of standardised features
FOLDS = 2
SUGGESTED = {"block": 4, "timestep": 3}  # how many of each
SHOWN = 15


@dataclass(frozen=True)
class ProbeScore:
    """How well a linear classifier on one block at one timestep does on images that it was not fitted to."""

    timestep: float
    block: int | str
    miou: float
    channels: int
    stride: int


def probe_features(
    features: DiffusionFeatures,
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    num_classes: int,
    seconds: float = 600.0,
    pixels: int = 2000,
    seed: int = 0,
    names: Sequence[str] | None = None,
    precision: Precision = "32",
) -> list[ProbeScore]:
    """Rank the timesteps x blocks of an extractor, best first.

    The classes of sampled pixels of half of the images are learned by ridge regression, which is scored on those of the
    other half; and the other way round.

    Args:
        features: all candidates.
        images: (3, H, W) each, 0..1; at least two.
        masks: (H, W) each, 0..K-1 or 255.
        seconds: no timestep is begun that would pass this limit; the first always is.
        pixels: sampled from each image, as many of one class as of another where there are enough.
        seed: seed of the sampling.
        names: names of the images, for messages.

    Raises:
        ValueError: there are fewer than two labelled images, or masks do not fit.
    """
    names = names or [f"image {i}" for i in range(len(masks))]
    masks, _ = checked_masks(images, masks, [str(k) for k in range(num_classes)], 1, names)
    for image, mask, name in zip(images, masks, names, strict=True):
        check_size(image, mask, name)
    generator = torch.Generator().manual_seed(seed)
    most = max(len(set(mask.unique().tolist()) - {IGNORE_INDEX}) for mask in masks)
    if pixels < most:
        raise ValueError(f"there are images of {most} classes: look at {most} or more pixels per image, not {pixels}")
    points = [_sample(mask, pixels, generator) for mask in masks]
    used = [i for i, place in enumerate(points) if len(place)]
    if len(used) < FOLDS:
        raise ValueError(
            "probing needs at least 2 images with labelled pixels, for it tries on some what it learns on others, but"
            f" of {len(masks)} there {'is' if len(used) == 1 else 'are'} {len(used)}"
        )
    labels = [masks[i][tuple(points[i].T)].long() for i in used]
    scores, start = [], time.monotonic()
    timesteps = tqdm(features.reader.timesteps, "probe", unit="timestep", leave=False, disable=None)
    for number, timestep in enumerate(timesteps):
        spent = time.monotonic() - start
        if number and spent + spent / number > seconds:
            break
        tried = features.at_timestep(number)
        with autocast(features.device, precision):
            sampled = [tried.maps(images[i]).at_points(points[i].to(tried.device)).cpu() for i in used]
        by_block = zip(*(values.split([info.channels for info in tried.info], 1) for values in sampled), strict=True)
        for block, info, values in zip(tried.reader.blocks, tried.info, by_block, strict=True):
            miou = _probe(values, labels, num_classes)
            scores.append(ProbeScore(timestep, block, miou, info.channels, info.stride))
    return sorted(scores, key=lambda score: -score.miou)


def expected_seconds(features: DiffusionFeatures, images: Sequence[Tensor], precision: Precision = "32") -> float:
    """What the features of all images (3, H, W) take at one timestep, judged by the first image's."""
    start = time.monotonic()
    with autocast(features.device, precision):
        features.at_timestep(0).maps(images[0])
    return (time.monotonic() - start) * sum(image.numel() for image in images) / images[0].numel()


def suggest(scores: Sequence[ProbeScore]) -> dict[str, list[Any]]:
    """The blocks and the timesteps with the best mean mIoU over the others, each in ascending order."""
    best = {}
    for kind, count in SUGGESTED.items():
        values: dict[Any, list[float]] = {}
        for score in scores:
            values.setdefault(getattr(score, kind), []).append(score.miou)
        chosen = sorted(values, key=lambda value: -statistics.fmean(values[value]))[:count]
        best[f"{kind}s"] = sorted(chosen, key=lambda value: (isinstance(value, str), value))
    return best


def probe_table(scores: Sequence[ProbeScore]) -> str:
    """The best ones, a line each."""
    rows = [(f"{s.timestep:g}", s.block, s.channels, s.stride, f"{100 * s.miou:.1f}") for s in scores[:SHOWN]]
    table = format_table(rows, ["timestep", "block", "channels", "stride", "mIoU"])
    return table + (f"\n... and {len(scores) - SHOWN} others" if len(scores) > SHOWN else "")


def write_probe(scores: Sequence[ProbeScore], features: DiffusionFeatures, folder: OutputFolder) -> None:
    """probe.json (all scores and the suggested options; null where undefined) and probe.png (a heat map)."""
    rows = [asdict(score) for score in scores]
    write_json(folder.file("probe.json"), {"suggested": suggest(scores), "scores": rows})
    found = {(score.timestep, score.block): score.miou for score in scores}
    blocks = features.reader.blocks
    values = {f"{t:g}": [found[t, b] for b in blocks] for t in features.reader.timesteps if (t, blocks[0]) in found}
    title, axes = "mIoU of a linear classifier in percent", ("timestep", "decoder block")
    picture = heat_map(list(values.values()), list(values), list(map(str, blocks)), title, axes)
    save_png(picture, folder.file("probe.png"))


def _sample(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(N, 2) rows and columns of labelled pixels, drawn without replacement from the classes in equal shares."""
    order = torch.randperm(mask.numel(), generator=generator)
    shuffled = mask.flatten()[order]
    present = [label for label in shuffled.unique().tolist() if label != IGNORE_INDEX]
    share = count // max(1, len(present))
    chosen = [order[(shuffled == label).nonzero()[:share, 0]] for label in present]
    flat = torch.cat([torch.empty(0, dtype=torch.int64), *chosen])
    return torch.stack([flat // mask.shape[1], flat % mask.shape[1]], 1)


def _probe(features: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int) -> float:
    """mIoU over images, features (N, C) and labels (N,), each predicted by the ridge regression of the other fold."""
    score = MeanIoU(num_classes)
    for fold in range(FOLDS):
        fitted = [i for i in range(len(labels)) if i % FOLDS != fold]
        x = torch.cat([features[i] for i in fitted])
        mean, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
        x = F.pad((x - mean) / scale, (0, 1), value=1.0)  # standardised features and a one
        wanted = F.one_hot(torch.cat([labels[i] for i in fitted]), num_classes).float()
        weight = torch.linalg.solve(x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1]), x.T @ wanted)  # (C + 1, K)
        for i in range(fold, len(labels), FOLDS):
            rows = F.pad((features[i] - mean) / scale, (0, 1), value=1.0)
            score.update((rows @ weight).argmax(1), labels[i])
    return score.mean()
