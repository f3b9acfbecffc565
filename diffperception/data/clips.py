"""Clips: folders of frames, and the COCO-video files that say which objects of several frames are one."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffperception.data.annotations import ID, CocoTable, read_coco, tabulate
from diffperception.data.entries import Rule, faults, integers, text
from diffperception.data.images import read_size
from diffperception.data.listing import list_images
from diffperception.data.soundness import require_entries

OTHER_NAMES = {"frame_id": "frame_index", "track_id": "instance_id"}  # by which some files have them
VIDEO_RULES: dict[str, dict[str, Rule]] = {
    "videos": {"id": ID, "name": Rule(text, "a text", optional=True)},
    "images": {"video_id": ID, "frame_id": ID},
    "annotations": {"track_id": ID},
}


@dataclass(frozen=True)
class Clip:
    """A number, a name and the frames in their order, also by the names that results know: `street/0001.png`."""

    number: int
    name: str
    frames: tuple[str, ...]
    paths: tuple[Path, ...]
    image_ids: tuple[int, ...] | None = None  # of the frames, where a file of annotations gives them some

    def require_one_size(self) -> None:
        """ValueError if frames differ in size; BrokenImageError if one cannot be read or is missing."""
        first = read_size(self.paths[0])
        for path in self.paths[1:]:
            if (size := read_size(path)) != first:
                raise ValueError(
                    f"the frames of clip {self.name} differ in size: {self.paths[0]} is {first[1]}x{first[0]} pixels,"
                    f" {path} is {size[1]}x{size[0]}; give each clip a folder of its own"
                )


@dataclass(frozen=True)
class ClipTable:
    """A checked COCO-video file: its columns, and to which clips images and objects belong."""

    table: CocoTable
    ids: list[int]  # of the clips
    names: list[str]
    images: list[list[int]]  # of each clip: rows of the table's images, in the order of the frames
    tracks: np.ndarray  # (A,) int64: the track of each annotation

    @property
    def objects(self) -> np.ndarray:
        """(n,) rows of the annotations that tracks are scored on: those with an area, but for crowds."""
        return np.flatnonzero((self.table.boxes[:, 2:] > 0).all(axis=1) & ~self.table.iscrowd)

    def clips(self, folder: str | Path) -> list[Clip]:
        """The clips, with the frames in this folder; those without frames are none."""
        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"there is no image folder {folder}, in which the frames of {self.table.source} would be"
            )
        found = []
        for number, name, rows in zip(self.ids, self.names, self.images, strict=True):
            files = [self.table.file_names[row] for row in rows]
            ids = tuple(self.table.image_ids[rows].tolist())
            found.append(Clip(number, name, tuple(files), tuple(Path(folder, file) for file in files), ids))
        return [clip for clip in found if clip.frames]


def list_clips(images: str | Path, leave_out: Path | None = None) -> tuple[list[Clip], str]:
    """Clips of a folder: every folder below it that holds frames is one, and so is itself; and what was left out.

    Frames count in the order of their names, numbers in them as numbers: 9.png comes before 10.png.

    Args:
        images: the folder, or whatever else names images, see `list_images`.
        leave_out: a folder whose files do not count, such as a command's own output.

    Raises:
        FileNotFoundError, ValueError: as of `list_images`.
    """
    root, paths, remark = list_images(images, leave_out=leave_out)
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    clips: list[Clip] = []
    for folder, frames in folders.items():
        alone = len(folders) == 1 and folder == root
        name = folder.absolute().name if alone else folder.relative_to(root).as_posix()
        ordered = sorted(frames, key=lambda path: _by_numbers(path.name))
        clips.append(
            Clip(len(clips) + 1, name, tuple(Path(name, path.name).as_posix() for path in ordered), tuple(ordered))
        )
    return clips, remark


def _by_numbers(name: str) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if number % 2 else (-1, part) for number, part in enumerate(parts)], name


def read_clips(path: str | Path) -> ClipTable:
    """A COCO-video file: a COCO file with `videos`, whose images name their `video_id` and `frame_id`.

    Frame ids (or `frame_index`) count from any number and may leave frames out. Annotations name their `track_id` (or
    `instance_id`): what is the same object in several images of a clip.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no COCO-video file, or an entry cannot be used; the message names the first.
    """
    content = read_coco(path)
    if not isinstance(content.get("videos"), list):
        raise ValueError(f'{path} is not a COCO-video file: it has no list "videos" of the clips that images are of')
    for section in ("images", "annotations"):
        for entry in (entry for entry in content[section] if isinstance(entry, dict)):
            for name, other in OTHER_NAMES.items():
                if entry.get(name) is None and other in entry:
                    entry[name] = entry[other]
    table = tabulate(content, path)
    require_entries(table)
    for section, rules in VIDEO_RULES.items():
        for number, entry in enumerate(content[section]):
            if fault := next(faults(entry, rules), None):
                raise ValueError(f"{path} cannot be used: {section}[{number}]{_id_of(entry)}: {fault}")
    return _grouped(content, table)


def _id_of(entry: Any) -> str:
    return f" (id {entry['id']!r})" if isinstance(entry, dict) and "id" in entry else ""


def _grouped(content: dict[str, Any], table: CocoTable) -> ClipTable:
    videos, frames = (
        integers([image[key] for image in content["images"]]).tolist() for key in ("video_id", "frame_id")
    )
    ids = integers([video["id"] for video in content["videos"]]).tolist()
    _require_once(ids, lambda k: f"two videos have the id {ids[k]}", table)
    known = {number: position for position, number in enumerate(ids)}
    if lost := [row for row, number in enumerate(videos) if number not in known]:
        raise ValueError(
            f"{table.source} cannot be used: images[{lost[0]}] (id {table.image_ids[lost[0]]}): its video_id is"
            f" {videos[lost[0]]}, but no video has that id"
        )
    pairs = list(zip(videos, frames, strict=True))
    _require_once(pairs, lambda k: f"two images of video {videos[k]} have the frame_id {frames[k]}", table)
    images: list[list[int]] = [[] for _ in ids]
    for row in sorted(range(len(pairs)), key=pairs.__getitem__):
        images[known[videos[row]]].append(row)
    tracks = integers([entry["track_id"] for entry in content["annotations"]])
    seen = list(zip(table.annotation_images.tolist(), tracks.tolist(), strict=True))
    _require_once(seen, lambda k: f"two annotations of image {seen[k][0]} are of track {seen[k][1]}", table)
    given = [video.get("name") or f"video {number}" for video, number in zip(content["videos"], ids, strict=True)]
    _require_once(given, lambda k: f"two videos have the name {given[k]}", table)
    return ClipTable(table, ids, given, images, tracks)


def _require_once(values: Sequence[Any], words: Any, table: CocoTable) -> None:
    """ValueError, with the words for the first of them, if some value is there twice."""
    count = Counter(values)
    if twice := [position for position, value in enumerate(values) if count[value] > 1]:
        raise ValueError(f"{table.source} cannot be used: {words(twice[0])}")
