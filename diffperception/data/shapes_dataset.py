"""The shapes data set on disk: pictures, COCO annotations and class masks."""

import json
import os
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffperception.data.shapes import CLASSES, draw_scene

SETTINGS_FILE = "shapes.json"


@dataclass(frozen=True)
class ShapesSettings:
    """What the pictures are a function of.

    Args:
        train: pictures to train on.
        val: pictures to measure with; none is also in train.
        seed: another seed gives other pictures.
        min_side: smallest height and width of a picture in pixels.
        max_side: largest height and width of a picture in pixels.
        max_objects: most objects in a picture; half as many are the least, where there is room. With 1, pictures lie
            in folders of their object's class.
        min_size: smallest length of a shape in pixels; the largest is 0.6 of the picture's shorter side.
    """

    train: int = 2000
    val: int = 200
    seed: int = 0
    min_side: int = 96
    max_side: int = 160
    max_objects: int = 8
    min_size: int = 22

    def __post_init__(self) -> None:
        if min(self.train, self.val, self.seed) < 0 or self.train + self.val == 0:
            raise ValueError("train, val and seed must not be negative, and at least one picture must be asked for")
        if self.max_objects < 1:
            raise ValueError(f"max_objects must be at least 1, not {self.max_objects}")
        if not 18 <= self.min_size <= 0.6 * self.min_side <= 0.6 * self.max_side:
            raise ValueError(
                f"shapes need 18 <= min_size <= 0.6 * min_side and min_side <= max_side, not min_size={self.min_size},"
                f" min_side={self.min_side}, max_side={self.max_side}"
            )


def write_shapes(
    output: str | Path,
    settings: ShapesSettings | None = None,
    workers: int | None = None,
    on_image: Callable[[], object] | None = None,
) -> bool:
    """Draw the data set into a new folder; the same settings give the same pictures on every machine.

    Writes `OUTPUT/{train,val}/*.png`, `OUTPUT/annotations/instances_{train,val}.json` (COCO: category id = label + 1)
    and `OUTPUT/masks/{train,val}/*.png` (0 background, label + 1 elsewhere). The folder appears when it is complete.

    Args:
        output: a folder that does not exist, is empty, or holds the same data set already.
        settings: what to draw; the defaults of ShapesSettings where not given.
        workers: processes that draw; as many as there are cores where not given.
        on_image: called after each picture, to show progress.

    Returns:
        Whether anything was drawn: False where `output` holds this data set already.

    Raises:
        ValueError: `output` holds something else, which is left as it is.
    """
    output = Path(output)
    settings = settings or ShapesSettings()
    if _already_there(output, settings):
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside,
        # Workers leave Ctrl-C to this process, which removes what was begun.
        ProcessPoolExecutor(
            workers or os.cpu_count(), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
        ) as pool,
    ):
        folder = Path(beside) / "shapes"
        for split, count in (("train", settings.train), ("val", settings.val)):
            _write_split(folder, split, count, settings, pool, on_image)
        (folder / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n")
        if output.exists():
            output.rmdir()
        folder.rename(output)
    return True


def _already_there(output: Path, settings: ShapesSettings) -> bool:
    if not output.exists():
        return False
    if not output.is_dir():
        raise ValueError(f"{output} is a file: give a new folder as output")
    if not any(output.iterdir()):
        return False
    try:
        drawn = json.loads((output / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        raise ValueError(f"{output} holds something else than a shapes data set: give a new folder as output") from None
    if drawn != asdict(settings):
        raise ValueError(f"{output} holds shapes drawn with other settings ({drawn}): give a new folder as output")
    return True


def _write_split(
    folder: Path,
    split: str,
    count: int,
    settings: ShapesSettings,
    pool: ProcessPoolExecutor,
    on_image: Callable[[], object] | None,
) -> None:
    for part in (folder / split, folder / "masks" / split, folder / "annotations"):
        part.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image, objects in pool.map(partial(_write_scene, folder, split, settings), range(count), chunksize=16):
        images.append(image)
        for entry in objects:
            annotations.append(entry | {"id": len(annotations) + 1})
        if on_image is not None:
            on_image()
    content = {
        "info": {"description": f"diffperception shapes, {split}, seed {settings.seed}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in enumerate(CLASSES, start=1)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _write_scene(
    folder: Path, split: str, settings: ShapesSettings, index: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw and save picture `index` of a split; returns its COCO image entry and its annotations without ids."""
    rng = np.random.default_rng([settings.seed, int(split == "val"), index])
    scene = draw_scene(rng, settings.min_side, settings.max_side, settings.max_objects, settings.min_size)
    name = f"{index:06d}.png"
    if settings.max_objects == 1:
        name = f"{CLASSES[int(scene.labels[0])]}/{name}"
        for part in (folder / split, folder / "masks" / split):
            (part / name).parent.mkdir(exist_ok=True)
    Image.fromarray(scene.image).save(folder / split / name, compress_level=1)
    Image.fromarray(scene.class_mask).save(folder / "masks" / split / name)
    height, width = scene.owner.shape
    areas = np.bincount(scene.owner[scene.owner >= 0], minlength=len(scene.labels)).tolist()
    image = {"id": index + 1, "file_name": name, "width": width, "height": height}
    objects = [
        {
            "image_id": index + 1,
            "category_id": label + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": area,
            "iscrowd": 0,
        }
        for (x1, y1, x2, y2), label, area in zip(scene.boxes.tolist(), scene.labels.tolist(), areas, strict=True)
    ]
    return image, objects
