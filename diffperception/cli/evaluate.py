"""`diffperception evaluate`: scores of a model, or of its results; which function it is depends on what is given."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch import Tensor
from tqdm import tqdm

from diffperception.configuration.parser import Flat, OptionsOf
from diffperception.data import CocoDetection
from diffperception.data.clips import read_clips
from diffperception.data.formats import Format, open_annotations
from diffperception.data.images import read_size
from diffperception.data.listing import list_images
from diffperception.data.masks import MaskDataOptions, MaskFolder
from diffperception.detection import Detector
from diffperception.detection.evaluator import CocoEvaluator, CocoResult, iou_types
from diffperception.detection.inference import draw_predictions, evaluate_detector, require_classes, write_result
from diffperception.detection.sampler import Mode
from diffperception.detection.sweep import combine, sweep_sampler, write_sweep
from diffperception.detection.tracks_scores import read_tracks, score_tracks
from diffperception.devices import first_process, hide_bar, join_processes, pick_device
from diffperception.echo import echo, echo_notes, plural
from diffperception.files import OutputFolder, write_json
from diffperception.generation.drawn import drawn_table, judge_drawn
from diffperception.generation.evaluator import ScoringOptions, evaluate_samples
from diffperception.segmentation import FeatureExtractor, PixelSegmenter, evaluate_segmenter
from diffperception.segmentation.correspondence import controls
from diffperception.segmentation.inference import iou_table
from diffperception.segmentation.zero_shot import CutOptions, hungarian_iou
from diffperception.table import format_table

VAL = ("val_images", "val_masks", "val_annotations", "val_share", "split_seed")  # of a training


def evaluate_detector_file(
    model: Path,
    annotations: Path,
    score: Annotated[
        partial[CocoResult],
        OptionsOf(evaluate_detector, "detector", "dataset", "num_images", "workers", "seed", "sampler"),
    ],
    images: Path | None = None,
    format: Format = "coco",
    output: Path | None = None,
    device: str = "auto",
    pad_together: bool = False,
    steps: PositiveInt | list[PositiveInt] | None = None,
    num_boxes: PositiveInt | list[PositiveInt] | None = None,
    mode: Mode | list[Mode] | None = None,
    renewal_threshold: ClosedUnitInterval | list[ClosedUnitInterval] | None = None,
    ensemble: bool | list[bool] | None = None,
    eta: ClosedUnitInterval | list[ClosedUnitInterval] | None = None,
    nms_threshold: ClosedUnitInterval | list[ClosedUnitInterval] | None = None,
    box_voting: ClosedUnitInterval | list[ClosedUnitInterval] | None = None,
    spread: bool | list[bool] | None = None,
    start_time: NonNegativeInt | Literal["noise"] | list[NonNegativeInt | Literal["noise"]] | None = None,
    masks: bool = False,
    workers: NonNegativeInt = 2,
    seed: NonNegativeInt = 0,
    num_seeds: PositiveInt = 1,
    num_pictures: NonNegativeInt = 8,
    overwrite: bool = False,
) -> None:
    """Score a detector on a COCO data set, or one of another format.

    Prints the COCO table and the AP of each class. Where options have several values, as in `--steps 1 2 4`, or there
    are several seeds, it is a sweep instead: AP and seconds of every combination as a table, sweep.json and sweep.png.

    AP depends neither on the batch size nor on the number of processes, up to rounding; to use several, start the
    command with `torchrun --nproc_per_node=N -m diffperception evaluate ...`.

    Args:
        annotations: COCO JSON file, or what `format` says, with the ground truth; `data.yaml:val` is one part of it.
        images: the folder that its file names are relative to; by default where the format has it.
        format: coco, voc (Pascal VOC), yolo, cvat, labelstudio, labelme or csv; auto looks for itself.
        output: folder for metrics.json, detections.json and pictures, or for the sweep; nothing is written without it.
        mode: ddim; or a control, which shows what ddim is worth: fixed_time (the time is held) or fresh_boxes (every
            step starts from new noise).
        masks: score the masks that the detector predicts too.
        pad_together: pad the images of a batch to one size: faster on a GPU, but AP then depends, a little, on the
            batch size.
        workers: processes that read images, for each process that predicts.
        seed: seed of the noise; the noise of an image depends on this and on its id alone.
        num_seeds: score with so many seeds, from `seed` on.
        num_pictures: how many images are drawn with predictions beside ground truth.
    """
    folder, place = OutputFolder(output, overwrite) if output else None, pick_device(device)
    settings = {"mode": mode, "num_boxes": num_boxes, "renewal_threshold": renewal_threshold, "ensemble": ensemble}
    settings |= {"eta": eta, "nms_threshold": nms_threshold, "box_voting": box_voting, "start_time": start_time}
    settings |= {"spread": spread, "steps": steps}
    with join_processes():
        detector = Detector.load(model, place)
        detector.pad_together = pad_together
        found = open_annotations(annotations, images, format, masks, detector.classes)
        dataset = CocoDetection(found, masks=masks)
        for note in found.notes:
            echo(f"note: {note}")
        dataset.require_files()
        require_classes(detector.classes, dataset)
        dataset.order_classes(detector.classes)
        samplers, seeds = combine(detector, settings), range(seed, seed + num_seeds)
        if len(samplers) * num_seeds > 1:
            sweep = sweep_sampler(detector, dataset, samplers, seeds, workers=workers, **score.keywords)
            echo(sweep.table())
            if folder is not None and first_process():
                folder.clear()
                write_sweep(sweep, folder)
                echo(f"\n{folder.path / 'sweep.json'}: these numbers")
                echo(f"{folder.path / 'sweep.png'}: AP against passes and seconds")
            return
        finish(score(detector, dataset, workers=workers, seed=seed, sampler=samplers[0]), folder)
        if folder is not None and first_process():
            shared = {name: score.keywords[name] for name in ("precision", "batch_size", "tile", "overlap", "start")}
            draw_predictions(detector, dataset, folder, num_pictures, seed, samplers[0], **shared)
            echo(f"{folder.path / 'pictures'}: predictions beside ground truth")


def evaluate_results(
    results: Path,
    evaluator: Annotated[partial[CocoEvaluator], OptionsOf(CocoEvaluator, "iou_types", "image_ids")],
    masks: bool = False,
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Score a COCO results file: print the COCO table and the AP of each class.

    Its image and category ids must be those of the annotation file. Of a file that `predict` has written, whose ids are
    listed in the images.json beside it, they are found by the names of files and classes.

    Args:
        results: the COCO results file.
        masks: score the masks in the results too.
        output: folder for metrics.json and detections.json; nothing is written without it.
    """
    folder = OutputFolder(output, overwrite) if output else None
    finish(evaluator(iou_types=iou_types(masks)).score_results(results), folder)


def evaluate_tracks(tracks: Path, annotations: Path, output: Path | None = None, overwrite: bool = False) -> None:
    """Score tracks, a COCO results file with a track_id in each row: HOTA, IDF1, MOTA and identity switches.

    Every class is scored by itself, and all objects together. Its ids must be those of the annotation file; of a file
    that `track` has written they are found by the names of files and classes.

    Args:
        tracks: the results file.
        annotations: COCO-video file with the ground truth.
        output: folder for metrics.json; nothing is written without it.
    """
    folder = OutputFolder(output, overwrite) if output else None
    truth = read_clips(annotations)
    rows, notes = read_tracks(tracks, truth)
    scores = score_tracks(truth, rows, notes)
    echo(scores.table())
    if folder is not None:
        folder.clear()
        write_json(folder.file("metrics.json"), asdict(scores))
        echo(f"\n{folder.path / 'metrics.json'}: these numbers")


def finish(result: CocoResult, folder: OutputFolder | None) -> None:
    """Print the table and write the numbers."""
    echo(result.table())
    if folder is not None and first_process():
        folder.clear()
        write_result(result, folder)
        echo(f"\n{folder.path / 'metrics.json'}: these numbers\n{folder.path / 'detections.json'}: every predicted box")


def evaluate_segmenter_file(
    model: Path,
    data: Annotated[partial[MaskDataOptions], OptionsOf(MaskDataOptions, "classes", "short_side", *VAL)],
    score: Annotated[partial[dict[str, Any]], OptionsOf(evaluate_segmenter, "model", "folder")],
    device: str = "auto",
    seed: NonNegativeInt = 0,
) -> None:
    """Score a segmenter on images with masks: IoU per class, and their mean.

    Pixels are counted over all images, at the masks' own size. Pixels without a label count nowhere, and a class that
    neither the masks nor the predictions have is left out of the mean.

    Args:
        seed: seed of which images `max_images` chooses.
    """
    segmenter = PixelSegmenter.load(model, pick_device(device))
    folder = MaskFolder(data(classes=segmenter.classes), seed)
    echo_notes(folder.notes)
    with join_processes():
        metrics = score(segmenter, folder)
    echo(f"{iou_table(metrics)}\non the labelled pixels of {plural(len(folder), 'image')}")
    if score.keywords["output"] is not None:
        pictures = ", and pictures/" if score.keywords["num_pictures"] else ""
        echo(f"{score.keywords['output']}: these numbers in metrics.json{pictures}")


def evaluate_sample_folder(
    samples: Path,
    reference: Path,
    scoring: Flat[ScoringOptions],
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Score generated images against real ones: FID, KID, precision and recall.

    The images of both folders and their subfolders are resized, with antialiasing, to what the feature network takes.
    Figures can be compared only within one feature network, one size and equal numbers of images; none of these
    networks is the one of published FIDs.

    Args:
        samples: folder with the generated images.
        reference: folder with real images, cropped as those that the generator learned from; or the YAML file of its
            training, whose images are then cropped as they were there, as many crops as there are samples.
        scoring: how.
        output: folder for metrics.json; nothing is written without it.
    """
    folder = OutputFolder(output, overwrite) if output else None
    real: Path | Sequence[Tensor] = reference
    if reference.suffix in (".yaml", ".yml"):
        from diffperception.training.recipes import generation  # Lightning, which nothing else needs here

        real = generation.training_crops(reference, len(list_images(samples).paths), scoring.seed)
    report = evaluate_samples(samples, real, scoring)
    echo(report.table())
    counts, channels = report.images, report.settings["channels"]
    echo(f"{counts['samples']} samples, {counts['reference']} real images; {channels} features of {scoring.features}")
    for note in report.notes:
        echo(f"note: {note}")
    if folder is not None:
        folder.clear()
        path = folder.file("metrics.json")
        write_json(path, asdict(report))
        echo(f"{path}: these numbers")


def evaluate_cuts(
    features: FeatureExtractor,
    data: Annotated[partial[MaskDataOptions], OptionsOf(MaskDataOptions, *VAL)],
    cut: CutOptions = CutOptions(),  # noqa: B008 (the defaults are not changed)
    device: str = "auto",
    seed: NonNegativeInt = 0,
) -> None:
    """Score segments that are cut without any label by features, beside an untrained network's and the colours.

    Of each image one segment goes to each class of its mask, such that the sum of their IoUs is the largest (Hungarian
    matching); pixels are counted over all images. Pixels of segments without a class are wrong.

    Args:
        features: what gives the maps: DiffusionFeatures, TimmFeatures, RGBFeatures, or a class of your own.
        cut: how images are cut into segments.
        seed: seed of which images `max_images` chooses.
    """
    options = data()
    folder = MaskFolder(replace(options, short_side=None), seed)
    echo_notes(folder.notes)
    features = features.to(pick_device(device))
    rows = []
    for title, extractor in {"features": features, **controls(features)}.items():
        pairs = map(folder.__getitem__, range(len(folder)))
        samples = (
            (options.resized(image), mask) for image, mask in tqdm(pairs, title, len(folder), disable=hide_bar())
        )
        found = hungarian_iou(extractor, samples, len(options.classes), cut)
        each = sum(found.segments) / len(found.segments)
        rows.append((title, f"{100 * found.mean():.1f} %", f"{each:.1f}"))
    echo(format_table(rows, ["", "Hungarian mIoU", "segments an image"]))
    echo(f"on the labelled pixels of {plural(len(folder), 'image')}")


def evaluate_drawn(
    drawn: Path,
    captions: Path,
    reference: Path | None = None,
    reference_captions: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Score whether drawn pictures of the shapes data set show what their captions say: colours, shapes, order.

    The judge learns nothing: it looks for the colours that captions name, and for the outline that fits best. How often
    it is right on real pictures, made as small as the drawn ones, stands beside the scores.

    Args:
        drawn: folder with drawn pictures, images/ of what `sample` writes.
        captions: COCO file of what they were drawn of, captions.json of what `sample` writes.
        reference: folder with real pictures, such as val/ of the shapes data set.
        reference_captions: COCO file of their captions, such as captions_val.json.
        output: folder for metrics.json; nothing is written without it.
    """
    if (reference is None) != (reference_captions is None):
        raise ValueError("give both reference and reference_captions, of real pictures, or neither")
    folder = OutputFolder(output, overwrite) if output else None
    columns = {"drawn": judge_drawn(drawn, captions)}
    if reference is not None and reference_captions is not None:
        size = read_size(list_images(drawn).paths[0])
        columns["real"] = judge_drawn(reference, reference_captions, size)
    echo(drawn_table(columns))
    if folder is not None:
        folder.clear()
        path = folder.file("metrics.json")
        write_json(path, {name: asdict(scores) for name, scores in columns.items()})
        echo(f"{path}: these numbers")


BY_KIND = {
    "drawn": evaluate_drawn,
    "samples": evaluate_sample_folder,  # before features, which are an option of it too
    "features": evaluate_cuts,
    "results": evaluate_results,
    "tracks": evaluate_tracks,
    "detector": evaluate_detector_file,
    "segmenter": evaluate_segmenter_file,
}
