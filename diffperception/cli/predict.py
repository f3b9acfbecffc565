"""`diffperception predict`: what a model sees in images; which function it is depends on the model."""

from pathlib import Path

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from diffperception.detection import Detector
from diffperception.detection.inference import detect_folder
from diffperception.devices import Precision, join_processes, pick_device
from diffperception.echo import echo, echo_left_out, plural
from diffperception.segmentation import PixelSegmenter, segment_folder
from diffperception.segmentation.inference import SHEET
from diffperception.visualization.draw import THRESHOLD


def predict_detector(
    model: Path,
    images: str,
    output: Path,
    steps: PositiveInt | None = None,
    num_boxes: PositiveInt | None = None,
    renewal_threshold: ClosedUnitInterval | None = None,
    ensemble: bool | None = None,
    eta: ClosedUnitInterval | None = None,
    nms_threshold: ClosedUnitInterval | None = None,
    device: str = "auto",
    precision: Precision = "32",
    score_threshold: ClosedUnitInterval = THRESHOLD,
    num_pictures: NonNegativeInt = 100,
    num_trajectories: NonNegativeInt = 3,
    batch_size: PositiveInt = 1,
    workers: NonNegativeInt = 2,
    seed: NonNegativeInt = 0,
    overwrite: bool = False,
    trust: str | None = None,
) -> None:
    """Detect objects in an image, or in all images of a folder.

    Writes OUTPUT/predictions.json, a COCO results file with all detections; OUTPUT/images.json, a COCO file with the
    images' ids, names and sizes and with the categories; OUTPUT/pictures, the images with their detections; and
    OUTPUT/trajectories, where noise turns into boxes. Images that cannot be read are left out and named at the end.
    Start it with torchrun to share the images among several GPUs.

    Args:
        model: file that training wrote, model.safetensors.
        score_threshold: boxes with a lower score are not drawn; predictions.json has them all.
        num_pictures: the detections of at most this many images are drawn.
        num_trajectories: noise turning into boxes is drawn for at most this many images.
        batch_size: images that are predicted together; the results do not depend on it, up to rounding.
        seed: of the noise that boxes start from; it and the name of an image decide the noise of that image.
    """
    place = pick_device(device)
    with join_processes():
        detector = Detector.load(model, place, allow=(trust,) if trust else ())
        thresholds = {"renewal_threshold": renewal_threshold, "nms_threshold": nms_threshold}
        sampler = detector.sampler_with(steps=steps, num_boxes=num_boxes, ensemble=ensemble, eta=eta, **thresholds)
        drawing = (score_threshold, num_pictures, num_trajectories)
        found = detect_folder(
            detector, images, output, sampler, seed, *drawing, batch_size, workers, precision, overwrite
        )
    echo(f"{plural(len(found.detections), 'detection')} in {plural(len(found.images), 'image')}: {output}")
    echo_left_out(found.broken)


def predict_segmenter(
    model: Path,
    images: str,
    output: Path,
    rank: bool = False,
    labelled: Path | None = None,
    device: str = "auto",
    precision: Precision = "32",
    pictures: NonNegativeInt = 100,
    workers: NonNegativeInt = 2,
    overwrite: bool = False,
    trust: str | None = None,
) -> None:
    """Say of every pixel of an image, or of all images in a folder, which class it is.

    Writes OUTPUT/masks (PNG, in each pixel its class's number), OUTPUT/overlays (the images with their classes in
    colours), OUTPUT/uncertainty (where the members of the ensemble disagree) and OUTPUT/scores.csv: each image's
    uncertainty (in nats, the mean of its most uncertain tenth) and the fractions of the classes. With `--rank` also
    OUTPUT/rank.csv, the images with the most uncertain first, and OUTPUT/rank.png, which shows the first of them:
    those to label next. Images that cannot be read are left out and named at the end. scores.csv is written once all
    images are done: a folder without it is of a run that was interrupted.

    Args:
        model: the segmenter, a model.safetensors file.
        rank: order the images by their uncertainty.
        labelled: folder of masks; images that have one there are left out.
        pictures: draw the overlays and uncertainties of at most this many images.
    """
    segmenter = PixelSegmenter.load(model, pick_device(device), allow=(trust,) if trust else ())
    with join_processes():
        found = segment_folder(segmenter, images, output, rank, labelled, pictures, workers, precision, overwrite)
    if rank:
        first = ", ".join(f"{score.name} ({score.uncertainty:.2g})" for score in found.ranked()[:SHEET])
        echo(f"label next, the most uncertain first, all in rank.csv and these in rank.png: {first}")
    echo(f"masks of {plural(len(found.scores), 'image')}, pictures and scores.csv are in {output}")
    echo_left_out(found.broken)


BY_KIND = {"detector": predict_detector, "segmenter": predict_segmenter}
