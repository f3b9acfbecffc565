"""`diffperception check`: name every problem of a data set; which function it is depends on what is given."""

import json
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from jsonargparse.typing import PositiveInt

from diffperception.configuration.parser import OptionsOf
from diffperception.data.check import check_coco
from diffperception.data.check_images import check_images
from diffperception.data.check_masks import check_masks
from diffperception.data.check_report import Report
from diffperception.data.image_folder import ImageDataOptions
from diffperception.data.masks import MaskDataOptions
from diffperception.echo import echo
from diffperception.files import write_json


def check_coco_files(
    check: Annotated[partial[Report], OptionsOf(check_coco)],
    show: int = 10,
    report: Path | None = None,
    task: Literal["detection"] = "detection",
) -> int:
    """Read a COCO data set, say what it holds and name every problem of it.

    Errors are what training refuses: entries that cannot be used, double or unknown ids, nothing to learn, boxes in
    0..1 or written as corners, missing or broken images, images of another size. Warnings may be meant: boxes without
    area or out of their image, classes without objects, more objects than proposals. The exit code is 1 if there are
    errors.

    Args:
        show: how many places of each problem are printed.
        report: JSON file to write, with every place of every problem.
        task: what the data set is for; segmentation and generation have options of their own.
    """
    found = check()
    code = report_problems(found, show, report)
    if check.keywords["images"] is None and check.keywords["format"] == "coco":
        echo("Only the annotations were checked; --images FOLDER checks the image files too.")
    return code


def check_mask_folders(
    data: Annotated[partial[MaskDataOptions], OptionsOf(MaskDataOptions, "classes", "max_images", "short_side")],
    classes: list[str] | None = None,
    show: int = 10,
    report: Path | None = None,
    task: Literal["segmentation"] = "segmentation",
) -> int:
    """Look through images and their masks, say how many pixels each class has and name every problem.

    Errors are what training refuses: images without a mask, several masks of an image, masks of another size or with
    unknown values, broken files, masks of one class alone. Warnings may be meant: masks without an image, classes
    without a pixel. The exit code is 1 if there are errors.

    Args:
        classes: names of the classes 0, 1, ...; without them every value is a class.
        show: how many places of each problem are printed.
        report: JSON file to write, with every place of every problem.
        task: what the data set is for.
    """
    return report_problems(check_masks(data(classes=classes or [])), show, report)


def check_image_folder(
    data: Annotated[
        partial[ImageDataOptions],
        OptionsOf(ImageDataOptions, "horizontal_flip", "vertical_flip", "batch_size", "workers", "cached"),
    ],
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None,
    channels: PositiveInt = 3,
    show: int = 10,
    report: Path | None = None,
    task: Literal["generation"] = "generation",
) -> int:
    """Look through a folder of images that a generator is to learn from, say what it holds and name every problem.

    Errors are what training refuses: images that are broken or too small, images outside of the folders of classes.
    The exit code is 1 if there are errors.

    Args:
        image_size: side, or [height, width], of the images that the generator is to make; null for any.
        channels: of the images that the generator is to make, 3 or 1.
        show: how many places of each problem are printed.
        report: JSON file to write, with every place of every problem.
        task: what the data set is for.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return report_problems(check_images(data(), size, channels), show, report)


def report_problems(found: Report, show: int, report: Path | None) -> int:
    """Print a report and write it, if it is asked for; returns the exit code."""
    echo(found.text(show))
    if report is not None:
        require_report(report)
        write_json(report, asdict(found))
        echo(f"every place of every problem is in {report}")
    return 1 if found.errors else 0


def require_report(path: Path) -> None:
    """ValueError if there is a file that is not the report of an earlier check, which alone may be replaced."""
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict) or before.keys() != {field.name for field in fields(Report)}:
        raise ValueError(f"{path} is there already, and no report of an earlier check: name another file for --report")


BY_KIND = {"masks": check_mask_folders, "annotations": check_coco_files, "images": check_image_folder}
BY_TASK = {"segmentation": "masks", "detection": "annotations", "generation": "images"}
