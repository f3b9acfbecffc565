"""`diffperception augment`."""

from functools import partial
from pathlib import Path
from typing import Annotated

from diffperception.configuration.parser import OptionsOf
from diffperception.data import CocoDetection
from diffperception.echo import echo, plural
from diffperception.generation.editing import augment_dataset


def command(model: Path, augment: Annotated[partial[CocoDetection], OptionsOf(augment_dataset, "model")]) -> None:
    made, output = augment(model), Path(augment.keywords["output"])
    echo(f"{output / 'images'}: {plural(len(made), 'picture')}; {output / 'annotations.json'}: their objects")
