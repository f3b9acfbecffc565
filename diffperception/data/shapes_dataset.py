"""The shapes data set on disk: images, COCO annotations and class masks."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from diffperception.data.images import ignore_interrupts
from diffperception.data.outlines import encode_masks
from diffperception.data.shapes import CLASSES, ShapesSettings, draw_scene
from diffperception.data.shapes_captions import LANGUAGES, describe_scene
from diffperception.files import folder_beside, write_json

SETTINGS_FILE = "shapes.json"


def write_shapes(output: str | Path, settings: ShapesSettings | None = None, workers: int | None = None) -> bool:
    """Draw the data set into a new folder; the same settings give the same images on every machine.

    Writes `OUTPUT/{train,val}/*.png`, `OUTPUT/annotations/instances_{train,val}.json` (COCO: category id = label + 1,
    segmentation = run lengths of what is visible) and `OUTPUT/masks/{train,val}/*.png` (0 background, label + 1
    elsewhere); with captions also `OUTPUT/annotations/captions_{train,val}.json` (COCO's captions, five an image) and
    in Chinese, caption for caption, `captions_{train,val}_zh.json`. What is held out is in a third part, `held_out`.
    The folder appears when it is complete.

    Args:
        output: folder to write; one that holds the same data set is left as it is, one with anything else is refused.
        settings: what the images are a function of; the defaults of ShapesSettings where not given.
        workers: processes that draw; null: one per core.

    Returns: whether anything was drawn: False where `output` holds this data set already.

    Raises:
        ValueError: `output` holds something else, which is left as it is.
    """
    output = Path(output)
    settings = settings or ShapesSettings()
    if _already_there(output, settings):
        return False
    # Workers leave Ctrl-C to this process, which removes what was begun.
    pool = ProcessPoolExecutor(workers or os.cpu_count(), initializer=ignore_interrupts)
    with folder_beside(output) as folder, pool:
        for split, count in settings.splits.items():
            for part in (folder / split, folder / "masks" / split):
                part.mkdir(parents=True)
            found = pool.map(partial(_write_scene, folder, split, settings), range(count), chunksize=16)
            scenes = list(tqdm(found, f"draw {split}", count, unit="image", leave=False, disable=None))
            images = [scene.image for scene in scenes]
            info = {"description": f"diffperception shapes, {split}, seed {settings.seed}"}
            objects = [entry for scene in scenes for entry in scene.objects]
            categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES, start=1)]
            content = {"info": info, "images": images, "annotations": _numbered(objects), "categories": categories}
            write_json(folder / "annotations" / f"instances_{split}.json", content, indent=None)
            for language, ending in LANGUAGES.items() if settings.captions else ():
                said = [
                    {"image_id": scene.image["id"], "caption": caption[language]}
                    for scene in scenes
                    for caption in scene.captions
                ]
                content = {"info": info | {"language": language}, "images": images, "annotations": _numbered(said)}
                write_json(folder / "annotations" / f"captions_{split}{ending}.json", content, indent=None)
        write_json(folder / SETTINGS_FILE, _as_noted(settings))
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
    if drawn != _as_noted(settings):
        raise ValueError(f"{output} holds shapes drawn with other settings ({drawn}): give a new folder as output")
    return True


def _as_noted(settings: ShapesSettings) -> dict[str, Any]:
    """The settings as JSON has them; those of captions only where there are some."""
    noted = asdict(settings)
    return noted if settings.captions else {k: v for k, v in noted.items() if k not in ("captions", "held_out")}


def _numbered(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry | {"id": k} for k, entry in enumerate(entries, start=1)]


class _Written(NamedTuple):
    image: dict[str, Any]  # COCO's entry
    objects: list[dict[str, Any]]  # its annotations, without ids
    captions: list[dict[str, str]]  # by language


def _write_scene(folder: Path, split: str, settings: ShapesSettings, index: int) -> _Written:
    """Draw and save image `index` of a split."""
    rng = np.random.default_rng([settings.seed, list(settings.splits).index(split), index])
    scene = draw_scene(rng, settings, held_out=split == "held_out")
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
    masks = encode_masks(torch.from_numpy(scene.owner == np.arange(len(scene.labels))[:, None, None]))
    columns = zip(scene.boxes.tolist(), scene.labels.tolist(), areas, masks, strict=True)
    objects = [
        {"image_id": index + 1, "category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area}
        | {"segmentation": mask, "iscrowd": 0}
        for (x1, y1, x2, y2), label, area, mask in columns
    ]
    if not settings.captions:
        return _Written(image, objects, [])
    named = [entry | {"color": color} for entry, color in zip(objects, scene.colors, strict=True)]
    return _Written(image, named, describe_scene(rng, scene))
