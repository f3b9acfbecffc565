"""`diffperception check`: name every problem of a data set."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

from diffperception.configuration.parser import OptionsOf
from diffperception.data.check import check_coco
from diffperception.data.check_report import Report
from diffperception.echo import echo
from diffperception.files import write_json


def command(
    check: Annotated[partial[Report], OptionsOf(check_coco)], show: int = 10, report: Path | None = None
) -> int:
    """Read a COCO data set, say what it holds and name every problem of it.

    Errors make training or its measurement fail or be wrong: missing keys, double or unknown ids, boxes without area
    or outside of their image or written as corners, missing or broken images, images of another size. Warnings may be
    meant: boxes over the border, classes without objects, more objects than proposals. The exit code is 1 if there are
    errors.

    Args:
        show: how many places of each problem are printed.
        report: JSON file to write, with every place of every problem.
    """
    found = check()
    echo(found.text(show))
    if check.keywords["images"] is None:
        echo("Only the annotations were checked; --images FOLDER checks the image files too.")
    if report is not None:
        write_json(report, asdict(found))
        echo(f"every place of every problem is in {report}")
    return 1 if found.errors else 0
