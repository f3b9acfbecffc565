"""`diffperception sample`."""

from functools import partial
from pathlib import Path
from typing import Annotated

from diffperception.configuration.parser import Flat, OptionsOf
from diffperception.echo import echo
from diffperception.generation.editing import EditOptions, edit_picture
from diffperception.generation.inference import sample_folder


def command(
    model: Path,
    draw: Annotated[partial[None], OptionsOf(sample_folder, "model", "classifier")],
    edit: Flat[EditOptions],
    classifier: Path | None = None,
    image: Path | None = None,
    mask: Path | None = None,
) -> None:
    """Draw images from a trained generator: numbered PNG files in OUTPUT/images, and OUTPUT/grid.png.

    Every image is a function of the seed and its number, up to rounding. Classes take turns, each in a folder of its
    own, and so do prompts, which OUTPUT/captions.json lists in COCO's format. Given again after an interruption, the
    command goes on with the images that are missing, also where more are asked for; processes of torchrun share them.

    With `--image` that picture is drawn again instead, so often, or with a `--mask` the white parts of it alone; of
    classes or prompts the first one is told.

    Args:
        image: a picture to noise to `strength` and draw again, at its own size.
        mask: a picture of the same size, white where it shall be drawn anew; the rest stays as it is.
    """
    output = draw.keywords["output"]
    if image is None:
        if mask is not None or edit != EditOptions():
            raise ValueError("mask, strength, jump and resamples belong to a picture: give one with --image")
        draw(model, classifier=classifier)
    else:
        unused = [n for n in ("captions", "negative_prompt", "classifier_scale", "image_size") if draw.keywords[n]]
        if unused or classifier is not None:
            raise ValueError(f"--image goes without {(unused or ['classifier'])[0]}: leave it out")
        names = [*(draw.keywords["classes"] or []), *(draw.keywords["prompt"] or [])]
        if len(names) > 1:
            raise ValueError("a picture is drawn again of one class or prompt: name one")
        how = {name: draw.keywords[name] for name in ("num_samples", "sampling", "seed", "device", "precision")}
        said = names[0] if names else None
        edit_picture(model, image, output, mask, edit=edit, said=said, overwrite=draw.keywords["overwrite"], **how)
    echo(f"{output / 'images'}: {draw.keywords['num_samples']} images\n{output / 'grid.png'}: the first ones")
