"""`diffperception shapes`: draw the shapes data set."""

from pathlib import Path

from tqdm import tqdm

from diffperception.data import ShapesSettings, write_shapes
from diffperception.echo import echo


def shapes(
    output: Path,
    train: int = ShapesSettings.train,
    val: int = ShapesSettings.val,
    seed: int = ShapesSettings.seed,
    min_side: int = ShapesSettings.min_side,
    max_side: int = ShapesSettings.max_side,
    max_objects: int = ShapesSettings.max_objects,
    min_size: int = ShapesSettings.min_size,
    workers: int | None = None,
) -> None:
    """Draw a data set of ellipses, rectangles, triangles, stars, crosses and rings to try the other commands on.

    Writes images (train/, val/), COCO annotations (annotations/instances_train.json and instances_val.json) and
    class masks (masks/) below the output folder. The same options give the same images on every machine.

    Args:
        output: folder to write; one that holds the same data set is left as it is, one with anything else is refused.
        train: number of images to train on.
        val: number of images to evaluate on.
        seed: another seed gives other images.
        min_side: smallest height and width of an image, in pixels.
        max_side: largest height and width of an image, in pixels.
        max_objects: most objects in an image; with 1, images lie in folders of their object's class.
        min_size: smallest length of an object, in pixels.
        workers: processes that draw; null: one per core.
    """
    settings = ShapesSettings(train, val, seed, min_side, max_side, max_objects, min_size)
    with tqdm(total=train + val, desc="draw", unit="image", leave=False, disable=None) as bar:
        drawn = write_shapes(output, settings, workers, on_image=bar.update)
    if drawn:
        echo(f"{train} images to train on and {val} to measure with are in {output}")
    else:
        echo(f"{output} already holds these images: nothing to draw")
