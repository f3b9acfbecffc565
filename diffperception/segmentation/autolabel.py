"""Labelled data sets that a segmenter makes of images without labels (as DatasetDDPM, arXiv 2112.03126)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt
from torch import Tensor
from tqdm import tqdm

from diffperception.data.images import load_images
from diffperception.data.listing import list_images
from diffperception.devices import Precision, autocast, hide_bar
from diffperception.echo import echo_remark
from diffperception.files import png_names, write_json
from diffperception.models.base import fingerprint
from diffperception.resumable import Item, ResumableFolder, content_of
from diffperception.segmentation.feature_cache import image_key
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
    images: str | Path | Sequence[Tensor],
    output: str | Path,
    drop: ClosedUnitInterval = 0.1,
    workers: NonNegativeInt = 2,
    precision: Precision = "32",
    overwrite: bool = False,
    source: str | None = None,
    drawn: Mapping[str, Any] | None = None,
) -> LabelledSet:
    """Label images, and keep those that the segmenter is sure of: a data set to train any network on.

    Writes `output`/images, masks and dataset.json as `diffperception autolabel --help` says; dataset.json comes last.

    Args:
        model: as for :func:`segment_folder`.
        images: an image, a folder (its subfolders count too), a pattern such as 'photos/*.jpg', or a list of names; in
            Python also images (3, H, W; RGB, 0..1), such as samples of a generator, which are named by their numbers.
        output: folder for the data set.
        drop: fraction of the images to drop, the most uncertain.
        overwrite: begin anew in a folder that is not empty; what earlier calls wrote is removed, and nothing else.
        source: where the images are from, for dataset.json; by default the folder or pattern.
        drawn: all that the images hang on, as JSON has it, where they are made as they are asked for; an interrupted
            call then goes on without those that are done.

    Raises:
        FileNotFoundError: there is no such image or folder.
        ValueError: the output folder holds something, no image can be read, or `drop` leaves none.
    """
    model, output = PixelSegmenter.loaded(model), Path(output)
    if not 0 <= drop < 1:
        raise ValueError(f"drop {drop:g} would leave no image: give a smaller fraction, such as 0.1")
    if drop and model.classifier.members < 2:
        raise ValueError("a segmenter with a single member agrees with itself: train it with several, or give --drop 0")
    folder = ResumableFolder(output, overwrite)
    settings = {"command": "autolabel", "model": fingerprint(model), "precision": precision, "drop": drop}
    read: Callable[[list[Any]], Iterable[Tensor | str]]  # images, or what is wrong with them
    if isinstance(images, str | Path):
        source = source or str(images)
        settings["images"] = str(Path(images).absolute())
        root, paths, remark = list_images(images, leave_out=output)
        echo_remark(remark)
        names = png_names(path.relative_to(root) for path in paths)
        of_item: dict[Item, Any] = {_item(names[p.relative_to(root)], content_of(p)): p for p in paths}
        read = partial(_read, workers=workers)
    else:
        settings["images"] = drawn
        contents = ["" if drawn is not None else image_key(images[number]) for number in range(len(images))]
        of_item = {_item(Path(f"{number:06}.png"), content): number for number, content in enumerate(contents)}
        read = partial(map, images.__getitem__)

    def label(items: Sequence[Item]) -> None:
        pool = zip(items, read([of_item[item] for item in items]), strict=True)
        for item, image in tqdm(pool, "autolabel", len(items), unit="image", disable=hide_bar()):
            if isinstance(image, str):
                folder.add(item, [], image)
                continue
            picture, mask = map(folder.file, item.files)
            save_png(to_pil(image), picture)
            with autocast(model.device, precision):
                score = segment_image(model, image, Path(item.name), mask)[1]
            folder.add(item, item.files, asdict(score))

    left = folder.left_of(settings, list(of_item))
    folder.begin(["dataset.json"])
    label(left)
    found = dict(zip(of_item, folder.results(of_item), strict=True))
    scores = FolderScores.of(list(found.values()))
    order = scores.ranked()
    number = min(round(drop * len(order)), len(order) - 1)
    dropped, kept = order[:number], sorted(order[number:], key=lambda score: score.name)
    items = {item.name: item for item in of_item}
    for item in (items[score.name] for score in dropped):
        folder.remove(output / name for name in item.files)
        folder.add(item, [], found[item])
    # Those that were dropped before, when there were other images.
    label([items[s.name] for s in kept if not all((output / name).exists() for name in items[s.name].files)])
    lists = {"images": [asdict(score) for score in kept], "dropped": [asdict(score) for score in dropped]}
    write_json(folder.file("dataset.json"), {"classes": model.classes, "source": source, **lists})
    return LabelledSet(kept, dropped, scores.broken)


def _read(paths: Sequence[Path], workers: int) -> Iterator[Tensor | str]:
    for (sample,) in load_images(paths, workers=workers):
        yield sample.problem if sample.image is None else sample.image


def _item(name: Path, content: str) -> Item:
    return Item(name.as_posix(), content, tuple((Path(kind) / name).as_posix() for kind in ("images", "masks")))
