"""`diffperception predict`: what a model sees in images; which function it is depends on the model."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from diffperception.configuration.parser import OptionsOf
from diffperception.detection import Detector
from diffperception.detection.inference import FolderResult, detect_folder
from diffperception.devices import join_processes, pick_device
from diffperception.echo import echo, echo_left_out, plural
from diffperception.segmentation import PixelSegmenter, segment_folder
from diffperception.segmentation.inference import SHEET, FolderScores


def predict_detector(
    model: Path,
    detect: Annotated[partial[FolderResult], OptionsOf(detect_folder, "detector", "sampler")],
    steps: PositiveInt | None = None,
    num_boxes: PositiveInt | None = None,
    renewal_threshold: ClosedUnitInterval | None = None,
    ensemble: bool | None = None,
    eta: ClosedUnitInterval | None = None,
    nms_threshold: ClosedUnitInterval | None = None,
    box_voting: ClosedUnitInterval | None = None,
    spread: bool | None = None,
    start_time: NonNegativeInt | Literal["noise"] | None = None,
    device: str = "auto",
) -> None:
    place = pick_device(device)
    with join_processes():
        detector = Detector.load(model, place)
        settings = {"renewal_threshold": renewal_threshold, "nms_threshold": nms_threshold, "box_voting": box_voting}
        settings |= {"spread": spread, "start_time": start_time}
        sampler = detector.sampler_with(steps=steps, num_boxes=num_boxes, ensemble=ensemble, eta=eta, **settings)
        found = detect(detector, sampler=sampler)
    number, output = plural(len(found.detections), "detection"), detect.keywords["output"]
    echo(f"{number} in {plural(len(found.images), 'image')}: {output}")
    echo_left_out(found.broken)


def predict_segmenter(
    model: Path, segment: Annotated[partial[FolderScores], OptionsOf(segment_folder, "model")], device: str = "auto"
) -> None:
    segmenter = PixelSegmenter.load(model, pick_device(device))
    with join_processes():
        found = segment(segmenter)
    if segment.keywords["rank"]:
        first = ", ".join(f"{score.name} ({score.uncertainty:.2g})" for score in found.ranked()[:SHEET])
        echo(f"label next, the most uncertain first, all in rank.csv and these in rank.png: {first}")
    echo(f"masks of {plural(len(found.scores), 'image')}, pictures and scores.csv are in {segment.keywords['output']}")
    echo_left_out(found.broken)


BY_KIND = {"detector": predict_detector, "segmenter": predict_segmenter}
