"""`diffperception evaluate`: scores of a model, or of its results; which function it is depends on what is given."""

from pathlib import Path
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from diffperception.cli.evaluate_generation import evaluate_sample_folder
from diffperception.data import CocoDetection
from diffperception.data.masks import IGNORE_INDEX, MaskFolder
from diffperception.detection import Detector
from diffperception.detection.evaluator import CocoEvaluator, CocoResult, Protocol, iou_types
from diffperception.detection.inference import draw_predictions, evaluate_detector, write_result
from diffperception.detection.sampler import Mode
from diffperception.detection.sweep import combine, sweep_sampler, write_sweep
from diffperception.devices import Precision, first_process, join_processes, pick_device
from diffperception.echo import echo, plural
from diffperception.files import OutputFolder
from diffperception.segmentation import PixelSegmenter, evaluate_segmenter
from diffperception.segmentation.inference import iou_table


def evaluate_detector_file(
    model: Path,
    annotations: Path,
    images: Path,
    output: Path | None = None,
    device: str = "auto",
    precision: Precision = "32",
    pad_together: bool = False,
    steps: PositiveInt | list[PositiveInt] | None = None,
    num_boxes: PositiveInt | list[PositiveInt] | None = None,
    mode: Mode | list[Mode] | None = None,
    renewal_threshold: ClosedUnitInterval | list[ClosedUnitInterval] | None = None,
    ensemble: bool | list[bool] | None = None,
    eta: ClosedUnitInterval | list[ClosedUnitInterval] | None = None,
    nms_threshold: ClosedUnitInterval | list[ClosedUnitInterval] | None = None,
    protocol: Protocol = "coco",
    masks: bool = False,
    max_dets: int | None = None,
    batch_size: PositiveInt = 8,
    workers: NonNegativeInt = 2,
    seed: NonNegativeInt = 0,
    num_seeds: PositiveInt = 1,
    num_pictures: NonNegativeInt = 8,
    overwrite: bool = False,
    trust: str | None = None,
) -> None:
    """Score a detector on a COCO data set.

    Prints the COCO table and the AP of each class. Where options have several values, as in `--steps 1 2 4`, or there
    are several seeds, it is a sweep instead: AP and seconds of every combination as a table, sweep.json and sweep.png.

    AP depends neither on the batch size nor on the number of processes, up to rounding; to use several, start the
    command with `torchrun --nproc_per_node=N -m diffperception evaluate ...`.

    Args:
        model: the detector, a model.safetensors file.
        annotations: COCO JSON file with the ground truth.
        images: the folder that its file names are relative to.
        output: folder for metrics.json, detections.json and pictures, or for the sweep; nothing is written without it.
        mode: ddim; or a control, which shows what ddim is worth: fixed_time (the time is held) or fresh_boxes (every
            step starts from new noise).
        protocol: coco, or lvis for annotation files of LVIS, which adds APr, APc and APf of rare, common and frequent
            classes.
        masks: score the masks that the detector predicts too.
        max_dets: how many detections count per image, the best first; by default the protocol's number: 100 of each
            class (coco), 300 of all (lvis).
        batch_size: images per prediction.
        pad_together: pad the images of a batch to one size: faster on a GPU, but AP then depends, a little, on the
            batch size.
        workers: processes that read images, for each process that predicts.
        seed: of the noise; the noise of an image depends on this and on its id alone.
        num_seeds: score with so many seeds, from `seed` on.
        num_pictures: how many images are drawn with predictions beside ground truth.
    """
    folder, place = open_folder(output, overwrite), pick_device(device)
    settings = {"mode": mode, "num_boxes": num_boxes, "renewal_threshold": renewal_threshold, "ensemble": ensemble}
    settings |= {"eta": eta, "nms_threshold": nms_threshold, "steps": steps}
    given = {name: value for name, value in settings.items() if value is not None}
    choices = {name: list(dict.fromkeys(x if isinstance(x, list) else [x])) for name, x in given.items()}
    with join_processes():
        detector = Detector.load(model, place, allow=(trust,) if trust else ())
        detector.pad_together = pad_together
        dataset = CocoDetection(annotations, images, masks=masks)
        if num_seeds > 1 or any(len(values) > 1 for values in choices.values()):
            tried = (combine(detector, choices), range(seed, seed + num_seeds))
            sweep = sweep_sampler(detector, dataset, *tried, batch_size, workers, max_dets, protocol, precision)
            echo(sweep.table())
            if folder is not None and first_process():
                write_sweep(sweep, folder)
                echo(f"\n{folder.path / 'sweep.json'}: these numbers")
                echo(f"{folder.path / 'sweep.png'}: AP against passes and seconds")
            return
        sampler = detector.sampler_with(**{name: values[0] for name, values in choices.items()})
        result = evaluate_detector(
            detector, dataset, None, batch_size, workers, max_dets, seed, sampler, protocol, precision
        )
        finish(result, folder)
        if folder is not None and first_process():
            draw_predictions(detector, dataset, folder, num_pictures, seed, sampler, precision)
            echo(f"{folder.path / 'pictures'}: predictions beside ground truth")


def score_results(
    results: Path,
    annotations: Path,
    output: Path | None = None,
    protocol: Protocol = "coco",
    masks: bool = False,
    max_dets: int | None = None,
    overwrite: bool = False,
) -> None:
    """Score a COCO results file: print the COCO table and the AP of each class.

    Args:
        results: the COCO results file.
        annotations: COCO JSON file with the ground truth.
        output: folder for metrics.json and detections.json; nothing is written without it.
        protocol: coco, or lvis for annotation files of LVIS.
        masks: score the masks in the results too.
        max_dets: how many detections count per image, the best first; by default the protocol's number.
    """
    folder = open_folder(output, overwrite)
    evaluator = CocoEvaluator(annotations, iou_types(masks), max_dets, None, protocol)
    finish(evaluator.score_results(results), folder)


def open_folder(output: Path | None, overwrite: bool) -> OutputFolder | None:
    return None if output is None else OutputFolder(output, overwrite)


def finish(result: CocoResult, folder: OutputFolder | None) -> None:
    """Print the table and write the numbers."""
    echo(result.table())
    if folder is not None and first_process():
        write_result(result, folder)
        echo(f"\n{folder.path / 'metrics.json'}: these numbers\n{folder.path / 'detections.json'}: every predicted box")


def evaluate_segmenter_file(
    model: Path,
    images: Path,
    masks: Path,
    annotations: Path | None = None,
    max_images: PositiveInt | None = None,
    unlabelled: Literal["stop", "skip"] = "stop",
    ignore: int | None = IGNORE_INDEX,
    mask_values: dict[int, int] | None = None,
    output: Path | None = None,
    pictures: NonNegativeInt = 4,
    workers: NonNegativeInt = 2,
    device: str = "auto",
    precision: Precision = "32",
    seed: NonNegativeInt = 0,
    overwrite: bool = False,
    trust: str | None = None,
) -> None:
    """Score a segmenter on images with masks: IoU per class, and their mean.

    Pixels are counted over all images, at the masks' own size. Pixels without a label count nowhere, and a class that
    neither the masks nor the predictions have is left out of the mean.

    Args:
        model: the segmenter, a model.safetensors file.
        images: folder with pictures.
        masks: folder with their masks, of the same names: PNG of one channel or NPY, in each pixel its class's number.
        annotations: only the images are used that this COCO JSON file lists, or this text file with a name per line.
        max_images: use only so many of the images, chosen by the seed; by default all.
        unlabelled: what to do at an image without a mask: stop, naming it, or leave it out.
        ignore: the value in masks of pixels without a label; null for none.
        mask_values: class numbers of the values in masks where they differ, such as '{0: 0, 255: 1}'.
        output: folder for metrics.json and pictures/; nothing is written without it.
        pictures: how many are drawn, spread over the images: image, truth, prediction and uncertainty.
        seed: seed of which images `max_images` chooses.
    """
    segmenter = PixelSegmenter.load(model, pick_device(device), allow=(trust,) if trust else ())
    number = len(segmenter.classes)
    folder = MaskFolder(images, masks, number, ignore, mask_values, annotations, unlabelled, max_images, seed)
    with join_processes():
        metrics = evaluate_segmenter(segmenter, folder, output, pictures, workers, precision, overwrite)
    echo(f"{iou_table(metrics)}\non the labelled pixels of {plural(len(folder), 'image')}")
    if output is not None:
        echo(f"{output}: these numbers in metrics.json" + (", and pictures/" if pictures else ""))


BY_KIND = {
    "samples": evaluate_sample_folder,
    "results": score_results,
    "detector": evaluate_detector_file,
    "segmenter": evaluate_segmenter_file,
}
