"""Tracks in a folder of clips: what the command `track` calls, and notebooks may."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert
from tqdm import tqdm

from diffperception.data.clips import Clip, ClipTable, list_clips, read_clips
from diffperception.data.images import BrokenImageError, load_images, to_float
from diffperception.detection.detector import Detector
from diffperception.detection.evaluator import results_rows
from diffperception.detection.results import IMAGES, describe_results
from diffperception.detection.sampler import BoxSampler
from diffperception.detection.tracks import Tracker, TrackSettings
from diffperception.detection.tracks_scores import TrackScores, require_trackeval, score_tracks
from diffperception.devices import Precision, autocast, first_process, gather, hide_bar, share
from diffperception.diffusion import name_seed
from diffperception.echo import echo_remark
from diffperception.files import safe_names, write_json, write_text
from diffperception.models.base import describe, fingerprint
from diffperception.resumable import Item, ResumableFolder, content_of
from diffperception.visualization.draw import class_color, draw_boxes, save_gif

TRACKS, METRICS = "tracks.json", "metrics.json"
SHOWN_FRAMES = 200  # of a clip's picture, at most


@dataclass(frozen=True)
class TrackedClips:
    """How many clips were tracked, rows of a results file with a track_id each, and scores where they can be scored."""

    clips: int
    rows: list[dict[str, Any]]
    scores: TrackScores | None


def track_folder(
    detector: Detector | str | Path,
    images: str | Path,
    output: str | Path,
    settings: TrackSettings | None = None,
    sampler: BoxSampler | None = None,
    annotations: str | Path | None = None,
    seed: NonNegativeInt = 0,
    score_threshold: ClosedUnitInterval = 0.0,
    num_pictures: NonNegativeInt = 10,
    workers: NonNegativeInt = 2,
    precision: Precision = "32",
    overwrite: bool = False,
) -> TrackedClips:
    """Follow the objects of clips: folders of frames.

    Writes OUTPUT/tracks.json, a COCO results file with a track_id in every row; OUTPUT/images.json, a COCO-video file
    with the clips and frames that its ids are of; OUTPUT/mot, a text file of MOTChallenge for each clip; clips as
    animated GIFs in OUTPUT/pictures, where each track has a colour; and with `annotations` OUTPUT/metrics.json. The
    command can be interrupted: given again, it goes on with the clips that are missing. Several processes, started by
    torchrun, share the clips.

    Args:
        detector: a detector or the file of one.
        images: a folder of clips: each folder below it that holds frames is one, in the order of the numbers in their
            names. With `annotations`, the folder that the names in them are relative to.
        settings: how boxes become tracks.
        sampler: instead of the detector's own, see `Detector.sampler_with`.
        annotations: a COCO-video file, whose clips are tracked, with its ids, and whose tracks these are scored on.
        seed: of the noise, which depends on this, on the name of the clip and on the number of the frame alone.
        score_threshold: boxes with lower scores are left out.
        num_pictures: clips to draw.
        workers: processes that read images.

    Raises:
        FileNotFoundError, ValueError: there is no such image or model, a frame is missing, broken or of another size
            than its clip, the folder is in use, or the annotations cannot be used or have other classes.
        ModuleNotFoundError: there is something to score and trackeval is not installed.
    """
    detector, folder = Detector.loaded(detector).eval(), ResumableFolder(output, overwrite)
    truth = None if annotations is None else read_clips(annotations)
    clips, remark = list_clips(images, folder.path) if truth is None else (truth.clips(images), "")
    category_ids = list(range(1, len(detector.classes) + 1))
    if truth is not None:
        category_ids = truth.table.labels(detector.classes)[0]
    if truth is not None and len(truth.objects):
        require_trackeval()
    for clip in clips:
        clip.require_one_size()
    Tracker(detector, settings, sampler)  # which says what does not fit
    files = safe_names(clip.name for clip in clips)
    noted = {"command": "track", "model": fingerprint(detector), "sampler": describe(sampler), "seed": seed}
    noted |= {"settings": asdict(settings or TrackSettings()), "score_threshold": score_threshold}
    noted |= {"images": str(Path(images).absolute()), "annotations": annotations and content_of(annotations)}
    noted |= {"precision": precision}
    drawn = {clip.name for clip in clips[:num_pictures]}
    of_item: dict[Item, Clip] = {}
    for clip in share(clips):
        planned = [f"mot/{files[clip.name]}.txt"] + ([f"pictures/{files[clip.name]}.gif"] if clip.name in drawn else [])
        of_item[Item(clip.name, _content(clip), tuple(planned))] = clip
    left = folder.left_of(noted, list(of_item), unit="clip")
    folder.begin([IMAGES, TRACKS, METRICS])
    echo_remark(remark)
    tracked = _track(detector, [of_item[item] for item in left], settings, sampler, seed, workers, precision)
    for item, (pixels, found) in zip(left, tracked, strict=True):
        kept = [{k: v[frame["scores"] >= score_threshold] for k, v in frame.items()} for frame in found]
        write_text(folder.file(item.files[0]), mot_lines(kept))
        for name in item.files[1:]:
            save_gif(map(partial(draw_tracks, classes=detector.classes), pixels, kept), folder.file(name))
        numbers = [frame["tracks"].tolist() for frame in kept]
        rows = [results_rows(0, frame, category_ids) for frame in kept]
        named = [
            [row | {"track_id": track} for row, track in zip(*each, strict=True)]
            for each in zip(rows, numbers, strict=True)
        ]
        folder.add(item, item.files, [pixels[0].shape[2], pixels[0].shape[1], named])
    return _finish(folder, clips, folder.results(gather(list(of_item))), truth, category_ids, detector.classes)


def _content(clip: Clip) -> str:
    """A number of the contents of a clip's frames."""
    return hashlib.blake2b("".join(map(content_of, clip.paths)).encode(), digest_size=16).hexdigest()


def _track(
    detector: Detector,
    clips: Sequence[Clip],
    settings: TrackSettings | None,
    sampler: BoxSampler | None,
    seed: int,
    workers: int,
    precision: Precision,
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Of each clip the first frames, uint8, and the tracks in all of them. Shows the time left."""
    samples = (
        sample for batch in load_images([p for c in clips for p in c.paths], 1, workers, True) for sample in batch
    )
    total = sum(len(clip.paths) for clip in clips)
    with tqdm(total=total, desc="track", unit="frame", disable=hide_bar()) as bar:
        for clip in clips:
            tracker = Tracker(detector, settings, sampler, name_seed(seed, Path(clip.name).name))
            pixels: list[Tensor] = []
            found: list[dict[str, Tensor]] = []
            for sample in itertools.islice(samples, len(clip.paths)):
                if sample.image is None:
                    raise BrokenImageError(sample.problem)
                with autocast(detector.device, precision):
                    found.append(tracker.update(to_float(sample.image)))
                pixels += [sample.image] if len(pixels) < SHOWN_FRAMES else []
                bar.update()
            yield pixels, found


def mot_lines(frames: Sequence[Mapping[str, Tensor]]) -> str:
    """The tracks of a clip as MOTChallenge has them: frame from 1, track, x, y, width, height, score, -1, -1, -1."""
    lines = []
    for number, found in enumerate(frames, 1):
        boxes = box_convert(found["boxes"].double(), "xyxy", "xywh").tolist()
        for track, box, score in zip(found["tracks"].tolist(), boxes, found["scores"].tolist(), strict=True):
            lines.append(f"{number},{track},{','.join(f'{value:.2f}' for value in box)},{score:.4f},-1,-1,-1\n")
    return "".join(lines)


def draw_tracks(image: Tensor, found: Mapping[str, Tensor], classes: Sequence[str]) -> Image.Image:
    """A frame (3, H, W) with the boxes of its tracks, each in a color of its own."""
    numbers, labels = found["tracks"].tolist(), found["labels"].tolist()
    texts = [f"{number} {classes[label]}" for number, label in zip(numbers, labels, strict=True)]
    return draw_boxes(image, found["boxes"], [class_color(number) for number in numbers], texts)


def _finish(
    folder: ResumableFolder,
    clips: Sequence[Clip],
    results: Sequence[Any],
    truth: ClipTable | None,
    category_ids: Sequence[int],
    classes: Sequence[str],
) -> TrackedClips:
    """Put together what the clips gave, score it, and write the files that are of all clips."""
    images: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for clip, (width, height, of_frames) in zip(clips, results, strict=True):
        for number, (name, found) in enumerate(zip(clip.frames, of_frames, strict=True)):
            image_id = clip.image_ids[number] if clip.image_ids else len(images) + 1
            entry = {"id": image_id, "file_name": name, "width": width, "height": height}
            images.append(entry | {"video_id": clip.number, "frame_id": number})
            rows += [row | {"image_id": image_id, "video_id": clip.number} for row in found]
    scores = score_tracks(truth, rows) if truth is not None and len(truth.objects) else None
    if first_process():
        videos = [{"id": clip.number, "name": clip.name} for clip in clips]
        described = describe_results(images, category_ids, classes, TRACKS, "ids")
        write_json(folder.file(IMAGES), {"videos": videos, **described}, None)
        write_json(folder.file(TRACKS), rows, None)
        if scores is not None:
            write_json(folder.file(METRICS), asdict(scores))
    return TrackedClips(len(clips), rows, scores)
