"""Training of ensembles of pixel classifiers on features (arXiv 2112.03126)."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import Dataset

from diffperception.data.images import LazyMap, to_float
from diffperception.data.masks import IGNORE_INDEX, MaskDataOptions, MaskFolder
from diffperception.diffusion.noise import derive_seed
from diffperception.echo import echo, plural
from diffperception.files import OutputFolder, write_json
from diffperception.models.backbones.timm import loaded_weights
from diffperception.models.warm_start import WarmStart, warm_start
from diffperception.segmentation import FeatureExtractor, MeanIoU, PixelEnsemble, PixelSegmenter
from diffperception.segmentation.feature_cache import in_bytes, stored_bytes
from diffperception.segmentation.inference import draw_comparisons, iou_table, score_images
from diffperception.segmentation.mlp import PixelMLPs
from diffperception.segmentation.pixels import LabelledPixels, checked_masks
from diffperception.training.data import TrainingData
from diffperception.training.module import TrainingModule
from diffperception.training.options import TrainerOptions
from diffperception.training.recipe import Evaluator, Metrics, Parts, Recipe
from diffperception.training.run import fit_quietly

STEP_MINIBATCHES = 100  # minibatches in a step of a run
# What numbers of FitOptions may be; batch norm needs two pixels.
LEAST = {"batch_size": 2, "epochs": 1, "early_stopping_start": 0, "patience": 1, "max_minibatches": 1, "min_pixels": 0}


@dataclass
class FitOptions:
    """How pixel classifiers learn: by default the recipe of arXiv 2112.03126.

    Args:
        batch_size: pixels per minibatch; every member has its own.
        lr: learning rate of Adam.
        epochs: most passes over the labelled pixels, for each process.
        early_stopping_start: passes after which a member may stop early.
        patience: a member stops once so many minibatches have not improved on the best one's loss since.
        max_minibatches: most minibatches per member, whatever the passes; null for no such limit.
        min_pixels: a class with fewer pixels in an image is ignored there.
        feature_dtype: type of the features while training, float16 or float32; half precision takes half the memory.
        ema_decay: what is evaluated and saved is the exponential moving average of the weights with this decay, which
            is updated every hundred minibatches; null takes the weights themselves.
    """

    batch_size: int = 64
    lr: float = 1e-3
    epochs: int = 100
    early_stopping_start: int = 4
    patience: int = 50
    max_minibatches: int | None = None
    min_pixels: int = 20
    feature_dtype: Literal["float16", "float32"] = "float16"
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")

    def minibatches_per_epoch(self, pixels: int) -> int:
        return -(-pixels // self.batch_size)

    def most_minibatches(self, pixels: int) -> int:
        """What a member sees at most, of so many labelled pixels."""
        most = self.epochs * self.minibatches_per_epoch(pixels)
        return most if self.max_minibatches is None else min(most, self.max_minibatches)


class PixelBatches(TrainingData):
    """Chunks of minibatches: (up to 100, M, batch_size) numbers of labelled pixels, drawn on the CPU.

    Each member draws with a seed of its own and with replacement: the permutations that the reference draws would take
    8 bytes per pixel and member.
    """

    def __init__(self, pixels: int, members: int, options: FitOptions, seed: int) -> None:
        super().__init__(None, options.batch_size, 0, seed)
        self.pixels, self.members = pixels, members
        self.most = options.most_minibatches(pixels)

    def batches(self, start: int, stop: int, rank: int, world_size: int, pin_memory: bool) -> Iterator[Tensor]:
        further = (rank,) if rank else ()
        seeds = [derive_seed(self.seed, member, *further) for member in range(self.members)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for number in range(stop):
            drawn = [torch.randint(self.pixels, (STEP_MINIBATCHES, self.batch_size), generator=g) for g in generators]
            if number >= start:
                yield torch.stack(drawn, 1)[: self.most - number * STEP_MINIBATCHES]


class FitModule(TrainingModule):
    """A step that learns from masks as the options `fit` say, with one learning rate whatever the number of images."""

    samples: ClassVar[str]  # what `batch_size` counts
    grad_clip_norm = None
    remedy = "lower fit.lr"

    @property
    def lr(self) -> float:
        return float(self.options.lr)

    def rate_in_words(self) -> str:
        return f"{self.options.batch_size} {self.samples}, learning rate {self.lr:g}"

    def describe(self, batch: Any) -> str:
        return "the images and masks"


class EnsembleModule(FitModule):
    """Trains all members of an ensemble at once, each on its own minibatches, until each has stopped.

    A step of the run is a chunk of minibatches. The model has the weights of the last whole chunk, and those of members
    that have stopped. What to say of classes with too few pixels is in `notes`.

    Args:
        model: extractor and ensemble.
        features: the extractor, or one that has its maps already.
        images: (3, H, W) each, RGB, 0..1, of any sizes; fetched one at a time when the training begins.
        masks: (H, W) each, 0..K-1 or 255 for pixels to ignore.
        options: how they are trained.
        seed: seed of weights and minibatches.
        names: names of the images, for messages; by default their numbers.

    Raises:
        ValueError: masks do not fit the images or the classes, or nothing is labelled.
    """

    model: PixelSegmenter
    options: FitOptions
    samples = "pixels per minibatch and member"
    best: Tensor
    waited: Tensor
    stopped: Tensor

    def __init__(
        self,
        model: PixelSegmenter,
        features: FeatureExtractor,
        images: Sequence[Tensor],
        masks: Sequence[Tensor],
        options: FitOptions,
        seed: int,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, options, seed)
        self.automatic_optimization = False
        names = names or [f"image {i}" for i in range(len(masks))]
        masks, notes = checked_masks(images, masks, model.classes, options.min_pixels, names)
        self.notes = " ".join(notes)
        self.source = (features, images, masks, names)  # in a tuple: it is no part of what is trained
        self.num_pixels = sum(int((mask != IGNORE_INDEX).sum()) for mask in masks)
        self.max_steps = -(-options.most_minibatches(self.num_pixels) // STEP_MINIBATCHES)
        self.unwatched = options.early_stopping_start * options.minibatches_per_epoch(self.num_pixels)
        ensemble = model.classifier
        self.members = PixelMLPs(ensemble.members, ensemble.channels, ensemble.num_classes, seed)
        self.order = LabelledPixels.channel_order(features.info)
        first = self.members.linears[0].weight
        first.data = first.data[:, :, self.order]
        self.register_buffer("best", torch.full((ensemble.members,), torch.inf))
        self.register_buffer("waited", torch.zeros(ensemble.members, dtype=torch.int64))
        self.register_buffer("stopped", torch.zeros(ensemble.members, dtype=torch.int64))  # the minibatch; 0: not yet

    def start_from(self, path: Path) -> WarmStart:
        """As of any module; features that were computed before, by :class:`ExtractedFeatures`, stay what they are."""
        self._publish(range(len(self.stopped)))
        extracted = self.source[0] is not self.model.features
        report = warm_start(self.model, path, below="classifier." if extracted else "")
        state = {name: value.clone() for name, value in self.model.classifier.mlps.state_dict().items()}
        state["layers.0.weight"] = state["layers.0.weight"][:, :, self.order]
        self.members.load_state_dict(state)
        return report

    def on_fit_start(self) -> None:
        """Compute the features of the labelled pixels."""
        if self.trainer.precision == "16-mixed":
            raise ValueError("trainer.precision 16-mixed is not for pixel classifiers: take 32-true or bf16-mixed")
        features, images, masks, names = self.source
        dtype = getattr(torch, self.options.feature_dtype)
        with self.trainer.precision_plugin.forward_context():
            self.pixels = LabelledPixels(features, images, masks, dtype, names, self.device)
        # Memory of this size costs more to ask for than to fill: it is kept from one minibatch to the next.
        weight = self.members.linears[0].weight
        self.gradient = torch.empty_like(weight, device=self.device)
        rows = len(self.stopped) * self.options.batch_size
        self.gathered = weight.new_empty(rows, weight.shape[2], device=self.device)

    def on_fit_end(self) -> None:
        del self.pixels, self.gradient, self.gathered  # gigabytes, before the ensemble predicts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.members.parameters(), self.lr, fused=True)

    def compile_networks(self) -> None:
        self.members.compile()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Train on a chunk of minibatches (n, M, batch_size)."""
        optimizer: Any = self.optimizers()
        losses: list[Tensor] = []
        self.members.train()
        for number, chosen in enumerate(batch, self.global_step * STEP_MINIBATCHES + 1):
            if self.trainer.should_stop:  # a resumed run of members that all have stopped
                return
            with torch.autocast(self.device.type, enabled=False):  # gradients are written by hand
                losses.append(self._backward(chosen))
            ended = self._update_stopping(losses[-1], number) if number > self.unwatched else []
            last = len(losses) == len(batch) or bool(ended and self.stopped.all())
            (optimizer if last else optimizer.optimizer).step()  # Lightning counts a step per chunk
            self._publish(ended)
            if last:
                break
        self._publish([member for member, stopped in enumerate(self.stopped.tolist()) if not stopped])
        self.note({"cross_entropy": torch.stack(losses).mean()}, batch)
        self.trainer.should_stop |= bool(self.stopped.all())

    def on_train_start(self) -> None:
        self.trainer.should_stop |= bool(self.stopped.all())

    def _backward(self, chosen: Tensor) -> Tensor:
        """Losses (M,) of a minibatch of pixels (M, batch_size), and all gradients.

        The first layer has nearly all the weights; autograd would allocate its gradient anew.
        """
        members = self.members
        rows, labels = self.pixels.gather(chosen.flatten(), self.gathered)
        x = rows.unflatten(0, chosen.shape)
        members.zero_grad()
        first = members.linears[0]
        with torch.no_grad():
            z = first(x)
        z.requires_grad_()
        logits = members(z).flatten(0, 1)
        losses = F.cross_entropy(logits, labels, reduction="none").view(len(x), -1).mean(1)
        losses.sum().backward()
        assert z.grad is not None
        first.bias.grad = z.grad.sum(1)
        first.weight.grad = torch.bmm(z.grad.mT, x, out=self.gradient)
        losses = losses.detach()
        if dist.is_initialized():
            for tensor in (losses, *(p.grad for p in members.parameters() if p.grad is not None)):
                dist.all_reduce(tensor)
                tensor /= dist.get_world_size()
        return losses

    def _update_stopping(self, losses: Tensor, number: int) -> list[int]:
        """The members that stop after this minibatch: `patience` of them did not improve on their best loss."""
        self.waited = torch.where(losses < self.best, 0, self.waited + 1)
        self.best = torch.minimum(self.best, losses)
        ended = (self.waited >= self.options.patience) & (self.stopped == 0)
        self.stopped = torch.where(ended, number, self.stopped)
        return ended.nonzero()[:, 0].tolist()

    @torch.no_grad()
    def _publish(self, members: Sequence[int]) -> None:
        """Give the model's ensemble the weights of some members, its channels in the extractor's order."""
        if not members:
            return
        published, back = self.model.classifier.mlps.state_dict(), self.order.argsort().to(self.device)
        for name, value in self.members.state_dict().items():
            for member in members:
                weights = value[member][:, back] if name == "layers.0.weight" else value[member]
                published[name][member].copy_(weights)


@dataclass
class SegmentationEvaluator(Evaluator):
    """IoU on images with masks, if there are any to measure on, and pictures of what segmenters predict, at the end.

    Args:
        predict: a model, an image (3, H, W) and the size of its mask to labels of that size.
        num_pictures: how many are drawn.
    """

    train_set: MaskFolder
    val_set: MaskFolder | None
    classes: Sequence[str]
    predict: Callable[[Any, Tensor, tuple[int, int]], Tensor] = lambda model, image, size: model.segment(image).labels
    num_pictures: int = 0

    def finish(self, model: Any, folder: OutputFolder | None) -> Metrics:
        counts, start = MeanIoU(len(self.classes)), time.monotonic()
        content: dict[str, Any] = {"metrics": {}, "images": self.train_set.names}
        if self.val_set is not None:
            counts = score_images(partial(self.predict, model), len(self.classes), self.val_set)
            content["metrics"] = counts.summary(self.classes)
            content["seconds_per_image"] = (time.monotonic() - start) / len(self.val_set)
            echo(f"{iou_table(content['metrics'])}\non the labelled pixels of {plural(len(self.val_set), 'image')}")
        if folder is not None:
            write_json(folder.file("metrics.json"), content)
            draw_comparisons(model, self.val_set or self.train_set, folder, self.num_pictures)
        return counts.named(self.classes)


@dataclass
class SegmentationRecipe(Recipe):
    """Train an ensemble of pixel classifiers on a few images with masks, and measure it on others.

    What is known of a pixel is what a network says of it: a diffusion model trained on such images without labels
    (`DiffusionFeatures`), any timm model (`TimmFeatures`), or its colour alone (`RGBFeatures`), all of
    `diffperception.segmentation`; `ExtractedFeatures` takes what `diffperception extract` has written.

    The published recipe lets every member go on until fifty minibatches have not improved it, which takes very long
    for what it gains: here 1000 minibatches are the most, unless fit.max_minibatches says otherwise (null: no limit).
    A step is a hundred minibatches of every member; trainer.max_steps is refused.

    Args:
        features: what is known of pixels: one of these classes, or one of your own, and its arguments.
        data: what is learned from, and measured on.
        members: classifiers in the ensemble; where they differ, a pixel is uncertain.
        fit: how they learn.
        num_pictures: how many are drawn, of the images measured on, else of those learned from.
        init: training starts from the weights in this file that fit the model by name and shape, and from new ones
            elsewhere: a segmenter of any classes on such features, or what fits the features themselves, which are
            not trained: a generator, or a timm model's weights.
    """

    task = "segmentation"
    example = "configs/segmentation/shapes.yaml"
    files: ClassVar = {
        "model.safetensors": "features and classifiers, for `diffperception predict` and `evaluate`",
        "metrics.json": "IoU on the images measured on, if there are any; times",
        "pictures/": "image, truth, prediction and uncertainty",
    }
    lasting = ("fit.batch_size", "data.classes", "members")

    features: FeatureExtractor
    data: MaskDataOptions
    members: PositiveInt = 10
    fit: FitOptions = field(default_factory=lambda: FitOptions(max_minibatches=1000))
    num_pictures: NonNegativeInt = 4
    init: Path | None = None

    def prepare(self, seed: int) -> Parts:
        train_set, val_set = self.data.open(seed), self.data.open_val()
        for folder in (train_set, *([val_set] if val_set else [])):
            for index in range(len(folder)):
                folder.images[index]  # a broken one is better found before the training than after
        features, classes, masks = self.features, self.data.classes, list(train_set.masks)
        ensemble = PixelEnsemble(features.channels, len(classes), self.members)
        model = PixelSegmenter(features, ensemble, classes, self.data.short_side)
        module = EnsembleModule(model, features, train_set.images, masks, self.fit, seed, train_set.names)
        dtype = getattr(torch, self.fit.feature_dtype)
        memory = stored_bytes(features, [mask.shape for mask in masks], dtype)
        return Parts(
            module,
            PixelBatches(module.num_pixels, self.members, self.fit, seed),
            SegmentationEvaluator(train_set, val_set, classes, num_pictures=self.num_pictures),
            f"{plural(self.members, 'classifier')} {'learns' if self.members == 1 else 'learn'}"
            f" {len(classes)} classes from {module.num_pixels} pixels of {plural(len(masks), 'image')};"
            f" {features.channels} features per pixel, {in_bytes(memory)} in memory; at most"
            f" {self.fit.most_minibatches(module.num_pixels)} minibatches per member",
            [
                *train_set.notes,
                *(val_set.notes if val_set else []),
                *loaded_weights(model),
                *filter(None, [module.notes]),
            ],
        )


def fit_ensemble(
    features: FeatureExtractor,
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    num_classes: int,
    members: int = 10,
    options: FitOptions | None = None,
    names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    trainer: TrainerOptions | None = None,
) -> PixelEnsemble:
    """An ensemble trained on labelled images; warns where a class has too few pixels to count.

    Of what is not said here, and of errors, see :class:`EnsembleModule`.

    Args:
        features: the extractor.
        num_classes: K.
        members: classifiers in the ensemble.
        classes: names of 0..K-1, for messages.
        trainer: what it is trained on; by default on an accelerator, if there is one.
    """
    classes = classes or [str(label) for label in range(num_classes)]
    model = PixelSegmenter(features, PixelEnsemble(features.channels, num_classes, members), classes)
    _fit(model, features, images, masks, options or FitOptions(), names, seed, trainer)
    return model.classifier


def fit_segmenter(
    features: FeatureExtractor,
    samples: Dataset[tuple[Tensor, Tensor]],
    classes: Sequence[str],
    members: int = 10,
    options: FitOptions | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    trainer: TrainerOptions | None = None,
) -> PixelSegmenter:
    """A segmenter trained on samples that are an image and its mask, each fetched once and kept in memory.

    So a data set may draw crops at random, and the network passes each image once. See :func:`fit_ensemble`.

    Args:
        features: the extractor.
        samples: image (3, H, W; RGB, 0..1 or uint8) and mask (H, W; 0..K-1 or 255), of any sizes; it has a length.
        classes: names of 0..K-1.
        options: how they learn; by default as in `diffperception train`, for 1000 minibatches at most.
    """
    pairs = [samples[index] for index in range(len(samples))]  # type: ignore[arg-type]
    images, masks = LazyMap(to_float, [image for image, _ in pairs]), [mask for _, mask in pairs]
    model = PixelSegmenter(features, PixelEnsemble(features.channels, len(classes), members), classes)
    _fit(model, features, images, masks, options or FitOptions(max_minibatches=1000), names, seed, trainer)
    return model


def _fit(
    model: PixelSegmenter,
    features: FeatureExtractor,
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    options: FitOptions,
    names: Sequence[str] | None,
    seed: int,
    trainer: TrainerOptions | None,
) -> None:
    module = EnsembleModule(model, features, images, masks, options, seed, names)
    if module.notes:
        warnings.warn(module.notes, stacklevel=3)
    fit_quietly(module, PixelBatches(module.num_pixels, model.classifier.members, options, seed), trainer)
