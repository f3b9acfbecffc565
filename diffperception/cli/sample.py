"""`diffperception sample`."""

from functools import partial
from pathlib import Path
from typing import Annotated

from diffperception.configuration.parser import OptionsOf
from diffperception.echo import echo
from diffperception.generation.inference import sample_folder


def command(
    model: Path,
    draw: Annotated[partial[None], OptionsOf(sample_folder, "model", "classifier")],
    classifier: Path | None = None,
) -> None:
    draw(model, classifier=classifier)
    output = draw.keywords["output"]
    echo(f"{output / 'images'}: {draw.keywords['num_samples']} images\n{output / 'grid.png'}: the first ones")
