"""The shapes data set on disk: images, COCO annotations and class masks."""

import json
import os
from collections.abc import Iterator
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
from diffperception.data.moving_shapes import draw_clip
from diffperception.data.outlines import encode_masks
from diffperception.data.shapes import CLASSES, ShapesSettings, draw_scene
from diffperception.data.shapes_captions import LANGUAGES, describe_scene
from diffperception.files import folder_beside, write_json

SETTINGS_FILE = "shapes.json"
CLIPS = 3  # of the numbers that clips are drawn from, beside the seed; images have those below
CATEGORIES = [{"id": k, "name": name} for k, name in enumerate(CLASSES, start=1)]


def write_shapes(output: str | Path, settings: ShapesSettings | None = None, workers: int | None = None) -> bool:
    """Draw the data set into a new folder; the same settings give the same images on every machine.

    Writes `OUTPUT/{train,val}/*.png`, `OUTPUT/annotations/instances_{train,val}.json` (COCO: category id = label + 1,
    segmentation = run lengths of what is visible) and `OUTPUT/masks/{train,val}/*.png` (0 background, label + 1
    elsewhere); with captions also `OUTPUT/annotations/captions_{train,val}.json` (COCO's captions, five an image) and
    in Chinese, caption for caption, `captions_{train,val}_zh.json`. What is held out is in a third part, `held_out`.
    Clips, if any are asked for, are in `OUTPUT/clips/*/*.png` with `OUTPUT/annotations/clips.json` (COCO-video). The
    folder appears when it is complete.

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
            content = {"info": info, "images": images, "annotations": _numbered(objects), "categories": CATEGORIES}
            write_json(folder / "annotations" / f"instances_{split}.json", content, indent=None)
            for language, ending in LANGUAGES.items() if settings.captions else ():
                said = [
                    {"image_id": scene.image["id"], "caption": caption[language]}
                    for scene in scenes
                    for caption in scene.captions
                ]
                content = {"info": info | {"language": language}, "images": images, "annotations": _numbered(said)}
                write_json(folder / "annotations" / f"captions_{split}{ending}.json", content, indent=None)
        if settings.clips:
            drawn = pool.map(partial(_write_clip, folder, settings), range(settings.clips))
            clips = list(tqdm(drawn, "draw clips", settings.clips, unit="clip", leave=False, disable=None))
            write_json(folder / "annotations" / "clips.json", _clips_content(settings, clips), indent=None)
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
    """The settings as JSON has them; those of captions and of clips only where there are some."""
    idle = ([] if settings.captions else ["captions", "held_out"]) + ([] if settings.clips else ["clips", "frames"])
    return {name: value for name, value in asdict(settings).items() if name not in idle}


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
    areas = np.bincount(scene.owner[scene.owner >= 0], minlength=len(scene.labels))
    image = {"id": index + 1, "file_name": name, "width": width, "height": height}
    masks = encode_masks(torch.from_numpy(scene.owner == np.arange(len(scene.labels))[:, None, None]))
    objects = [
        {"image_id": index + 1, **entry, "segmentation": mask, "iscrowd": 0}
        for entry, mask in zip(_entries(scene.labels, scene.boxes, areas), masks, strict=True)
    ]
    if not settings.captions:
        return _Written(image, objects, [])
    named = [entry | {"color": color} for entry, color in zip(objects, scene.colors, strict=True)]
    return _Written(image, named, describe_scene(rng, scene))


def _entries(labels: np.ndarray, boxes: np.ndarray, areas: np.ndarray) -> Iterator[dict[str, Any]]:
    """What a COCO file says of each object of an image."""
    for label, (x1, y1, x2, y2), area in zip(labels.tolist(), boxes.tolist(), areas.tolist(), strict=True):
        yield {"category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area}


def _write_clip(
    folder: Path, settings: ShapesSettings, index: int
) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Draw and save clip `index`; returns each frame's COCO image entry, and its annotations, but for their ids."""
    frames, entries = draw_clip(np.random.default_rng([settings.seed, CLIPS, index]), settings), []
    first = index * settings.max_objects + 1  # no two clips have a number of a track in common
    (folder / "clips" / f"{index:06d}").mkdir(parents=True)
    for number, frame in enumerate(frames):
        name = f"{index:06d}/{number:06d}.png"
        Image.fromarray(frame.image).save(folder / "clips" / name, compress_level=1)
        height, width = frame.image.shape[:2]
        image = {"file_name": name, "width": width, "height": height, "video_id": index + 1, "frame_id": number}
        of_track = zip(frame.tracks.tolist(), frame.visibility.round(4).tolist(), strict=True)
        tracked = [{"iscrowd": 0, "track_id": first + track, "visibility": seen} for track, seen in of_track]
        objects = _entries(frame.labels, frame.boxes, frame.areas)
        entries.append((image, [entry | track for entry, track in zip(objects, tracked, strict=True)]))
    return entries


def _clips_content(
    settings: ShapesSettings, clips: list[list[tuple[dict[str, Any], list[dict[str, Any]]]]]
) -> dict[str, Any]:
    """Of the COCO-video file."""
    videos = [
        {"id": number, "name": f"{number - 1:06d}", "length": settings.frames} for number in range(1, len(clips) + 1)
    ]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image, objects in (frame for clip in clips for frame in clip):
        images.append({"id": len(images) + 1, **image})
        ids = {"image_id": len(images), "video_id": image["video_id"]}
        annotations += [ids | entry for entry in objects]
    info = {"description": f"diffperception shapes, clips, seed {settings.seed}"}
    content = {"images": images, "annotations": _numbered(annotations), "categories": CATEGORIES}
    return {"info": info, "videos": videos, **content}
