"""`diffperception track`: objects followed through clips."""

from functools import partial
from pathlib import Path
from typing import Annotated

from jsonargparse.typing import PositiveInt

from diffperception.configuration.parser import Flat, OptionsOf
from diffperception.detection import Detector
from diffperception.detection.tracks import TrackSettings
from diffperception.detection.tracks_inference import TRACKS, TrackedClips, track_folder
from diffperception.devices import join_processes, pick_device
from diffperception.echo import echo, plural


def command(
    model: Path,
    follow: Annotated[partial[TrackedClips], OptionsOf(track_folder, "detector", "settings", "sampler")],
    settings: Flat[TrackSettings],
    steps: PositiveInt | None = None,
    num_boxes: PositiveInt | None = None,
    device: str = "auto",
) -> None:
    place = pick_device(device)
    with join_processes():
        detector = Detector.load(model, place)
        sampler = detector.sampler_with(steps=steps, num_boxes=num_boxes)
        found = follow(detector, settings=settings, sampler=sampler)
    tracks = len({(row["video_id"], row["track_id"]) for row in found.rows})
    results = Path(follow.keywords["output"], TRACKS)
    echo(f"{plural(tracks, 'track')} in {plural(found.clips, 'clip')}: {results}")
    if found.scores is not None:
        echo(f"\n{found.scores.table()}")
