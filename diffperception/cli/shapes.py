"""`diffperception shapes`: draw the shapes data set."""

from pathlib import Path

from diffperception.configuration.parser import Flat
from diffperception.data import ShapesSettings, write_shapes
from diffperception.echo import echo


def command(output: Path, settings: Flat[ShapesSettings], workers: int | None = None) -> None:
    """Draw a data set of ellipses, rectangles, triangles, stars, crosses and rings to try the other commands on.

    Writes images (train/, val/), COCO annotations (annotations/instances_train.json and instances_val.json) and
    class masks (masks/) below the output folder. The same options give the same images on every machine.

    Args:
        output: folder to write; one that holds the same data set is left as it is, one with anything else is refused.
        settings: what the images are a function of.
        workers: processes that draw; null: one per core.
    """
    if write_shapes(output, settings, workers):
        echo(f"{settings.train} images to train on and {settings.val} to measure with are in {output}")
    else:
        echo(f"{output} already holds these images: nothing to draw")
