"""`diffperception check`: name every problem of a data set."""

from dataclasses import asdict
from pathlib import Path

from diffperception.data.check import check_coco
from diffperception.echo import echo
from diffperception.files import write_json


def command(
    annotations: Path,
    images: Path | None = None,
    open_images: bool = True,
    num_boxes: int | None = None,
    show: int = 10,
    report: Path | None = None,
) -> int:
    """Read a COCO data set, say what it holds and name every problem of it.

    Errors make training or its measurement fail or be wrong: missing keys, double or unknown ids, boxes without area
    or outside of their image or written as corners, missing or broken images, images of another size. Warnings may be
    meant: boxes over the border, classes without objects, more objects than proposals. The exit code is 1 if there are
    errors.

    Args:
        annotations: COCO JSON file.
        images: folder of its images; null: only the annotations are checked.
        open_images: decode every image and compare its size; false only looks whether the files are there.
        num_boxes: proposals of the detector to train; images with more objects are named.
        show: how many places of each problem are printed.
        report: JSON file to write, with every place of every problem.
    """
    found = check_coco(annotations, images, open_images, num_boxes)
    echo(found.text(show))
    if images is None:
        echo("Only the annotations were checked; --images FOLDER checks the image files too.")
    if report is not None:
        write_json(report, asdict(found))
        echo(f"every place of every problem is in {report}")
    return 1 if found.errors else 0
