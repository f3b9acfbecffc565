"""`diffperception predict`: what a model sees in images; which function it is depends on the model."""

from pathlib import Path

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from diffperception.detection import Detector
from diffperception.detection.inference import detect_folder
from diffperception.devices import Precision, join_processes, pick_device
from diffperception.echo import echo, plural
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
        images: an image, a folder (its subfolders count too), or a pattern in quotes such as 'photos/*.jpg'.
        output: folder for the results; it is made if it is not there.
        steps: passes from noise to boxes; more are slower and a little better. By default the model's own number.
        num_boxes: boxes to start from; more find more in crowded images. By default the model's own number.
        renewal_threshold: between steps, boxes with no class above this probability are drawn anew; 0 turns it off. By
            default the model's own, 0.5 if it has none.
        ensemble: whether the detections of all steps count, or the last step's alone.
        eta: how much noise a step adds: 1 is the ancestral step, 0 the deterministic one.
        nms_threshold: of two boxes of a class whose IoU is above this, only the better counts; 1 turns it off.
        score_threshold: boxes with a lower score are not drawn; predictions.json has them all.
        num_pictures: the detections of at most this many images are drawn.
        num_trajectories: noise turning into boxes is drawn for at most this many images.
        batch_size: images that are predicted together; the results do not depend on it, up to rounding.
        workers: processes that read images.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        precision: bf16 computes the network's products in bfloat16, faster on recent GPUs; 32 in float32.
        seed: of the noise that boxes start from; it and the name of an image decide the noise of that image.
        overwrite: write into a folder that is not empty; what an earlier run wrote there is replaced.
        trust: a Python package of your own whose model classes the model file may name.
    """
    place = pick_device(device)
    with join_processes():
        detector = Detector.load(model, place, allow=(trust,) if trust else ())
        sampler = detector.sampler_with(
            steps=steps,
            num_boxes=num_boxes,
            renewal_threshold=renewal_threshold,
            ensemble=ensemble,
            eta=eta,
            nms_threshold=nms_threshold,
        )
        drawing = (score_threshold, num_pictures, num_trajectories)
        found = detect_folder(
            detector, images, output, sampler, seed, *drawing, batch_size, workers, precision, overwrite
        )
    echo(f"{plural(len(found.detections), 'detection')} in {plural(len(found.images), 'image')}: {output}")
    if found.broken:
        echo("\n  ".join([f"{plural(len(found.broken), 'image')} left out:", *found.broken]))


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
        images: an image, a folder (its subfolders count too), or a pattern in quotes such as 'photos/*.jpg'.
        output: folder for the results.
        rank: order the images by their uncertainty.
        labelled: folder of masks; images that have one there are left out.
        pictures: draw the overlays and uncertainties of at most this many images.
        workers: processes that read images.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        precision: bf16 computes the networks' products in bfloat16, faster on recent GPUs; 32 in float32.
        overwrite: write into a folder that is not empty, in place of what an earlier run wrote there.
        trust: a Python package of your own whose classes the model file may name.
    """
    segmenter = PixelSegmenter.load(model, pick_device(device), allow=(trust,) if trust else ())
    with join_processes():
        found = segment_folder(segmenter, images, output, rank, labelled, pictures, workers, precision, overwrite)
    if rank:
        first = ", ".join(f"{score.name} ({score.uncertainty:.2g})" for score in found.ranked()[:SHEET])
        echo(f"label next, the most uncertain first, all in rank.csv and these in rank.png: {first}")
    echo(f"masks of {plural(len(found.scores), 'image')}, pictures and scores.csv are in {output}")
    if found.broken:
        echo("\n  ".join([f"{plural(len(found.broken), 'image')} left out:", *found.broken]))


BY_KIND = {"detector": predict_detector, "segmenter": predict_segmenter}
