"""Segmenting and scoring many images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffperception.data.batches import spread
from diffperception.data.images import LazyMap, load_images, read_ahead, read_image, to_float
from diffperception.data.listing import list_images
from diffperception.data.masks import MaskFolder
from diffperception.data.pairing import find_pairs
from diffperception.data.tiles import Tiling
from diffperception.devices import Precision, autocast, first_process, gather, hide_bar, share
from diffperception.echo import echo_remark
from diffperception.files import OutputFolder, png_names, safe_path, write_csv, write_json
from diffperception.models.base import fingerprint
from diffperception.resumable import Item, ResumableFolder, content_of
from diffperception.segmentation.ensemble import Segmentation
from diffperception.segmentation.evaluator import MeanIoU
from diffperception.segmentation.segmenter import PixelSegmenter
from diffperception.table import format_table
from diffperception.visualization.draw import save_png, to_pil
from diffperception.visualization.panels import (
    PANEL_SIDE,
    contact_sheet,
    mask_overlay,
    segmentation_panels,
    titled,
    uncertainty_map,
)

SHEET = 8  # images on the picture of the most uncertain


@dataclass(frozen=True)
class ImageScore:
    """An image's name, its uncertainty in nats, and the fraction of its pixels of each class."""

    name: str
    uncertainty: float
    fractions: list[float]


@dataclass(frozen=True)
class FolderScores:
    """Scores of the images that can be read, in their order, and what is wrong with the others, a sentence each."""

    scores: list[ImageScore]
    broken: list[str]

    @classmethod
    def of(cls, found: Sequence[dict[str, Any] | str]) -> "FolderScores":
        """From each score as a dictionary, or what is wrong with the image; ValueError if no image can be read."""
        scores, broken = (
            [ImageScore(**f) for f in found if isinstance(f, dict)],
            [f for f in found if isinstance(f, str)],
        )
        if not scores:
            raise ValueError(f"no image can be read: {broken[0]}")
        return cls(scores, broken)

    def ranked(self) -> list[ImageScore]:
        """The most uncertain first, and of equals the first."""
        return sorted(self.scores, key=lambda score: -score.uncertainty)


def segment_folder(
    model: PixelSegmenter | str | Path,
    images: str | Path,
    output: str | Path,
    rank: bool = False,
    labelled: Path | None = None,
    num_pictures: NonNegativeInt = 100,
    workers: NonNegativeInt = 2,
    precision: Precision = "32",
    overwrite: bool = False,
    tile: PositiveInt | None = None,
    overlap: NonNegativeInt | None = None,
) -> FolderScores:
    """Say of every pixel of an image, or of all images in a folder, which class it is.

    Writes OUTPUT/masks (PNG, in each pixel its class's number), OUTPUT/overlays (the images with their classes in
    colours), OUTPUT/uncertainty (where the members of the ensemble disagree) and OUTPUT/scores.csv: each image's
    uncertainty (in nats, the mean of its most uncertain tenth) and the fractions of the classes. scores.csv is written
    once all images are done. The command can be interrupted: given again, it goes on with the images that are missing,
    and does those anew that have changed. Images that cannot be read are left out and named at the end. Several
    processes, started by torchrun, share the images.

    Args:
        model: the segmenter, which computes where it is; or its file, for an accelerator if there is one.
        images: an image, a folder (its subfolders count too), a pattern in quotes such as 'photos/*.jpg', or a list in
            the images' folder: a COCO file, or a .txt file with a name per line.
        rank: order the images by their uncertainty: rank.csv has the most uncertain first, and rank.png shows the
            first of them, those to label next.
        labelled: folder of masks; images that have one there are left out.
        num_pictures: draw the overlays and uncertainties of at most this many images.
        tile: images that are larger than this, at the model's short side, are segmented in windows of so many pixels a
            side, so that memory does not grow with them; null takes them whole.
        overlap: pixels that neighbouring windows share at least, null for 64, or half of a small window; a pixel is
            that of the window in which it lies deeper.

    Raises:
        FileNotFoundError: there is no such image or folder.
        ValueError: the output folder holds something, or no image can be read; a single member cannot rank.
    """
    model, tiling = PixelSegmenter.loaded(model), Tiling(tile, overlap)
    root, paths, remark = list_images(images, leave_out=Path(output))
    paths = _without_mask(paths, root, labelled)
    if rank and model.classifier.members < 2:
        raise ValueError("a segmenter with a single member agrees with itself: to rank, train it with several")
    folder = ResumableFolder(output, overwrite)
    files = png_names(path.relative_to(root) for path in paths)
    drawn = set(paths[:num_pictures])
    settings: dict[str, Any] = {"command": "predict", "model": fingerprint(model)}
    settings |= {"images": str(Path(images).absolute()), "tile": tile, "overlap": overlap, "precision": precision}
    of_item: dict[Item, Path] = {}
    for path in share(paths):
        png = files[name := path.relative_to(root)]
        planned = [Path(kind) / png for kind in ("masks", "overlays", "uncertainty")[: 3 if path in drawn else 1]]
        of_item[Item(name.as_posix(), content_of(path), tuple(each.as_posix() for each in planned))] = path
    left = {of_item[item]: item for item in folder.left_of(settings, list(of_item))}
    folder.begin(["scores.csv", "rank.csv", "rank.png"])
    echo_remark(remark)
    samples = load_images(list(left), workers=workers, as_uint8=tile is not None)
    with autocast(model.device, precision):
        for (sample,) in tqdm(samples, "segment", unit="image", disable=hide_bar()):
            item = left[sample.path]
            if sample.image is None:
                folder.add(item, [], sample.problem)
                continue
            places = [folder.file(name) for name in item.files]
            segmentation, score = segment_image(model, sample.image, Path(item.name), places[0], tiling)
            if sample.path in drawn:
                overlay = mask_overlay(to_float(sample.image), segmentation.labels.cpu())
                save_png(to_pil(overlay), places[1])
                save_png(to_pil(uncertainty_map(segmentation.uncertainty)), places[2])
            folder.add(item, item.files, asdict(score))
        scores = FolderScores.of(folder.results(gather(list(of_item))))
        if rank and first_process():
            _write_rank(model, scores.ranked(), root, folder, tiling)
    if first_process():
        rows = [[s.name, f"{s.uncertainty:.6f}", *(f"{f:.6f}" for f in s.fractions)] for s in scores.scores]
        write_csv(folder.file("scores.csv"), ["image", "uncertainty", *model.classes], rows)
    return scores


def segment_image(
    model: PixelSegmenter, image: Tensor, name: Path, mask: Path, tiling: Tiling | None = None
) -> tuple[Segmentation, ImageScore]:
    """What a segmenter makes of an image (3, H, W) of some name; writes its labels to `mask`."""
    found = model.segment(image, tiling=tiling)
    labels = found.labels.cpu()
    save_png(Image.fromarray(labels.byte().numpy()), mask)
    counts = torch.bincount(labels.flatten(), minlength=len(model.classes))
    return found, ImageScore(name.as_posix(), found.score, (counts / labels.numel()).tolist())


def evaluate_segmenter(
    model: PixelSegmenter | str | Path,
    folder: MaskFolder,
    output: str | Path | None = None,
    num_pictures: NonNegativeInt = 4,
    workers: NonNegativeInt = 2,
    precision: Precision = "32",
    overwrite: bool = False,
    tile: PositiveInt | None = None,
    overlap: NonNegativeInt | None = None,
) -> dict[str, Any]:
    """Score a segmenter on images with masks: IoU per class, and their mean, as :meth:`MeanIoU.summary`.

    Pixels are counted over all images, at the masks' own size. Several processes, started by torchrun, share them.

    Args:
        model: as for :func:`segment_folder`.
        output: folder for metrics.json and pictures/; nothing is written without it.
        num_pictures: how many are drawn, spread over the images: image, truth, prediction and uncertainty.
        tile, overlap: as for :func:`segment_folder`.
    """
    model, results = PixelSegmenter.loaded(model), None if output is None else OutputFolder(output, overwrite)
    tiling = Tiling(tile, overlap)
    with autocast(model.device, precision):
        counts = score_images(
            lambda image, size: model.segment(image, tiling=tiling).labels, len(model.classes), folder, workers
        )
        metrics = counts.summary(model.classes)
        if results is not None and first_process():
            results.clear()
            write_json(results.file("metrics.json"), {"metrics": metrics, "images": len(folder)})
            draw_comparisons(model, folder, results, num_pictures, tiling)
    return metrics


def score_images(
    predict: Callable[[Tensor, tuple[int, int]], Tensor], num_classes: int, folder: MaskFolder, workers: int = 2
) -> MeanIoU:
    """Count predictions on all images of a folder; `predict` makes labels of an image (3, H, W) at its mask's size."""
    counts = MeanIoU(num_classes)
    loader = read_ahead(LazyMap(folder.__getitem__, share(range(len(folder)))), 1, workers)
    for ((image, mask),) in tqdm(loader, "evaluate", leave=False, unit="image", disable=hide_bar()):
        counts.update(predict(image, (mask.shape[0], mask.shape[1])), mask)
    counts.gather()
    return counts


def draw_comparisons(
    model: PixelSegmenter, folder: MaskFolder, output: OutputFolder, count: int, tiling: Tiling | None = None
) -> None:
    """pictures/: image, truth, prediction and uncertainty of some images, spread over the folder, a PNG each."""
    chosen = {index: safe_path(folder.names[index]) for index in spread(len(folder), count)}
    names = png_names(chosen.values())
    for index, name in chosen.items():
        image, mask = folder[index]
        found = model.segment(image, tiling=tiling)
        picture = segmentation_panels(image, found.labels, found.uncertainty, model.classes, mask)
        save_png(picture, output.file("pictures" / names[name]))


def iou_table(metrics: Mapping[str, Any]) -> str:
    """The summary of a score as lines of text; what occurs in no mask and no prediction is `-`."""
    measured = sum(iou is not None for iou in metrics["iou"].values())
    mean = "mean IoU" if measured == len(metrics["iou"]) else f"mean IoU of {measured} of {len(metrics['iou'])} classes"
    ious = [(mean, metrics["miou"]), *((f"  {name}", iou) for name, iou in metrics["iou"].items())]
    return format_table([(name, None if iou is None else f"{100 * iou:.1f} %") for name, iou in ious], ["", ""])


def _without_mask(paths: list[Path], root: Path, labelled: Path | None) -> list[Path]:
    """The images that have no mask in the folder `labelled`; ValueError if none is left."""
    if labelled is None:
        return paths
    left = find_pairs(paths, root, labelled).unlabelled
    if not left:
        raise ValueError(f"all {len(paths)} images have a mask in {labelled}: there is none left to segment")
    return left


def _write_rank(
    model: PixelSegmenter, ranked: Sequence[ImageScore], root: Path, folder: OutputFolder, tiling: Tiling
) -> None:
    """rank.csv, and what the model makes of the first images."""
    rows = [[str(place), score.name, f"{score.uncertainty:.6f}"] for place, score in enumerate(ranked, 1)]
    write_csv(folder.file("rank.csv"), ["rank", "image", "uncertainty"], rows)
    panels = []
    for score in ranked[:SHEET]:
        image = to_float(read_image(root / score.name))
        found = model.segment(image, tiling=tiling)
        strip = segmentation_panels(image, found.labels, found.uncertainty, model.classes, long_side=PANEL_SIDE)
        panels.append(titled(strip, f"{score.name}: {score.uncertainty:.2g}"))
    save_png(contact_sheet(panels), folder.file("rank.png"))
