"""Which pixel of one picture is which of another, from features alone (DIFT, arXiv 2306.03881)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from scipy.interpolate import RBFInterpolator
from torch import Tensor
from tqdm import tqdm

from diffperception.data.batches import spread
from diffperception.data.images import load_images, resize_short_side
from diffperception.data.listing import list_images
from diffperception.devices import Precision, autocast, hide_bar, pick_device
from diffperception.diffusion import name_seed
from diffperception.echo import echo_remark
from diffperception.files import OutputFolder, write_json
from diffperception.segmentation.features import DiffusionFeatures, FeatureExtractor, RGBFeatures, untrained
from diffperception.segmentation.maps import FeatureMaps
from diffperception.visualization.draw import save_png
from diffperception.visualization.panels import contact_sheet, draw_matches

MARGIN = 0.05  # of a side: how near to the border of its picture no point is asked for


def match_points(source: FeatureMaps, target: FeatureMaps, points: Tensor) -> Tensor:
    """Pixels (N, 2) of the target whose features are nearest to those of pixels (N, 2) of the source, by cosine.

    Of several maps the mean cosine counts. Points are rows and columns, int64; ValueError if one lies outside.
    """
    nearest = target.cosines(source.directions(points)).flatten(1).argmax(1)
    return torch.stack([nearest // target.size[1], nearest % target.size[1]], 1)


@dataclass
class WarpOptions:
    """Pairs of pictures whose correspondence is known: a picture, and the same warped and recoloured.

    Args:
        turn: degrees that pictures are turned by at most.
        scale: share by which they grow or shrink at most.
        bend: share of a side by which the nine control points of a thin-plate spline move at most.
        recolour: how far each channel's contrast and brightness change at most.
        points: pixels asked for in each picture, drawn where it changes: in proportion to its gradient.
        within: PCK counts points found within this share of the longer side.
    """

    turn: NonNegativeFloat = 30.0
    scale: NonNegativeFloat = 0.2
    bend: NonNegativeFloat = 0.08
    recolour: NonNegativeFloat = 0.2
    points: PositiveInt = 32
    within: NonNegativeFloat = 0.1


@dataclass(frozen=True)
class Pair:
    """A warped picture, points in it, and where they are in the original."""

    original: Tensor  # (3, H, W), 0..1
    warped: Tensor  # (3, H, W)
    points: Tensor  # (N, 2) rows and columns in the warped picture
    truth: Tensor  # (N, 2) float, in the original


def warped_pair(image: Tensor, options: WarpOptions, seed: int) -> Pair:
    """A picture (3, H, W; 0..1) warped by a turn, a scale and a thin-plate spline; ValueError if nothing is left."""
    random = np.random.default_rng(seed)
    height, width = image.shape[1:]
    # Of every pixel of the warped picture where it comes from, in units of half a side, -1..1.
    control = np.stack(np.meshgrid(*[np.linspace(-1, 1, 3)] * 2, indexing="ij"), -1).reshape(-1, 2)
    angle, scale = np.deg2rad(options.turn) * random.uniform(-1, 1), 1 + options.scale * random.uniform(-1, 1)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    sides = np.array([height, width])
    moved = (control * sides) @ turn.T / sides + 2 * options.bend * random.uniform(-1, 1, control.shape)
    rows, columns = ((2 * np.arange(side) + 1) / side - 1 for side in sides)
    pixels = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
    found = RBFInterpolator(control, moved, kernel="thin_plate_spline")(pixels.reshape(-1, 2))
    origin = torch.from_numpy(found).view(height, width, 2)
    warped = F.grid_sample(image[None], origin.flip(-1)[None].float(), padding_mode="reflection", align_corners=False)[
        0
    ]
    gain, shift = (torch.from_numpy(options.recolour * random.uniform(-1, 1, (3, 1, 1))).float() for _ in range(2))
    warped = ((warped - 0.5) * (1 + gain) + 0.5 + shift / 2).clamp(0, 1)
    points = _where_it_changes(warped, origin, options.points, random)
    place = origin[points[:, 0], points[:, 1]]
    return Pair(image, warped, points, ((place + 1) * torch.from_numpy(sides) - 1) / 2)


def _where_it_changes(warped: Tensor, origin: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """Pixels (count, 2) that are in the original too, in proportion to the gradient."""
    grey = warped.mean(0)
    down, across = (grey.diff(dim=axis).abs() for axis in (0, 1))
    weight = F.pad(down, (0, 0, 0, 1)) + F.pad(across, (0, 1))
    inside = (origin.abs() < 1 - 2 * MARGIN).all(-1)
    weight = (weight + 1e-6) * inside
    if not inside.any():
        raise ValueError("nothing of the picture is left where it is warped to: give a smaller turn, scale or bend")
    share = (weight / weight.sum()).double().flatten().numpy()
    chosen = torch.from_numpy(random.choice(share.size, count, p=share / share.sum()))
    return torch.stack([chosen // warped.shape[2], chosen % warped.shape[2]], 1)


def pck(found: Tensor, truth: Tensor, size: tuple[int, int], within: float = 0.1) -> float:
    """The share of points (N, 2) that lie no farther from the truth than this share of the longer side."""
    distance = (found.cpu().double() - truth.double()).norm(dim=1)
    return (distance <= within * max(size)).double().mean().item()


def measure_matches(
    features: FeatureExtractor, pairs: Sequence[Pair], within: float = 0.1, title: str = "match"
) -> tuple[float, list[Tensor]]:
    """The mean PCK of pairs, and the points found in each original."""
    found = []
    for pair in tqdm(pairs, title, unit="pair", leave=False, disable=hide_bar()):
        original, warped = features.maps(pair.original), features.maps(pair.warped)
        found.append(match_points(warped, original, pair.points.to(features.device)).cpu())
    scores = [
        pck(f, p.truth, (p.original.shape[1], p.original.shape[2]), within) for f, p in zip(found, pairs, strict=True)
    ]
    return sum(scores) / len(scores), found


@dataclass(frozen=True)
class MatchReport:
    """The mean PCK of each kind of features, by its title, and what is wrong with pictures that were left out."""

    pck: dict[str, float]
    pairs: int
    broken: list[str] = field(default_factory=list)


def controls(features: FeatureExtractor) -> dict[str, FeatureExtractor]:
    """What any features should beat: the network with random weights, where it is a generator's, and the colours."""
    random = {"untrained network": untrained(features)} if isinstance(features, DiffusionFeatures) else {}
    return {**random, "colours": RGBFeatures().to(features.device)}


def match_folder(
    features: FeatureExtractor,
    images: str | Path,
    output: str | Path | None = None,
    warp: WarpOptions = WarpOptions(),  # noqa: B008 (not changed)
    max_images: PositiveInt | None = 100,
    short_side: PositiveInt | None = None,
    num_pictures: NonNegativeInt = 4,
    workers: NonNegativeInt = 2,
    seed: NonNegativeInt = 0,
    device: str = "auto",
    precision: Precision = "32",
    overwrite: bool = False,
) -> MatchReport:
    """How well features find the same point in a warped picture, beside colours and an untrained network.

    Every picture is warped by a known turn, scale and thin-plate spline, and recoloured; points of the warped picture
    are looked for in the original by the nearest features. PCK is the share found near enough.

    Args:
        features: what gives the maps: DiffusionFeatures, TimmFeatures, RGBFeatures, or a class of your own. Of several
            maps the mean cosine counts.
        output: folder for matches.json and matches.png, the first pairs with what was found; nothing is written
            without it.
        warp: how pictures are warped, and which points are asked for.
        max_images: so many of the pictures, evenly spread; null for all.
        short_side: resize the pictures to this short side first.
        num_pictures: how many pairs are drawn.
        seed: of the warps; that of a picture hangs on this and its name.

    Raises:
        FileNotFoundError, ValueError: there is no such picture, or none can be read.
    """
    results = None if output is None else OutputFolder(output, overwrite)
    place = pick_device(device)
    features = features.to(place)
    root, paths, remark = list_images(images, leave_out=None if output is None else Path(output))
    echo_remark(remark)
    chosen = [paths[i] for i in spread(len(paths), max_images)]
    samples = [sample for (sample,) in load_images(chosen, workers=workers)]
    broken = [sample.problem for sample in samples if sample.image is None]
    pairs = [
        warped_pair(resize_short_side(s.image, short_side), warp, name_seed(seed, s.path.relative_to(root).as_posix()))
        for s in samples
        if s.image is not None
    ]
    if not pairs:
        raise ValueError(f"no image can be read: {broken[0]}")
    scores: dict[str, float] = {}
    with autocast(place, precision):
        scores["features"], found = measure_matches(features, pairs, warp.within, "features")
        for title, extractor in controls(features).items():
            scores[title] = measure_matches(extractor, pairs, warp.within, title)[0]
    report = MatchReport(scores, len(pairs), broken)
    if results is not None:
        results.clear()
        _write(report, pairs[:num_pictures], found, warp, results)
    return report


def _write(
    report: MatchReport, pairs: Sequence[Pair], found: Sequence[Tensor], warp: WarpOptions, results: OutputFolder
) -> None:
    settings: dict[str, Any] = {"pck": report.pck, "pairs": report.pairs, "warp": vars(warp)}
    write_json(results.file("matches.json"), settings)
    if pairs:
        drawn = []
        for pair, places in zip(pairs, found, strict=False):
            right = (places.double() - pair.truth.double()).norm(dim=1) <= warp.within * max(pair.original.shape[1:])
            drawn.append(draw_matches(pair.warped, pair.original, pair.points, places, right))
        save_png(contact_sheet(drawn), results.file("matches.png"))
