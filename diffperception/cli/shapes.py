"""`diffperception shapes`: draw the shapes data set."""

from functools import partial
from typing import Annotated

from diffperception.configuration.parser import Flat, OptionsOf
from diffperception.data import ShapesSettings, write_shapes
from diffperception.echo import echo, plural


def command(
    draw: Annotated[partial[bool], OptionsOf(write_shapes, "settings")], settings: Flat[ShapesSettings]
) -> None:
    """Draw a data set of ellipses, rectangles, triangles, stars, crosses and rings to try the other commands on.

    Writes images (train/, val/), COCO annotations (annotations/instances_train.json and instances_val.json) and
    class masks (masks/) below the output folder; with `clips` also clips of moving shapes to track (clips/) and
    annotations/clips.json (COCO-video). The same options give the same images on every machine.
    """
    output = draw.keywords["output"]
    if draw(settings=settings):
        clips = f" and {plural(settings.clips, 'clip')} of moving shapes" if settings.clips else ""
        echo(f"{settings.train} images to train on and {settings.val} to measure with{clips} are in {output}")
    else:
        echo(f"{output} already holds these images: nothing to draw")
