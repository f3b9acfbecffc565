"""Segments of a picture from its features alone, without any label (DiffCut, arXiv 2406.02842)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from diffperception.data.images import load_images, resize_short_side
from diffperception.data.listing import list_images
from diffperception.data.masks import IGNORE_INDEX
from diffperception.devices import Precision, autocast, hide_bar, pick_device
from diffperception.echo import echo_remark
from diffperception.files import png_names, write_csv
from diffperception.models.base import fingerprint
from diffperception.resumable import Item, ResumableFolder, content_of
from diffperception.segmentation.features import FeatureExtractor
from diffperception.segmentation.maps import FeatureMaps
from diffperception.segmentation.normalized_cut import recursive_cuts
from diffperception.visualization.draw import save_png, to_pil
from diffperception.visualization.panels import mask_overlay


@dataclass
class CutOptions:
    """How a picture is cut into segments.

    Args:
        threshold: no segment is cut in two where the normalised cut, 0..2, costs more than this: tau, 0.5 in the paper
            for Stable Diffusion's features; the smaller, the fewer segments.
        exponent: affinities are cosines, those below 0 being 0, to this power: alpha, 10 in the paper.
        cells: places, evenly spread, whose features are compared; the time grows with their third power.
        centred: take the mean of a picture's features from them first. The features of small generators have much in
            common wherever they look, so that all cosines are near 1; with it, exponents of 1 to 4 do.
    """

    threshold: NonNegativeFloat = 0.5
    exponent: NonNegativeFloat = 10.0
    cells: PositiveInt = 1024
    centred: bool = False


def segment_by_cuts(maps: FeatureMaps, options: CutOptions = CutOptions()) -> Tensor:  # noqa: B008 (not changed)
    """Segments (H, W) int64, numbered from 0, of a picture with these features.

    Places on a grid are grouped by recursive normalised cuts of their affinities; then every pixel goes to the group
    whose mean direction its features are nearest to. Of several maps the mean cosine counts. The paper's refinement by
    colours (PAMR) is left out.
    """
    maps = maps.cropped()
    maps = maps.centred() if options.centred else maps
    directions = maps.directions(grid_points(maps, options.cells)).double().cpu()
    affinity = (directions @ directions.T).clamp(0, 1).numpy() ** options.exponent
    np.fill_diagonal(affinity, 1)  # of features that are all 0 too
    groups = torch.from_numpy(recursive_cuts(affinity, options.threshold))
    means = torch.stack([directions[groups == k].mean(0) for k in range(int(groups.max()) + 1)])
    return maps.cosines(means.to(maps.maps[0])).argmax(0)


def grid_points(maps: FeatureMaps, cells: int) -> Tensor:
    """Pixels (n, 2), the middles of equal rectangles: about as many as the finest map has cells, but no more than so.

    ValueError for fewer than two.
    """
    height, width = maps.size
    finest = min(maps.strides)
    share = min(1.0, math.sqrt(cells / ((height / finest) * (width / finest))))
    counts = [max(1, math.floor(side / finest * share)) for side in maps.size]
    if counts[0] * counts[1] < 2:
        raise ValueError(
            f"a picture of {height} x {width} pixels has a single cell of features: enlarge it, or read finer maps"
        )
    rows, columns = (
        ((torch.arange(count) + 0.5) * (side / count)).long() for count, side in zip(counts, maps.size, strict=True)
    )
    return torch.cartesian_prod(rows, columns).to(maps.maps[0].device)


def match_segments(segments: Tensor, mask: Tensor) -> Tensor:
    """The class (H, W) of each segment by Hungarian matching with those of a mask, -1 for segments without one.

    One segment goes to each class of the mask, such that the sum of their IoUs is the largest. Pixels that the mask
    ignores do not count.
    """
    labelled = mask != IGNORE_INDEX
    classes, truth = mask[labelled].unique(return_inverse=True)
    count = int(segments.max()) + 1
    both = torch.bincount(truth * count + segments[labelled], minlength=len(classes) * count).view(-1, count).double()
    iou = both / (both.sum(1, keepdim=True) + both.sum(0) - both).clamp(min=1)
    of_class, of_segment = linear_sum_assignment(-iou.numpy())
    found = torch.full((count,), -1)
    found[torch.from_numpy(of_segment)] = classes[torch.from_numpy(of_class)]
    return found[segments]


class HungarianIoU:
    """Mean IoU of segments without names over any number of pictures, each matched by :func:`match_segments`."""

    def __init__(self, num_classes: int) -> None:
        # The last column counts pixels of segments without a class.
        self.confusion = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.segments: list[int] = []

    def update(self, segments: Tensor, mask: Tensor) -> None:
        """Count a picture's segments (H, W), numbered from 0, and its mask of classes, 255 for none."""
        labelled = mask != IGNORE_INDEX
        num_classes = len(self.confusion)
        found = match_segments(segments, mask)[labelled]
        columns = torch.where(found < 0, num_classes, found)
        pairs = torch.bincount(mask[labelled] * (num_classes + 1) + columns, minlength=self.confusion.numel())
        self.confusion += pairs.view_as(self.confusion)
        self.segments.append(len(segments.unique()))

    def per_class(self) -> list[float]:
        """IoU of each class, NaN where it is in no mask."""
        hit = self.confusion.diag().double()
        union = self.confusion.sum(1) + self.confusion[:, :-1].sum(0) - self.confusion.diag()
        return (hit / union).tolist()

    def mean(self) -> float:
        """Of the classes that are in a mask."""
        return float(np.nanmean(self.per_class()))


def hungarian_iou(
    features: FeatureExtractor, samples: Iterable[tuple[Tensor, Tensor]], num_classes: int, options: CutOptions
) -> HungarianIoU:
    """Score segments of images (3, H, W) beside their masks (h, w), at the masks' size."""
    counts = HungarianIoU(num_classes)
    for image, mask in samples:
        segments = segment_by_cuts(features.maps(image), options).cpu()
        counts.update(resize_labels(segments, (mask.shape[0], mask.shape[1])), mask)
    return counts


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (H, W), int64, at another size: each pixel that of the nearest."""
    if labels.shape == size:
        return labels
    rows, columns = (
        ((torch.arange(wanted) + 0.5) * (have / wanted)).long() for have, wanted in zip(labels.shape, size, strict=True)
    )
    return labels[rows][:, columns]


@dataclass(frozen=True)
class CutReport:
    """How many segments each image has, by its name, and what is wrong with images that were left out."""

    segments: dict[str, int]
    broken: list[str]


def cut_folder(
    features: FeatureExtractor,
    images: str | Path,
    output: str | Path,
    cut: CutOptions = CutOptions(),  # noqa: B008 (not changed)
    short_side: PositiveInt | None = None,
    num_pictures: NonNegativeInt = 100,
    workers: NonNegativeInt = 2,
    device: str = "auto",
    precision: Precision = "32",
    overwrite: bool = False,
) -> CutReport:
    """Cut images into segments by features alone, without any label.

    Writes OUTPUT/masks (PNG, in each pixel its segment's number, which means nothing beyond its image), OUTPUT/overlays
    (the images with their segments in colours) and OUTPUT/segments.csv. The command can be interrupted: given again, it
    goes on with the images that are missing. Images that cannot be read are left out and named at the end.

    Args:
        features: what gives the maps: DiffusionFeatures, TimmFeatures, RGBFeatures, or a class of your own.
        output: folder for the masks.
        cut: how they are cut.
        short_side: images are cut at this short side, and their segments brought back to their own size.
        num_pictures: draw the overlays of at most this many images.

    Raises:
        FileNotFoundError, ValueError: there is no such image, none can be read, or one is too small to be cut.
    """
    place = pick_device(device)
    features, folder = features.to(place), ResumableFolder(output, overwrite)
    root, paths, remark = list_images(images, leave_out=Path(output))
    echo_remark(remark)
    settings: dict[str, Any] = {"command": "segment", "features": fingerprint(features), "cut": vars(cut)}
    settings |= {"images": str(Path(images).absolute()), "short_side": short_side, "precision": precision}
    pngs, drawn = png_names(path.relative_to(root) for path in paths), set(paths[:num_pictures])
    of_item: dict[Item, Path] = {}
    for path in paths:
        kinds = ("masks", "overlays") if path in drawn else ("masks",)
        files = tuple((Path(kind) / pngs[path.relative_to(root)]).as_posix() for kind in kinds)
        of_item[Item(path.relative_to(root).as_posix(), content_of(path), files)] = path
    left = folder.left_of(settings, list(of_item))
    folder.begin(["segments.csv"])
    samples = load_images([of_item[item] for item in left], workers=workers)
    with autocast(place, precision):
        for item, (sample,) in tqdm(
            zip(left, samples, strict=True), "segment", len(left), unit="image", disable=hide_bar()
        ):
            if sample.image is None:
                folder.add(item, [], sample.problem)
                continue
            maps = features.maps(resize_short_side(sample.image, short_side))
            size = (sample.image.shape[1], sample.image.shape[2])
            segments = resize_labels(segment_by_cuts(maps, cut).cpu(), size)
            number = int(segments.max()) + 1
            mask, *overlays = map(folder.file, item.files)
            save_png(Image.fromarray(segments.numpy().astype(np.uint8 if number <= 256 else np.uint16)), mask)
            for overlay in overlays:
                save_png(to_pil(mask_overlay(sample.image, segments % (IGNORE_INDEX - 1) + 1)), overlay)
            folder.add(item, item.files, number)
    found = dict(zip((item.name for item in of_item), folder.results(of_item), strict=True))
    report = CutReport(
        {name: number for name, number in found.items() if isinstance(number, int)},
        [problem for problem in found.values() if isinstance(problem, str)],
    )
    if not report.segments:
        raise ValueError(f"no image can be read: {report.broken[0]}")
    rows = [[name, str(number)] for name, number in report.segments.items()]
    write_csv(folder.file("segments.csv"), ["image", "segments"], rows)
    return report
