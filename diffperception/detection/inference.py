"""Detectors at work: a folder of images, a data set to be scored on. What the commands call, and notebooks may."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffperception.data import CocoDetection
from diffperception.data.annotations import CocoTable, shortened, tabulate
from diffperception.data.batches import collate, spread
from diffperception.data.formats import Format, open_annotations
from diffperception.data.images import ImageSample, LazyMap, load_images, read_ahead, to_float
from diffperception.data.listing import list_images
from diffperception.data.soundness import require_entries
from diffperception.data.tiles import Tiling
from diffperception.detection.detector import Detector, DiffusionDet
from diffperception.detection.evaluator import CocoEvaluator, CocoResult, Protocol, iou_types, results_rows
from diffperception.detection.results import IMAGES, describe_results
from diffperception.detection.sampler import BoxSampler
from diffperception.detection.start import StartBoxes, best_boxes, read_start
from diffperception.detection.tiles import predict_images, require_no_masks
from diffperception.devices import Precision, autocast, first_process, gather, hide_bar, share
from diffperception.diffusion import name_seed, sample_seed
from diffperception.echo import echo_remark
from diffperception.files import OutputFolder, png_names, safe_path, write_json
from diffperception.models.base import describe, fingerprint
from diffperception.resumable import Item, ResumableFolder, content_of
from diffperception.visualization.draw import THRESHOLD, draw_detections, save_png
from diffperception.visualization.panels import side_by_side, trajectory

TRAJECTORY_STEPS = 4  # of the pictures of trajectories, where no number of steps is asked for
PREDICTIONS = "predictions.json"


@dataclass(frozen=True)
class FolderResult:
    """What was found in a folder of images."""

    images: list[dict[str, Any]]  # of a COCO file: ids from 1, names below the folder, sizes
    detections: list[dict[str, Any]]  # rows of a COCO results file
    broken: list[str]  # what is wrong with each image that could not be read, one sentence each

    @classmethod
    def of(cls, found: Sequence[list[Any] | str]) -> "FolderResult":
        """From each image with its rows, or what is wrong with it; ValueError if none can be read."""
        broken = [each for each in found if isinstance(each, str)]
        whole = [each for each in found if not isinstance(each, str)]
        if not whole:
            raise ValueError(f"no image can be read: {broken[0]}")
        images = [{"id": number, **image} for number, (image, _) in enumerate(whole, 1)]
        pairs = zip(images, (of_image for _, of_image in whole), strict=True)
        return cls(images, [row | {"image_id": image["id"]} for image, rows in pairs for row in rows], broken)


@dataclass(frozen=True)
class _Subject:
    """An image file to detect objects in."""

    path: Path
    image: dict[str, Any]  # of a COCO file: its file_name and, if it is known, its id
    picture: Path  # of its detections, below the folder of pictures
    seed: int  # of its noise

    @property
    def key(self) -> int | str:
        """What boxes to start from are found by: its id where it has one, else its name."""
        return self.image.get("id", self.image["file_name"])


def _subjects(images: str | Path, table: CocoTable | None, output: Path, seed: int) -> tuple[list[_Subject], str]:
    """The images that a path or pattern names or, with a table, those of the data set in a folder; and a remark."""
    remark = ""
    if table is None:
        root, paths, remark = list_images(images, leave_out=output)
        names = [path.relative_to(root) for path in paths]
        entries = [{"file_name": name.as_posix()} for name in names]
        seeds = [name_seed(seed, name.name) for name in names]
    else:
        if not Path(images).is_dir():
            raise FileNotFoundError(
                f"there is no image folder {images}, in which the images of {table.source} would be"
            )
        paths = [Path(images, name) for name in table.file_names]
        names = [safe_path(name) for name in table.file_names]
        ids = table.image_ids.tolist()
        entries = [{"id": number, "file_name": name} for number, name in zip(ids, table.file_names, strict=True)]
        seeds = [sample_seed(seed, number) for number in ids]
    pngs = png_names(names)
    parts = zip(paths, entries, [pngs[name] for name in names], seeds, strict=True)
    return [_Subject(*each) for each in parts], remark


def detect_folder(
    detector: Detector | str | Path,
    images: str | Path,
    output: str | Path,
    sampler: BoxSampler | None = None,
    seed: NonNegativeInt = 0,
    score_threshold: ClosedUnitInterval = THRESHOLD,
    num_pictures: NonNegativeInt = 100,
    num_trajectories: NonNegativeInt = 3,
    batch_size: PositiveInt = 1,
    workers: NonNegativeInt = 2,
    precision: Precision = "32",
    overwrite: bool = False,
    tile: PositiveInt | None = None,
    overlap: NonNegativeInt | None = None,
    annotations: str | Path | None = None,
    format: Format = "coco",
    start: str | Path | None = None,
) -> FolderResult:
    """Detect objects in an image, or in all images of a folder.

    Writes OUTPUT/predictions.json, a COCO results file with all detections; OUTPUT/images.json, a COCO file with the
    images' ids, names and sizes and with the categories; OUTPUT/pictures, the images with their detections; and
    OUTPUT/trajectories, where noise turns into boxes. Images that cannot be read are left out and named at the end.
    Several processes, started by torchrun, share the images. The command can be interrupted: given again, it goes on
    with the images that are missing, and does those anew that have changed.

    `evaluate --results` scores predictions.json: of the images of `annotations` it finds what `evaluate --model` finds;
    without, the noise is drawn from names, so that scores differ a little.

    Args:
        detector: the detector, which computes where it is; or its file, for an accelerator if there is one.
        images: an image, a folder (its subfolders count too), a pattern in quotes such as 'photos/*.jpg', or a list in
            the images' folder: a COCO file, or a .txt file with a name per line.
        sampler: instead of the detector's own, see `Detector.sampler_with`.
        seed: seed of the noise that boxes start from; it and the name of an image, or its id in `annotations`, decide
            the noise of that image.
        score_threshold: boxes with a lower score are not drawn; predictions.json has them all.
        num_pictures: the detections of at most this many images are drawn.
        num_trajectories: noise turning into boxes is drawn for at most this many images.
        batch_size: images, or windows of one, that are predicted together; the results do not depend on it, up to
            rounding.
        tile: images larger than this are predicted in windows of so many pixels a side, at full resolution, and what
            the windows find is put together; of an image at most the 3000 best detections stay. Its trajectory is not
            drawn. Null predicts images whole.
        overlap: pixels that neighbouring windows share at least, best as large as most
            objects; null for 64, or half of a small window.
        annotations: COCO file whose images, in the folder `images`, are predicted: with its image ids, and with the
            ids of its categories for classes of their names.
        format: of the annotations: coco, voc (Pascal VOC), yolo, cvat, labelstudio, labelme or csv.
        start: a COCO results file, such as the predictions.json of another run, whose boxes are started from instead of
            noise alone, noised to `start_time`: of each image the best, `num_boxes` at most. Null starts from noise.

    Raises:
        FileNotFoundError, ValueError: there is no such image or model, none can be read, the folder is in use, or the
            annotations cannot be used or have other classes than the detector, or the boxes to start from cannot.
    """
    tiling = Tiling(tile, overlap)
    detector, folder = Detector.loaded(detector).eval(), ResumableFolder(output, overwrite)
    require_no_masks(detector, tiling)
    require_start(detector, sampler, start is not None, tiling)
    table = None
    if annotations is not None:
        content = open_annotations(annotations, images, format, classes=detector.classes).content
        table = tabulate(content, annotations)
    category_ids = range(1, len(detector.classes) + 1) if table is None else table.labels(detector.classes)[0]
    if table is not None:
        require_entries(table)
    subjects, remark = _subjects(images, table, folder.path, seed)
    begin = None if start is None else read_start(start, table)
    settings = {"command": "predict", "model": fingerprint(detector), "sampler": describe(sampler), "seed": seed}
    settings |= {"images": str(Path(images).absolute()), "annotations": annotations and content_of(annotations)}
    settings |= {"start": start and content_of(start)}
    settings |= {"score_threshold": score_threshold, "precision": precision, "tile": tile, "overlap": overlap}
    drawn = {subject.picture: ["pictures"] for subject in subjects[:num_pictures]}
    for subject in subjects[:num_trajectories] if isinstance(detector, DiffusionDet) else []:
        drawn.setdefault(subject.picture, []).append("trajectories")
    of_item: dict[Item, _Subject] = {}
    for subject in share(subjects):
        planned = tuple((kind / subject.picture).as_posix() for kind in drawn.get(subject.picture, ()))
        of_item[Item(subject.image["file_name"], content_of(subject.path), planned)] = subject
    together = 1 if tile else batch_size
    left = folder.left_of(settings, list(of_item), batch_size=together)
    folder.begin([IMAGES, PREDICTIONS])
    echo_remark(remark)
    if begin is not None:
        echo_remark(start_in_words(begin, [subject.key for subject in subjects], start))
    paths, seeds = [of_item[item].path for item in left], [of_item[item].seed for item in left]
    batches = load_images(paths, together, workers, as_uint8=tile is not None)
    starts = None if begin is None else starts_of(detector, sampler, begin, [of_item[item].key for item in left])
    detected = _detect(detector, batches, sampler, seeds, precision, tiling, batch_size, starts)
    begun = iter(starts or [None] * len(left))
    for item, (sample, detections), boxes in zip(left, detected, begun, strict=True):
        if sample.image is None:
            folder.add(item, [], sample.problem)
            continue
        subject, written = of_item[item], []
        height, width = sample.image.shape[-2:]
        for name in item.files:
            if name.startswith("pictures/"):
                picture = draw_detections(sample.image, detections, detector.classes, score_threshold)
            elif len(tiling.windows(height, width)) == 1 and isinstance(detector, DiffusionDet):
                image = to_float(sample.image)
                picture = draw_trajectory(detector, image, subject.seed, sampler, score_threshold, precision, boxes)
            else:
                continue
            save_png(picture, folder.file(name))
            written.append(name)
        rows = results_rows(0, detections, category_ids)
        folder.add(item, written, [subject.image | {"width": width, "height": height}, rows])
    result = FolderResult.of(folder.results(gather(list(of_item))))
    if first_process():
        seeds_of = "names" if table is None else "ids"
        content = describe_results(result.images, category_ids, detector.classes, PREDICTIONS, seeds_of)
        write_json(folder.file(IMAGES), content, None)
        write_json(folder.file(PREDICTIONS), result.detections, None)
    return result


def _detect(
    detector: Detector,
    batches: DataLoader[ImageSample],
    sampler: BoxSampler | None,
    seeds: Sequence[int],
    precision: Precision,
    tiling: Tiling,
    batch_size: int,
    starts: StartBoxes | None,
) -> Iterator[tuple[ImageSample, dict[str, Tensor]]]:
    """Each image with its detections, on the CPU, as they are made; broken images have none. Shows the time left."""
    given = iter(zip(seeds, starts or [None] * len(seeds), strict=True))
    with tqdm(total=len(batches.dataset), desc="predict", unit="image", disable=hide_bar()) as bar:  # type: ignore[arg-type]
        for batch in batches:
            whole = [(s.image, *own) for s, own in zip(batch, given, strict=False) if s.image is not None]
            images, noise = [image for image, _, _ in whole], [seed for _, seed, _ in whole]
            begin = None if starts is None else [boxes for _, _, boxes in whole]
            with autocast(detector.device, precision):
                found = iter(
                    predict_images(detector, images, noise, sampler, tiling, batch_size, begin) if whole else []
                )
            for sample in batch:
                detections = {} if sample.image is None else next(found)
                yield sample, {name: value.cpu() for name, value in detections.items()}
                bar.update()


def evaluate_detector(
    detector: Detector | str | Path,
    dataset: CocoDetection,
    num_images: int | None = None,
    batch_size: PositiveInt = 8,
    workers: int = 0,
    max_dets: int | None = None,
    seed: int = 0,
    sampler: BoxSampler | None = None,
    protocol: Protocol = "coco",
    precision: Precision = "32",
    tile: PositiveInt | None = None,
    overlap: NonNegativeInt | None = None,
    start: str | Path | None = None,
) -> CocoResult:
    """COCO metrics of `detector`, which is left in evaluation mode: of boxes, and of masks if the data set has them.

    The noise of an image depends on `seed` and its id alone, so AP depends neither on the batch size nor on the number
    of processes. Every process must call this; each predicts its share of the images and returns the score of all.

    Args:
        detector: as for `detect_folder`.
        num_images: use this many images, spread over the data set; all by default.
        batch_size: images, or windows of one, per prediction.
        workers: processes that read images, for each process that predicts.
        max_dets: how many detections count per image, the best first; by default the protocol's number: 100 of each
            class (coco), 300 of all (lvis).
        sampler: instead of the detector's own, see `Detector.sampler_with`.
        protocol: coco, or lvis for annotation files of LVIS, which adds APr, APc and APf of rare, common and frequent
            classes.
        tile, overlap, start: as for `detect_folder`.

    Raises:
        ValueError: the detector has other classes than the data set or no masks where that has some, or the
            annotations are not what the protocol needs, or the boxes to start from cannot be used.
    """
    detector, tiling = Detector.loaded(detector), Tiling(tile, overlap)
    require_classes(detector.classes, dataset)
    require_masks(detector, dataset)
    require_no_masks(detector, tiling)
    require_start(detector, sampler, start is not None, tiling)
    begin = None if start is None else read_start(start, dataset.table)
    share_statistics(detector)
    chosen = spread(len(dataset), num_images)
    image_ids = [dataset.image_ids[i] for i in chosen]
    truth, compared = dataset.table or dataset.annotations, iou_types(dataset.masks)
    evaluator = CocoEvaluator(truth, compared, max_dets, image_ids, protocol, detector.classes)
    detector.eval()
    read = dataset.stored if tile else dataset.__getitem__
    batches = read_ahead(LazyMap(read, share(chosen)), 1 if tile else batch_size, workers)
    for batch in tqdm(batches, desc="evaluate", leave=False, disable=hide_bar()):
        images, targets = collate(batch)
        ids = [target["image_id"] for target in targets]
        seeds = [sample_seed(seed, image_id) for image_id in ids]
        starts = None if begin is None else starts_of(detector, sampler, begin, ids)
        with torch.no_grad(), autocast(detector.device, precision):
            found = predict_images(detector, images, seeds, sampler, tiling, batch_size, starts)
        evaluator.update(ids, found)
    evaluator.gather()
    result = evaluator.compute()
    if begin is None:
        return result
    return result.with_notes([start_in_words(begin, image_ids, start)])


def require_classes(classes: Sequence[str], dataset: CocoDetection) -> None:
    """ValueError that names the difference unless the model's classes are the annotation file's, in any order."""
    if set(classes) == set(dataset.classes):
        return
    if list(classes) == [str(label) for label in range(len(dataset.classes))]:
        raise ValueError(
            f"the model's {len(classes)} classes are numbers, as the checkpoint it was converted from has no names:"
            f" convert it again with --annotations {dataset.annotations}, if it was trained for those categories"
        )
    raise ValueError(
        f"the model has {len(classes)} classes ({shortened(classes)}), but {dataset.annotations} has"
        f" {len(dataset.classes)} ({shortened(dataset.classes)}): use the annotations it was trained for, or train it"
        " anew"
    )


def require_start(detector: Detector, sampler: BoxSampler | None, given: bool, tiling: Tiling) -> None:
    """ValueError if boxes are given to start from and the detector starts from none, or not with these settings."""
    if isinstance(detector, DiffusionDet):
        detector.require_start(sampler or detector.sampler, given)
    elif given:
        raise ValueError(f"{type(detector).__name__} starts from no boxes: leave the option start out")
    if given and tiling.tile is not None:
        raise ValueError("boxes to start from are of whole images: leave the option tile out")


def start_in_words(start: Mapping[int | str, Tensor], images: Sequence[int | str], path: str | Path | None) -> str:
    """How many of the images start from boxes of a file."""
    count = sum(image in start for image in images)
    return f"{count} of {len(images)} images start from boxes of {path}, the others from noise."


def starts_of(
    detector: Detector, sampler: BoxSampler | None, start: Mapping[int | str, Tensor], images: Sequence[int | str]
) -> StartBoxes:
    """What a DiffusionDet starts from in each of the images: the best boxes, as many as it begins with, or none."""
    assert isinstance(detector, DiffusionDet)
    return best_boxes(start, images, (sampler or detector.sampler).num_boxes or detector.num_boxes)


def require_masks(detector: Detector, dataset: CocoDetection) -> None:
    """ValueError if masks are to be scored and the detector gives none."""
    if dataset.masks and not detector.gives_masks:
        name = type(detector).__name__
        raise ValueError(f"this {name} gives no masks to score (its gives_masks is False): leave the option masks out")


def share_statistics(detector: Detector) -> None:
    """Give all processes the first one's statistics of batch norm, which each has gathered from batches of its own."""
    if dist.is_initialized():
        for buffer in detector.buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, 0)


def write_result(result: CocoResult, folder: OutputFolder) -> None:
    """metrics.json (overall and by class; null where undefined) and detections.json (a COCO results file)."""
    scores = {"metrics": result.metrics, "per_class": result.per_class, "notes": result.remarks}
    write_json(folder.file("metrics.json"), scores)
    write_json(folder.file("detections.json"), result.detections, None)


def draw_predictions(
    detector: Detector,
    dataset: CocoDetection,
    folder: OutputFolder,
    count: int,
    seed: int = 0,
    sampler: BoxSampler | None = None,
    precision: Precision = "32",
    batch_size: int = 1,
    tile: int | None = None,
    overlap: int | None = None,
    start: str | Path | None = None,
) -> None:
    """pictures/: predictions beside ground truth for `count` images spread over the data set, one PNG each.

    Of the first two there is also, for a DiffusionDet, its trajectory: noise turning into boxes, but not of images that
    are predicted in windows. The other options are as in `evaluate_detector`.
    """
    tiling = Tiling(tile, overlap)
    begin = None if start is None else read_start(start, dataset.table)
    chosen = {index: safe_path(dataset.file_names[index]) for index in spread(len(dataset), count)}
    names = png_names(chosen.values())
    for number, (index, name) in enumerate(chosen.items()):
        image, target = dataset[index]
        noise = sample_seed(seed, target["image_id"])
        starts = None if begin is None else starts_of(detector, sampler, begin, [target["image_id"]])
        with autocast(detector.device, precision):
            prediction = predict_images(detector, [image], [noise], sampler, tiling, batch_size, starts)[0]
        save_png(side_by_side(image, target, prediction, detector.classes), folder.file("pictures" / names[name]))
        whole = len(tiling.windows(*image.shape[-2:])) == 1
        if number < 2 and isinstance(detector, DiffusionDet) and whole:
            boxes = starts[0] if starts else None
            picture = draw_trajectory(detector, image, noise, sampler, precision=precision, start=boxes)
            trajectory_name = names[name].with_stem(f"{names[name].stem}_noise_to_boxes")
            save_png(picture, folder.file("pictures" / trajectory_name))


def draw_trajectory(
    detector: DiffusionDet,
    image: Tensor,
    seed: int,
    sampler: BoxSampler | None = None,
    threshold: float = THRESHOLD,
    precision: Precision = "32",
    start: Tensor | None = None,
) -> Image.Image:
    """Noise turning into the boxes of one image (3, H, W); detections below the threshold are not drawn.

    Args:
        sampler: by default the detector's own. Where that takes one step, and no other number is asked for,
            TRAJECTORY_STEPS are shown, or as many as there are from its `start_time` on.
        start: boxes (n, 4) to start from, as `DiffusionDet.predict` takes them.
    """
    sampler = sampler or detector.sampler
    if sampler.steps == detector.sampler.steps == 1:
        times = TRAJECTORY_STEPS if sampler.start_time is None else sampler.start_time + 1
        sampler = replace(sampler, steps=min(TRAJECTORY_STEPS, times))
    with autocast(detector.device, precision):
        steps, detections = detector.trajectory(image, seed, sampler, start)
    return trajectory(image, steps, detections, detector.classes, threshold)
