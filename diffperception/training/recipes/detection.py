"""Training of a detector."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jsonargparse import lazy_instance
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from diffperception.configuration.messages import construct
from diffperception.data import CocoDetection
from diffperception.data.annotations import shortened
from diffperception.data.batches import repeat_factors
from diffperception.data.formats import Annotations, Format, open_annotations, split_annotations
from diffperception.data.formats.writers import coco_content
from diffperception.data.soundness import crowded_images, objects_below, require, resizing
from diffperception.data.tiles import RandomTile, Tiling
from diffperception.data.transforms import TrainingTransforms
from diffperception.detection import Detector, DiffusionDet
from diffperception.detection.evaluator import CocoEvaluator, CocoResult, Protocol, iou_types
from diffperception.detection.inference import (
    draw_predictions,
    evaluate_detector,
    require_masks,
    write_result,
)
from diffperception.detection.tiles import require_no_masks
from diffperception.echo import echo
from diffperception.files import OutputFolder, digest, write_json
from diffperception.models import Backbone
from diffperception.models.backbones.timm import loaded_weights
from diffperception.training.data import TrainingData
from diffperception.training.module import TrainingModule
from diffperception.training.options import OptimizerOptions
from diffperception.training.recipe import Evaluator, Metrics, Parts, Recipe, size_of

MISWRITTEN = ("boxes as corners", "boxes as fractions")  # problems of a file that would make any score untrue
HELD_OUT = "val.json"
Batch = tuple[list[Tensor], list[dict[str, Any]]]


@dataclass
class DataOptions:
    """Which images the detector learns from and is scored on: two data sets with the same classes, or one to be split.

    Args:
        train_annotations: COCO JSON file, or what `format` says, to learn from; number and names of the classes come
            from it. `data.yaml:train` or `VOC2007:train` is one part of what is listed there.
        train_images: the folder that its file names are relative to; by default where the format has it.
        val_annotations: the same to be scored on; null with `val_share`.
        val_images: the folder that its file names are relative to; by default where the format has it.
        transforms: random changes of training images; any callable (image, target) -> (image, target), such as
            torchvision's v2 transforms.
        batch_size: images per training batch, for each process.
        workers: processes that read images, for each process that trains.
        on_broken: what to do at an image that cannot be read: stop, naming it, or skip it with a warning; the score
            says how many images were left out.
        repeat_threshold: images with a class that is in a smaller fraction f of the images than this are shown
            sqrt(repeat_threshold / f) times per epoch (LVIS: 0.001); null shows each once.
        masks: whether masks are read and scored too, for detectors that predict them.
        tile: training images larger than this are learned from in random windows of so many pixels a side, at full
            resolution, before the transforms; an epoch shows as many of each image as cover it. Objects of which a
            window shows less than 0.4 of the area are not learned from it. Null takes images whole.
        object_tiles: share of the windows that are drawn around an object; the others lie anywhere.
        format: of both annotations: coco, voc (Pascal VOC), yolo, cvat, labelstudio, labelme or csv; auto looks for
            itself.
        val_share: instead of `val_annotations`, this share of the images is held out to be scored on, such as 0.1; the
            run's val.json lists them.
        split_seed: chooses them, with their names: images that are added later move few others.
    """

    train_annotations: Path
    train_images: Path | None = None
    val_annotations: Path | None = None
    val_images: Path | None = None
    transforms: Callable = field(default_factory=lambda: lazy_instance(TrainingTransforms))
    batch_size: PositiveInt = 16
    workers: NonNegativeInt = 4
    on_broken: Literal["stop", "skip"] = "stop"
    repeat_threshold: NonNegativeFloat | None = None
    masks: bool = False
    tile: PositiveInt | None = None
    object_tiles: ClosedUnitInterval = 0.8
    format: Format = "coco"
    val_share: float | None = None
    split_seed: NonNegativeInt = 0

    def open(self) -> tuple[CocoDetection, CocoDetection]:
        """The data sets for training and for scoring, with labels alike.

        Raises:
            ValueError, FileNotFoundError: one of them cannot be used, nothing could be learned from the first, images
                are missing, or the categories differ.
        """
        learned, scored = self.read()
        tile = self.tile and RandomTile(self.tile, self.object_tiles)
        train = CocoDetection(learned, None, self.transforms, self.on_broken, self.masks, tile)
        val = CocoDetection(scored, on_broken=self.on_broken, masks=self.masks)
        require([problem for problem in train.problems if problem.level == "error"], train.annotations)
        require([problem for problem in val.problems if problem.kind in MISWRITTEN], val.annotations)
        val.order_classes(train.classes, train.annotations)
        return train, val

    def read(self) -> tuple[Annotations, Annotations]:
        """What is learned from and what is scored on; ValueError if the latter is told twice or not at all."""
        learned = open_annotations(self.train_annotations, self.train_images, self.format, self.masks)
        if self.val_share is not None:
            if self.val_annotations is not None:
                raise ValueError("give either data.val_annotations or data.val_share, with the other at null")
            return split_annotations(learned, self.val_share, self.split_seed)
        if self.val_annotations is None:
            raise ValueError("give data.val_annotations, or hold images out with data.val_share 0.1 for example")
        classes = (
            [str(category["name"]) for category in learned.content["categories"]] if self.format != "coco" else None
        )
        return learned, open_annotations(self.val_annotations, self.val_images, self.format, self.masks, classes)

    def remarks(self, train: CocoDetection, val: CocoDetection) -> list[str]:
        """What is to be said of the data before training, a sentence each: what learning or scores leave out."""
        said = [f"{data.annotations}: {note}" for data in (train, val) for note in data.notes]
        said += [f"{train.annotations}: {problem.message}" for problem in train.problems]
        said += [
            f"{val.annotations}: {problem.message}, so its score will be undefined"
            for problem in val.problems
            if problem.level == "error"
        ]
        return [*said, *train.require_files(), *val.require_files()]

    def batches(self, train: CocoDetection, seed: int) -> TrainingData:
        """Batches of the training set, of which images of rare classes are repeated if `repeat_threshold` says so."""
        repeats = None
        if self.repeat_threshold is not None:
            repeats = repeat_factors(train.labels_of_images(), len(train.classes), self.repeat_threshold)
        if self.tile is not None:
            tiling = Tiling(self.tile, 0)
            tiles = np.array([len(tiling.windows(height, width)) for width, height in train.sizes.tolist()])
            repeats = tiles if repeats is None else repeats * tiles
        return TrainingData(train, self.batch_size, self.workers, seed, repeats)


@dataclass
class EvaluationOptions:
    """How the detector is scored, now and then during training and at its end.

    Args:
        every: steps between evaluations during training; null for one at the end only.
        num_images: how many images the evaluations during training use, spread over the set; null for all. The one at
            the end uses all.
        batch_size: images per prediction and process. AP does not depend on it.
        max_dets: how many detections count per image, the best first; null for the protocol's number: 100 of each
            class (coco), 300 of all (lvis).
        protocol: coco, or lvis for annotation files of LVIS.
        num_pictures: how many images are drawn with predictions beside ground truth.
        tile: images larger than this are predicted in windows of so many pixels a side; by default data.tile.
        overlap: pixels that neighbouring windows share at least, best as large as most
            objects; null for 64, or half of a small window.
    """

    every: PositiveInt | None = 1000
    num_images: PositiveInt | None = None
    batch_size: PositiveInt = 8
    max_dets: PositiveInt | None = None
    protocol: Protocol = "coco"
    num_pictures: NonNegativeInt = 8
    tile: PositiveInt | None = None
    overlap: NonNegativeInt | None = None


class DetectionModule(TrainingModule):
    """The step of a detector: the loss that it gives, and a learning rate of its own for the backbone."""

    model: Detector
    options: OptimizerOptions

    def __init__(self, model: Detector, options: OptimizerOptions, seed: int):
        super().__init__(model, options, seed)
        modules = model.named_modules()
        self.backbones = tuple(f"{name}." for name, module in modules if isinstance(module, Backbone))
        self.freeze_stages()

    def layers(self, stages: bool = False) -> dict[str, int]:
        found: dict[str, int] = {}
        for path, module in self.model.named_modules():
            if isinstance(module, Backbone):
                found |= {f"{path}.{name}": number for name, number in module.layers(stages).items()}
        return found

    def loss_terms(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        images, targets = batch
        try:
            return self.loss_of(images, targets, generator)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            height, width = images[0].shape[-2:]
            raise ValueError(
                f"batch norm is left with one value per channel in a batch of {len(images)} of {width}x{height} pixels:"
                " raise data.batch_size, let the transforms make images larger (short_sides), or train without the"
                " statistics of batches (freeze_norm: true and fpn_norm: false in the model)"
            ) from None

    def loss_of(self, images: list[Tensor], targets: list[dict], generator: torch.Generator) -> dict[str, Tensor]:
        """The terms, as of `loss_terms`."""
        return self.model.loss(images, targets, generator=generator)

    def describe(self, batch: Batch) -> str:
        ids = ", ".join(str(target["image_id"]) for target in batch[1])
        return f"the boxes of the images with ids {ids} with `diffperception check`"

    def lr_scale(self, name: str) -> float:
        factor = self.options.backbone_lr_factor if name.startswith(self.backbones) else 1.0
        return factor * super().lr_scale(name)

    def compile_networks(self) -> None:
        for name in ("backbone", "head"):  # a user's detector may have others
            if isinstance(part := getattr(self.model, name, None), torch.nn.Module):
                part.compile()


class DistillationModule(DetectionModule):
    """A DiffusionDet learns in one step what a teacher finds in several, beside the annotations.

    The term `distillation` of the loss wants of each box and class the score times IoU of the teacher's detection.

    Args:
        model, options, seed: as of `DetectionModule`.
        teacher: a trained detector of the same classes, such as the file that training starts from with `init`.
        steps: of the teacher's; by default its own number.
        num_boxes: of the teacher's; by default its own number.
        weight: of the term.
    """

    model: DiffusionDet

    def __init__(
        self,
        model: Detector,
        options: OptimizerOptions,
        seed: int,
        teacher: Path,
        steps: PositiveInt | None = None,
        num_boxes: PositiveInt | None = None,
        weight: NonNegativeFloat = 6.0,
    ):
        super().__init__(model, options, seed)
        if not isinstance(model, DiffusionDet):
            raise ValueError(f"{type(model).__name__} takes no steps that a teacher could spare: train a DiffusionDet")
        self.weight = float(weight)
        self.teacher = Teacher(Detector.load(teacher), model.classes, teacher, steps, num_boxes)
        self.contents["module.teacher"] = digest(teacher)

    def on_fit_start(self) -> None:
        self.teacher.detector.to(self.device)

    def loss_of(self, images: list[Tensor], targets: list[dict], generator: torch.Generator) -> dict[str, Tensor]:
        terms = self.model.loss(images, targets, generator=generator, taught=self.teacher(images, generator))
        return terms | {"distillation": self.weight * terms["distillation"]}


class Teacher:
    """A trained detector whose detections another learns; its weights are in no average and no checkpoint of that."""

    def __init__(
        self, detector: Detector, classes: list[str], path: Path, steps: int | None, num_boxes: int | None
    ) -> None:
        if set(detector.classes) != set(classes):
            raise ValueError(
                f"the teacher {path} has {len(detector.classes)} classes ({shortened(detector.classes)}), but"
                f" {len(classes)} are learned ({shortened(classes)}): give one that was trained for these"
            )
        self.detector = detector.requires_grad_(False)
        self.sampler = detector.sampler_with(steps=steps, num_boxes=num_boxes)
        self.labels = torch.tensor([classes.index(name) for name in detector.classes])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    def __call__(self, images: list[Tensor], generator: torch.Generator) -> list[dict[str, Tensor]]:
        """What it finds in the images, its noise drawn from the generator: boxes, scores and labels of the student."""
        seeds = torch.randint(1 << 31, (len(images),), generator=generator).tolist()
        with torch.no_grad():  # a user's detector may predict with gradients
            found = self.detector.predict(images, seeds, self.sampler)
        columns = [torch.cat([d["boxes"], d["scores"][:, None], d["labels"][:, None]], 1) for d in found]
        rows = torch.cat(columns).float().cpu().split([len(column) for column in columns])  # a GPU is waited for once
        return [{"boxes": r[:, :4], "scores": r[:, 4], "labels": self.labels[r[:, 5].long()]} for r in rows]


class DetectionEvaluator(Evaluator):
    """COCO or LVIS metrics on a data set, and pictures of predictions at the end; `seed` is that of the noise."""

    def __init__(
        self,
        dataset: CocoDetection,
        options: EvaluationOptions,
        workers: int,
        seed: int,
        is_held_out: bool = False,
    ):
        self.dataset, self.options, self.workers, self.seed = dataset, options, workers, seed
        self.is_held_out = is_held_out
        self.every = options.every
        # What cannot be scored is refused here, not after the training.
        truth = dataset.table or dataset.annotations
        CocoEvaluator(truth, iou_types(dataset.masks), options.max_dets, None, options.protocol)

    def evaluate(self, averaged: Detector, raw: Detector, step: int, folder: OutputFolder | None) -> Metrics:
        return self._score(averaged, self.options.num_images).metrics

    def finish(self, model: Detector, folder: OutputFolder | None) -> Metrics:
        result = self._score(model, None)
        echo(result.table())
        if folder is not None:
            write_result(result, folder)
            if self.is_held_out and self.dataset.table is not None:
                write_json(folder.file(HELD_OUT), coco_content(self.dataset.table), None)
                echo(f"{folder.path / HELD_OUT}: the annotations of the images that were held out")
            shared = {name: getattr(self.options, name) for name in ("batch_size", "tile", "overlap")}
            draw_predictions(model, self.dataset, folder, self.options.num_pictures, self.seed, **shared)
        return result.metrics

    def _score(self, model: Detector, images: int | None) -> CocoResult:
        options = self.options
        return evaluate_detector(
            model,
            self.dataset,
            images,
            options.batch_size,
            self.workers,
            options.max_dets,
            self.seed,
            protocol=options.protocol,
            tile=options.tile,
            overlap=options.overlap,
        )


@dataclass
class DetectionRecipe(Recipe):
    """Train a detector, score it and draw its predictions.

    Args:
        model: the detector's class and its arguments, all but the classes, which come from the annotations.
        data: what it learns from and is scored on.
        optimizer: how the weights are updated.
        evaluation: how it is scored.
        module: the training step: DetectionModule; DistillationModule, with a teacher; or a class of your own.
        init: training starts from the weights in this file that fit the model by name and shape, and from new ones
            elsewhere: a detector of any classes, a generator, or a backbone's weights alone (.safetensors, .pth, .pt).
    """

    task = "detection"
    example = "configs/detection/shapes.yaml"
    files: ClassVar = {
        "model.safetensors": "the trained detector, for `diffperception evaluate` and `predict`",
        "metrics.json": "the final scores, overall and by class",
        "detections.json": "detections of all images scored on, as COCO results",
        "pictures/": "predictions beside ground truth, noise turning into boxes, curves.png",
    }

    model: Callable[[list[str]], Detector]
    data: DataOptions
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    module: Callable[[Detector, OptimizerOptions, int], DetectionModule] = DetectionModule
    init: Path | None = None

    def prepare(self, seed: int) -> Parts:
        train, val = self.data.open()
        remarks = self.data.remarks(train, val)
        batches = self.data.batches(train, seed)
        evaluation = replace(self.evaluation, tile=self.evaluation.tile or self.data.tile)
        split = self.data.val_share is not None
        evaluator = DetectionEvaluator(val, evaluation, self.data.workers, seed, split)
        detector = construct(self.model, train.classes)
        require_masks(detector, val)
        if detector.needs_masks and not self.data.masks:
            raise ValueError(
                f"this {type(detector).__name__} learns from masks, which are not read: set data.masks: true, for"
                " annotations with outlines"
            )
        require_no_masks(detector, Tiling(evaluation.tile, evaluation.overlap))
        detector.class_frequencies.copy_(torch.from_numpy(train.images_per_class()))
        return Parts(
            self.module(detector, self.optimizer, seed),
            batches,
            evaluator,
            f"{size_of(detector)} learns {len(train.classes)} classes from {len(train)} images and is scored on"
            f" {len(val)}",
            [*remarks, *loaded_weights(detector), *limits(detector, train, val, evaluation.tile)],
        )


def limits(detector: Detector, train: CocoDetection, val: CocoDetection, tile: int | None) -> list[str]:
    """What a detector cannot learn or find of the data, a sentence each; it predicts large images in such tiles."""
    said = []
    if (num_boxes := getattr(detector, "num_boxes", None)) is not None:  # a user's detector may have no such number
        crowded = crowded_images(train.image_ids, train.objects_per_image(), num_boxes)
        said += [f"{train.annotations}: {problem.sentence()}" for problem in crowded]
    seen = val.sizes if tile is None else np.minimum(val.sizes, tile)
    scale = resizing(seen, detector.min_size, detector.max_size)
    small = objects_below(val.boxes, scale.repeat(np.diff(val.offsets)))
    if small.any():
        said.append(
            f"{val.annotations}: {small.sum()} of {len(small)} objects are less than a pixel wide or high as the model"
            " sees its images in prediction, so they can hardly be found: raise its min_size and max_size"
        )
    return said
