"""`diffperception convert-data`: annotations of other tools to COCO, and COCO to Pascal VOC or YOLO."""

from functools import partial
from typing import Annotated

from diffperception.configuration.parser import OptionsOf
from diffperception.data.formats.conversion import Conversion, convert_annotations
from diffperception.echo import echo, plural


def command(convert: Annotated[partial[Conversion], OptionsOf(convert_annotations)]) -> None:
    made, output = convert(), convert.keywords["output"]
    for note in made.notes:
        echo(f"note: {note}")
    classes = f"{len(made.classes)} classes" if len(made.classes) > 1 else "1 class"
    echo(f"{output}: {plural(made.num_objects, 'object')} of {classes} in {plural(made.num_images, 'image')}")
    if convert.keywords["to"] == "yolo":
        echo(f"the images stay in {made.images}: move or link that folder to {output / 'images'} for YOLO's trainers")
    else:
        echo(f"the images stay in {made.images}, which is the folder to give as --images")
