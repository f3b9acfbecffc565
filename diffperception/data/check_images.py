"""Finding every problem of a folder of images that a generator learns from."""

import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from diffperception.data.captions import check_captions, read_captions, require_sides_kept
from diffperception.data.check_report import Level, Problem, Report
from diffperception.data.image_folder import ImageDataOptions, is_too_small
from diffperception.data.images import BrokenImageError, open_image, read_image, read_size
from diffperception.table import format_table


@dataclass(frozen=True)
class ImageSummary:
    """What a folder of images holds."""

    images: int  # that can be read
    classes: dict[str, int]  # images in each folder of a class; empty without labels
    sizes: tuple[str, str]  # smallest and largest "WxH", by area
    modes: dict[str, int]  # Pillow's names

    def text(self) -> str:
        table = format_table(self.classes.items(), ("class", "images")) + "\n\n" if self.classes else ""
        modes = ", ".join(f"{count} {mode}" for mode, count in self.modes.items())
        return (
            f"{table}images       {self.images}\nimage sizes  {self.sizes[0]} to {self.sizes[1]}\nmodes        {modes}"
        )


def check_images(options: ImageDataOptions, image_size: tuple[int, int] | None = None, channels: int = 3) -> Report:
    """Decode every image of a folder, and name every problem: what training refuses is an error.

    Args:
        image_size: height and width of the images that the generator is to make; None for any.
        channels: of its images, 3 or 1.
    """
    problems, summary = _check_folder(options, image_size)
    if options.captions is not None and summary is not None:
        try:
            require_sides_kept(read_captions(options.captions), options.horizontal_flip, options.vertical_flip)
        except ValueError as error:
            problems.append(Problem("warning", "mirrored", f"training refuses this: {error}"))
        options = replace(options, horizontal_flip=0.0, vertical_flip=0.0)
    if options.val_images is not None:
        of_val = replace(
            options, images=options.val_images, annotations=options.val_annotations, captions=options.val_captions
        )
        problems += _check_folder(of_val, image_size)[0]
    if not any(problem.level == "error" for problem in problems):
        try:
            options.open(image_size or (1, 1), channels)
        except (OSError, ValueError) as error:
            problems.append(Problem("error", "refused", str(error)))
    return Report(sorted(problems, key=lambda problem: problem.level), summary)


class _Look(NamedTuple):
    size: tuple[int, int]  # height, width
    mode: str
    fault: str


def _check_folder(
    options: ImageDataOptions, image_size: tuple[int, int] | None
) -> tuple[list[Problem], ImageSummary | None]:
    if options.captions is not None and (broken := check_captions(options.captions)):
        return broken, None
    try:
        root, paths, remark = options.listing()
    except (OSError, ValueError) as error:
        return [Problem("error", "no images", str(error))], None
    places: dict[str, list[str]] = defaultdict(list)
    sound: dict[Path, _Look] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looked = pool.map(_look, paths)
        for path, look in tqdm(zip(paths, looked, strict=True), "images", len(paths), leave=False, disable=None):
            if look.fault:
                places["an image cannot be read"].append(look.fault)
            elif image_size is not None and is_too_small(look.size, image_size):
                half = f"an image is less than half as high or wide as {image_size[0]} x {image_size[1]}"
                places[half].append(f"{path}: {look.size[0]} x {look.size[1]}")
            else:
                sound[path] = look
    skipped = options.on_broken == "skip"
    level: Level = "warning" if skipped else "error"
    follows = "it is passed over" if skipped else "training stops there"
    problems = [Problem("warning", "left out", remark)] if remark else []
    problems += [Problem(level, "unusable image", f"{kind}: {follows}", found) for kind, found in places.items()]
    if not sound:
        problems.append(Problem("error", "no images", f"there is no image large enough that can be read in {root}"))
        return problems, None
    by_area = sorted((look.size for look in sound.values()), key=lambda size: size[0] * size[1])
    sizes = tuple(f"{width}x{height}" for height, width in (by_area[0], by_area[-1]))
    folders = Counter(path.relative_to(root).parts[0] for path in sound if path.parent != root)
    modes = Counter(look.mode for look in sound.values())
    classes = dict(sorted(folders.items())) if options.labelled else {}
    return problems, ImageSummary(len(sound), classes, (sizes[0], sizes[1]), dict(modes.most_common()))


def _look(path: Path) -> _Look:
    try:
        read_image(path)
        size = read_size(path)
    except BrokenImageError as error:
        return _Look((0, 0), "", str(error))
    with open_image(path) as image:
        return _Look(size, image.mode, "")
