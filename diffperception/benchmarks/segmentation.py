"""Pixel classifiers at the reference's sizes, against the dense way in the same process.

The dense way is the reference's: the features of all pixels are upsampled and kept, members are plain networks that
train one after the other on minibatches indexed from them with `torch.optim.Adam` as it comes, and predict one after
the other. Both ways get the same maps, float32 arithmetic and the same number of minibatches.
"""

import itertools
import multiprocessing
import os
import resource
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import timer  # waits for the accelerator, where there is one

from diffperception.benchmarks.timing import Say, best_seconds
from diffperception.models import FeatureInfo
from diffperception.segmentation import FeatureExtractor, FeatureMaps, PixelEnsemble
from diffperception.segmentation.ensemble import combine_members
from diffperception.segmentation.mlp import hidden_widths
from diffperception.segmentation.pixels import LabelledPixels
from diffperception.table import format_table
from diffperception.training import FitOptions, fit_ensemble
from diffperception.training.options import TrainerOptions

SIDE = 256
BLOCKS = [(1024, 8), (512, 8), (512, 8), (512, 4), (256, 2)]  # channels and stride; three timesteps have them
MEMBERS, CLASSES, IMAGES = 10, 20, 50
MINIBATCHES = 100  # that each member trains on, measured
TRAINED = 1000  # minibatches a member in the comparison for all images
GIB = 2**30


@dataclass(frozen=True)
class Comparison:
    """Seconds of the dense way and of ours, and how many times faster ours must be (None: nothing is promised)."""

    name: str
    dense: float
    ours: float
    target: float | None = None


class RandomMaps(FeatureExtractor):
    """Maps of the reference's shapes, the same random ones for every image."""

    def __init__(self) -> None:
        super().__init__([FeatureInfo(f"stride {stride}", channels, stride) for channels, stride in 3 * BLOCKS], 8)
        generator = torch.Generator().manual_seed(0)
        for number, info in enumerate(self.info):
            side = SIDE // info.stride
            self.register_buffer(f"drawn{number}", torch.randn(1, info.channels, side, side, generator=generator))

    def encode(self, images: Tensor) -> list[Tensor]:
        return list(self.buffers())


def time_pixel_classifiers(repeats: int, say: Say, device: torch.device | str = "cpu") -> str:
    """The table of both ways, which takes minutes, and the peak memory of ours.

    Args:
        repeats: the best of so many predictions counts.
    """
    say(f"memory: {IMAGES} images, in a process of its own")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        memory = pool.apply(peak_memory, (torch.get_num_threads(),))
    return report(*compare_ways(repeats, MINIBATCHES, say, device), memory)


def report(comparisons: list[Comparison], difference: float, memory: float) -> str:
    """Speeds, the largest difference of logits, and the peak memory in GiB, as text."""
    rows = [(c.name, f"{c.dense:.3f}", f"{c.ours:.3f}", f"{c.dense / c.ours:.1f}", c.target or "") for c in comparisons]
    return (
        f"{format_table(rows, ['seconds', 'dense', 'ours', 'ratio', 'at least'])}\n"
        f"largest difference of logits: {difference:.1e} (at most 1e-05)\n"
        f"peak memory of preparing, training and predicting with {IMAGES} images: {memory:.2f} GiB"
        " (at most 4 GB, 3.73 GiB)"
    )


def compare_ways(
    repeats: int, minibatches: int, say: Say, device: torch.device | str = "cpu"
) -> tuple[list[Comparison], float]:
    """Speeds, and the largest difference of logits; each member trains on so many minibatches."""
    features = RandomMaps().to(device)
    images = _images_that_fit(features.channels)
    masks = _masks(images)
    say(f"training, the dense way: {images} images, {MEMBERS} x {minibatches} minibatches")
    dense, networks = _train_densely(features, masks, minibatches)
    say("training, ours")
    ours, ensemble = _train(features, masks, minibatches)
    # Preparing grows with the images, training with the minibatches.
    whole = [way[0] * IMAGES / images + way[1] * TRAINED / minibatches for way in (dense, ours)]
    rows = [
        Comparison("prepare an image", dense[0] / images, ours[0] / images),
        Comparison(f"a minibatch of {MEMBERS} members", dense[1] / minibatches, ours[1] / minibatches),
        Comparison(f"train: {images} images, {minibatches} minibatches a member", sum(dense), sum(ours)),
        Comparison(f"so {IMAGES} images, {TRAINED} minibatches would take", whole[0], whole[1], target=5),
    ]
    say("predicting, both ways")
    copied = [_member(ensemble, index) for index in range(MEMBERS)]
    maps = features.maps(torch.zeros(3, SIDE, SIDE))
    logits = _predict_densely(copied, maps)[1]
    difference = float((logits.view(MEMBERS, SIDE, SIDE, -1).permute(0, 3, 1, 2) - ensemble.logits(maps)).abs().max())
    slow, fast = best_seconds([lambda: _predict_densely(networks, maps), lambda: ensemble.segment(maps)], repeats)
    return [*rows, Comparison("predict an image", slow, fast, target=10)], difference


def peak_memory(threads: int) -> float:
    """GiB that this process has at most taken after preparing, training (a little) and predicting the whole task."""
    torch.set_num_threads(threads)
    features = RandomMaps()
    _train(features, _masks(IMAGES), 20)[1].segment(features.maps(torch.zeros(3, SIDE, SIDE)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB * (1 if sys.platform == "darwin" else 1024)


def _images_that_fit(channels: int) -> int:
    """Images whose dense features take half of the memory, the copies made on the way included; at most 4."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    image = 4 * channels * SIDE * SIDE
    return min(4, max(1, int(memory / 2 / image) - 2))


def _masks(count: int) -> list[Tensor]:
    return list(torch.randint(CLASSES, (count, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).to(torch.uint8))


def _train_densely(
    features: RandomMaps, masks: list[Tensor], minibatches: int
) -> tuple[tuple[float, float], list[nn.Sequential]]:
    """Seconds of preparing and of training, and the networks."""
    start = timer()
    rows = torch.empty(len(masks) * SIDE * SIDE, features.channels, device=features.device)
    for part in rows.split(SIDE * SIDE):
        part.copy_(features.maps(torch.zeros(3, SIDE, SIDE)).dense().flatten(1).T)
    labels = torch.cat([mask.flatten() for mask in masks]).long().to(rows.device)
    prepared = timer()
    networks = [_network(features.channels).to(rows.device) for _ in range(MEMBERS)]
    for network in networks:
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for _ in range(minibatches):
            drawn = torch.randint(len(rows), (64,), device=rows.device)
            optimizer.zero_grad()
            F.cross_entropy(network(rows[drawn]), labels[drawn]).backward()
            optimizer.step()
        network.eval()
    return (prepared - start, timer() - prepared), networks


def _train(features: RandomMaps, masks: list[Tensor], minibatches: int) -> tuple[tuple[float, float], PixelEnsemble]:
    """Seconds of preparing and of training with `fit_ensemble`, which does both, and the ensemble."""
    images, names = [torch.zeros(3, SIDE, SIDE)] * len(masks), ["image"] * len(masks)
    start = timer()
    LabelledPixels(features, images, masks, torch.float16, names)
    prepared = timer() - start
    start = timer()
    options = FitOptions(max_minibatches=minibatches, min_pixels=0)
    trainer = TrainerOptions(accelerator="cpu" if features.device.type == "cpu" else "gpu", devices=1)
    ensemble = fit_ensemble(features, images, masks, CLASSES, MEMBERS, options, trainer=trainer)
    return (prepared, timer() - start - prepared), ensemble


@torch.no_grad()
def _predict_densely(networks: list[nn.Sequential], maps: FeatureMaps) -> tuple[tuple[Tensor, ...], Tensor]:
    """What `PixelEnsemble.segment` returns, and the logits (M, 1, H W, K)."""
    rows = maps.dense().flatten(1).T
    logits = torch.stack([network(rows) for network in networks])[:, None]
    return combine_members(logits), logits


def _network(channels: int) -> nn.Sequential:
    widths = [channels, *hidden_widths(CLASSES)]
    hidden = ((nn.Linear(a, b), nn.ReLU(), nn.BatchNorm1d(b)) for a, b in itertools.pairwise(widths))
    return nn.Sequential(*itertools.chain(*hidden), nn.Linear(widths[-1], CLASSES))


def _member(ensemble: PixelEnsemble, index: int) -> nn.Sequential:
    """A member as a plain network."""
    network = _network(ensemble.channels)
    state = {name.removeprefix("layers."): value[index] for name, value in ensemble.mlps.state_dict().items()}
    network.load_state_dict(state, strict=False)  # but for the count of batches, which nothing uses
    return network.eval()
