"""`diffperception segment`: the class of every pixel, how uncertain it is, and which images to label next."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse.typing import NonNegativeInt
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffperception.cli import counted, say
from diffperception.data.images import ImageFiles
from diffperception.data.masks import find_mask
from diffperception.devices import pick_device
from diffperception.files import check_output_dir as require_room
from diffperception.files import list_images as find_images
from diffperception.files import png_names as name_pictures
from diffperception.files import write_text
from diffperception.segmentation import PixelSegmenter, Segmentation
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


def segment(
    model: Path,
    images: str,
    output: Path,
    rank: bool = False,
    labelled: Path | None = None,
    pictures: NonNegativeInt = 100,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Say of every pixel of an image, or of all images in a folder, which class it is.

    Writes OUTPUT/masks (PNG, in each pixel its class's number), OUTPUT/overlays (the images with their classes in
    colours), OUTPUT/uncertainty (where the members of the ensemble disagree) and OUTPUT/scores.csv: each image's
    uncertainty (in nats, the mean of its most uncertain tenth) and the shares of the classes. With `--rank` also
    OUTPUT/rank.csv, the images with the most uncertain first, and OUTPUT/rank.png, which shows the first of them:
    those to label next. Images that cannot be read are left out and named at the end. scores.csv is written once all
    images are done: a folder without it is of a run that was interrupted.

    Args:
        model: the segmenter, a model.safetensors file.
        images: an image, a folder (its subfolders count too), or a pattern in quotes such as 'photos/*.jpg'.
        output: folder for the results.
        rank: order the images by their uncertainty.
        labelled: folder of masks; images that have one there are left out.
        pictures: draw the overlays and uncertainties of at most this many images.
        device: cpu, cuda, cuda:1, ... or auto.
        overwrite: write into a folder that is not empty, replacing files of the same names.
    """
    root, paths = find_images(images, output)
    paths = unlabelled_of(paths, root, labelled)
    segmenter = PixelSegmenter.load(model).to(pick_device(device))
    if rank and segmenter.classifier.members < 2:
        raise ValueError(f"{model} has a single member, which agrees with itself: to rank, train it with several")
    require_room(output, overwrite)
    for old in ("scores.csv", "rank.csv", "rank.png"):
        (output / old).unlink(missing_ok=True)
    files = name_pictures([path.relative_to(root) for path in paths])
    scores: list[Score] = []
    broken: list[str] = []
    top = MostUncertain(SHEET if rank else 0)
    for sample in tqdm(ImageFiles(paths), "segment", len(paths), unit="image", disable=None):
        if sample.image is None:
            broken.append(sample.problem)
            continue
        name = sample.path.relative_to(root)
        found = segmenter.segment(sample.image)
        save_png(Image.fromarray(found.labels.byte().cpu().numpy()), output / "masks" / files[name])
        if len(scores) < pictures:
            save_png(to_pil(mask_overlay(sample.image, found.labels)), output / "overlays" / files[name])
            save_png(to_pil(uncertainty_map(found.uncertainty)), output / "uncertainty" / files[name])
        scores.append(Score(name.as_posix(), found.score, shares(found.labels, len(segmenter.classes))))
        top.add(scores[-1], sample.image, found, segmenter.classes)
    if not scores:
        raise ValueError(f"no image can be read: {broken[0]}")
    if rank:
        order = sorted(scores, key=lambda score: -score.uncertainty)
        write_rank(order, output / "rank.csv")
        save_png(contact_sheet(top.pictures()), output / "rank.png")
        first = ", ".join(f"{score.name} ({score.uncertainty:.2g})" for score in order[:SHEET])
        say(f"label next, the most uncertain first, all in rank.csv and these in rank.png: {first}")
    write_scores(scores, segmenter.classes, output / "scores.csv")
    say(f"masks of {counted(len(scores), 'image')}, pictures and scores.csv are in {output}")
    if broken:
        say("\n".join([f"{counted(len(broken), 'image')} left out:", *(f"  {problem}" for problem in broken)]))


class Score(NamedTuple):
    """An image's name, its uncertainty in nats, and the share of its pixels of each class."""

    name: str
    uncertainty: float
    shares: list[float]


class MostUncertain:
    """Pictures of the most uncertain images so far.

    Args:
        number: how many are kept.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._kept: list[tuple[float, Image.Image]] = []  # the most uncertain first

    def add(self, score: Score, image: Tensor, found: Segmentation, classes: Sequence[str]) -> None:
        """Take an image (3, H, W), if it is among them."""
        if len(self._kept) < self.number or (self.number and score.uncertainty > self._kept[-1][0]):
            panels = segmentation_panels(image, found.labels, found.uncertainty, classes, long_side=PANEL_SIDE)
            picture = titled(panels, f"{score.name}: {score.uncertainty:.2g}")
            kept = sorted([*self._kept, (score.uncertainty, picture)], key=lambda pair: -pair[0])
            self._kept = kept[: self.number]

    def pictures(self) -> list[Image.Image]:
        return [picture for _, picture in self._kept]


def unlabelled_of(paths: list[Path], root: Path, labelled: Path | None) -> list[Path]:
    """The images that have no mask in the folder `labelled`; ValueError if none is left."""
    if labelled is None:
        return paths
    if not labelled.is_dir():
        raise FileNotFoundError(f"there is no folder of masks {labelled}")
    left = [path for path in paths if find_mask(path.relative_to(root), labelled) is None]
    if not left:
        raise ValueError(f"all {len(paths)} images have a mask in {labelled}: there is none left to segment")
    return left


def shares(labels: Tensor, num_classes: int) -> list[float]:
    """Of the pixels, those of each class."""
    return (torch.bincount(labels.flatten(), minlength=num_classes) / labels.numel()).tolist()


def write_scores(scores: Sequence[Score], classes: Sequence[str], path: Path) -> None:
    """A table of images, uncertainties and shares of classes."""
    rows = [[score.name, f"{score.uncertainty:.6f}", *(f"{share:.6f}" for share in score.shares)] for score in scores]
    _write_table(["image", "uncertainty", *classes], rows, path)


def write_rank(scores: Sequence[Score], path: Path) -> None:
    """A table of images in the order in which they are given."""
    rows = [[str(place), score.name, f"{score.uncertainty:.6f}"] for place, score in enumerate(scores, 1)]
    _write_table(["rank", "image", "uncertainty"], rows, path)


def _write_table(head: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text(path, text.getvalue())
