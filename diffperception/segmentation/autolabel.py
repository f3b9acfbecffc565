"""Labelled data sets that a segmenter makes of images without labels (as DatasetDDPM, arXiv 2112.03126)."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt
from torch import Tensor
from tqdm import tqdm

from diffperception.data.images import load_images
from diffperception.data.listing import list_images
from diffperception.devices import Precision, autocast, hide_bar
from diffperception.echo import echo_remark
from diffperception.files import folder_beside, png_names, write_json
from diffperception.segmentation.inference import FolderScores, ImageScore, segment_image
from diffperception.segmentation.segmenter import PixelSegmenter
from diffperception.visualization.draw import save_png, to_pil


@dataclass(frozen=True)
class LabelledSet:
    """The images that were kept, by name; those dropped, the most uncertain first; and what is wrong with others."""

    kept: list[ImageScore]
    dropped: list[ImageScore]
    broken: list[str]


def autolabel(
    model: PixelSegmenter | str | Path,
    images: str | Path | Iterable[Tensor],
    output: str | Path,
    drop: ClosedUnitInterval = 0.1,
    workers: NonNegativeInt = 2,
    precision: Precision = "32",
    source: str | None = None,
) -> LabelledSet:
    """Label images, and keep those that the segmenter is sure of: a data set to train any network on.

    Writes `output`/images, masks and dataset.json as `diffperception autolabel --help` says; the folder appears once
    all of it is finished.

    Args:
        model: as for :func:`segment_folder`.
        images: an image, a folder (its subfolders count too), or a pattern such as 'photos/*.jpg'; in Python also
            images (3, H, W; RGB, 0..1), such as samples of a generator, which are named by their numbers.
        output: folder for the data set; it must be empty.
        drop: fraction of the images to drop, the most uncertain.
        source: where the images are from, for dataset.json; by default the folder or pattern.

    Raises:
        FileNotFoundError: there is no such image or folder.
        ValueError: the output folder holds something, no image can be read, or `drop` leaves none.
    """
    model, output = PixelSegmenter.loaded(model), Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"{output} is not an empty folder: choose another --output")
    if not 0 <= drop < 1:
        raise ValueError(f"drop {drop:g} would leave no image: give a smaller fraction, such as 0.1")
    if drop and model.classifier.members < 2:
        raise ValueError("a segmenter with a single member agrees with itself: train it with several, or give --drop 0")
    pool: Iterable[tuple[Path, Tensor | str]]  # names, and images or what is wrong with them
    if isinstance(images, str | Path):
        source = source or str(images)
        root, paths, remark = list_images(images, leave_out=output)
        echo_remark(remark)
        names = png_names(path.relative_to(root) for path in paths)
        samples = tqdm(load_images(paths, workers=workers), "autolabel", unit="image", disable=hide_bar())
        pool = ((names[s.path.relative_to(root)], s.problem if s.image is None else s.image) for (s,) in samples)
    else:
        pool = ((Path(f"{number:06}.png"), image) for number, image in enumerate(images))
    with folder_beside(output) as folder:
        found: list[ImageScore | str] = []
        for name, image in pool:
            if isinstance(image, str):
                found.append(image)
            else:
                save_png(to_pil(image), folder / "images" / name)
                with autocast(model.device, precision):
                    found.append(segment_image(model, image, name, folder / "masks" / name)[1])
        scores = FolderScores.of(found)
        order = scores.ranked()
        number = min(round(drop * len(order)), len(order) - 1)
        dropped, kept = order[:number], sorted(order[number:], key=lambda score: score.name)
        for score in dropped:
            for kind in ("images", "masks"):
                (folder / kind / score.name).unlink()
        lists = {"images": [asdict(score) for score in kept], "dropped": [asdict(score) for score in dropped]}
        write_json(folder / "dataset.json", {"classes": model.classes, "source": source, **lists})
    return LabelledSet(kept, dropped, scores.broken)
