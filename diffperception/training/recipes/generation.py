"""Training of a generator of images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from torch import Tensor

from diffperception.configuration.inheritance import given, spread_files
from diffperception.configuration.messages import construct
from diffperception.data.batches import SeededSamples, collate
from diffperception.data.image_folder import ImageDataOptions, ImageFolder
from diffperception.data.images import LazyMap
from diffperception.devices import first_process, gather, share, to_device
from diffperception.diffusion import LossSecondMoment, UniformTimes, sample_seed
from diffperception.files import OutputFolder, write_text
from diffperception.generation.inference import draw_samples
from diffperception.generation.sampling import SamplingOptions, sampling_grid
from diffperception.models.generator import DiffusionModel
from diffperception.models.text_conditioner import TextReader
from diffperception.models.unet.encoder import both_sides
from diffperception.training.configured import options_for
from diffperception.training.data import TrainingData
from diffperception.training.module import TrainingModule
from diffperception.training.options import OptimizerOptions
from diffperception.training.recipe import Evaluator, Metrics, Parts, Recipe, size_of
from diffperception.visualization.draw import save_png
from diffperception.visualization.panels import image_grid

Batch = tuple[list[Tensor], list[dict[str, Any]]]


@dataclass
class ObjectiveOptions:
    """What the generator learns at which times.

    Args:
        times: uniform, or loss_second_moment: in proportion to how large their losses have been, which quiets the
            gradients of a learned variance (arXiv 2102.09672).
        min_snr: weigh the loss of x0 by the signal-to-noise ratio, at most this (arXiv 2303.09556; 5 there); null
            weighs the loss of the prediction by 1.
        label_dropout: fraction of images whose label is replaced by the null class, or whose caption by nothing, for
            classifier-free guidance; a model of labels needs a null class.
        noise: cpu draws the same noise whatever the model is trained on; device draws it there, which takes no core of
            the CPU and no copy, but gives other numbers.
    """

    times: Literal["uniform", "loss_second_moment"] = "uniform"
    min_snr: PositiveFloat | None = None
    label_dropout: ClosedUnitInterval = 0.0
    noise: Literal["cpu", "device"] = "cpu"


@dataclass
class PreviewOptions:
    """What is looked at, now and then during training and at its end.

    Args:
        every: steps between looks; null for one at the end only.
        num_samples: how many images are drawn, always from the same noise.
        sampling: how they are drawn.
        num_held_out: how many images of data.val_images the loss is measured on.
        batch_size: images per pass.
    """

    every: PositiveInt | None = 1000
    num_samples: PositiveInt = 36
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    num_held_out: PositiveInt = 256
    batch_size: PositiveInt = 32


class GenerationModule(TrainingModule):
    """The step of a generator: noised images, and the loss of what the network makes of them.

    Raises:
        ValueError: the model has no null class that labels could be replaced by, or no discrete steps to learn of.
    """

    model: DiffusionModel

    def __init__(self, model: DiffusionModel, options: OptimizerOptions, seed: int, objective: ObjectiveOptions):
        super().__init__(model, options, seed)
        self.freeze_stages()
        if objective.label_dropout and (model.conditioner is None or not model.conditioner.has_absent):
            raise ValueError("objective.label_dropout needs classes and model.null_class: true, or captions")
        self.times: UniformTimes | LossSecondMoment = UniformTimes(model.schedule)
        if objective.times == "loss_second_moment":
            self.times = LossSecondMoment(model.schedule.require_discrete(f"objective.times {objective.times}"))
        self.objective = model.objective(objective.min_snr)
        self.label_dropout = objective.label_dropout
        self.noise = objective.noise

    def layers(self, stages: bool = False) -> dict[str, int]:
        return {f"network.{name}": number for name, number in self.model.network.layers().items()}

    def loss_terms(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        images, targets = batch
        x0 = self.model.space.encode(torch.stack(images))
        said = self.model.read(targets)
        if self.model.conditioner is not None and self.label_dropout:
            dropped = torch.rand(len(images), generator=generator) < self.label_dropout
            said = self.model.conditioner.drop(said, dropped)
        t, weights = (to_device(x, self.device) for x in self.times.sample(len(x0), generator))
        if self.noise == "device":
            generator = torch.Generator(x0.device).manual_seed(generator.initial_seed())
        losses = self.model.losses(self.objective, x0, t, noise_like(x0, generator), said)
        self._learn_times(t, losses)
        return {name: (weights * values).mean() for name, values in losses.items()}

    @torch.no_grad()
    def _learn_times(self, t: Tensor, losses: dict[str, Tensor]) -> None:
        """Tell a sampler that learns from the losses what all processes have found."""
        if not isinstance(self.times, LossSecondMoment):
            return
        total = torch.stack(list(losses.values())).sum(0)
        if dist.is_initialized():
            t, total = (self.all_gather(values).flatten() for values in (t, total))  # type: ignore[union-attr]
        self.times.update(t, total)

    def compile_networks(self) -> None:
        self.model.network.compile()


def noise_like(x0: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of a signal's shape, drawn on the generator's device."""
    noise = torch.randn(x0.shape, generator=generator, device=generator.device)
    return to_device(noise, x0.device).to(x0.dtype)


def held_out_batches(
    dataset: ImageFolder, numbers: Sequence[int], batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, list[dict[str, Any]]]]:
    """Images (B, C, H, W), 0..1, on the device and their targets, with the same crops in every call.

    Args:
        numbers: which images, modulo how many there are; the number is the seed of the crop too.
    """
    samples = SeededSamples(dataset)
    for start in range(0, len(numbers), batch_size):
        chosen = numbers[start : start + batch_size]
        images, targets = collate([samples[number % len(dataset), number] for number in chosen])
        yield to_device(torch.stack(images), device), targets


@torch.no_grad()
def held_out_loss(model: DiffusionModel, dataset: ImageFolder, num_images: int, batch_size: int) -> float:
    """The mean loss over images and evenly spaced times, with the same crops, noise and times in every call."""
    model.eval()
    objective, generator, total = model.objective(), torch.Generator().manual_seed(0), 0.0
    places = ((torch.arange(num_images) + 0.5) / num_images).split(batch_size)
    batches = held_out_batches(dataset, range(num_images), batch_size, model.device)
    for fractions, (images, targets) in zip(places, batches, strict=True):
        x0 = model.space.encode(images)
        t = to_device(model.schedule.from_fraction(fractions), model.device)
        losses = model.losses(objective, x0, t, noise_like(x0, generator), model.read(targets))
        total += float(torch.stack(list(losses.values())).sum())
    return total / num_images


class GenerationEvaluator(Evaluator):
    """Samples from the averaged and the raw weights, and their loss on images that are not learned from, if any.

    Raises:
        ValueError: the model cannot be sampled as the options say.
    """

    last = True

    def __init__(self, model: DiffusionModel, held_out: ImageFolder | None, options: PreviewOptions, seed: int):
        self.held_out, self.options, self.seed = held_out, options, seed
        self.every, sampling = options.every, options.sampling
        try:
            sampling_grid(model.schedule, sampling.sampler, sampling.steps)
            model.denoiser(model.conditioner and model.conditioner.choose(None, range(1)), sampling.guidance)
        except ValueError as error:
            raise ValueError(f"option preview.sampling: {error}") from None

    def evaluate(self, averaged: Any, raw: Any, step: int, folder: OutputFolder | None) -> Metrics:
        models = {"averaged": averaged} if raw is averaged else {"averaged": averaged, "raw": raw}
        for name, model in models.items():
            if folder is not None:
                self.draw(model.eval(), folder, f"pictures/samples_{step:07}_{name}.png")
        if self.held_out is None:
            return {}
        how = (self.held_out, self.options.num_held_out, self.options.batch_size)
        return {f"held_out_{name}": held_out_loss(model, *how) for name, model in models.items()}

    def draw(self, model: DiffusionModel, folder: OutputFolder, name: str) -> None:
        """A grid of samples from noise that is the same for every model and step; each process draws its share."""
        options, numbers = self.options, share(range(self.options.num_samples))
        drawn = draw_samples(model, numbers, options.sampling, self.seed, batch_size=options.batch_size)
        images = gather([image for _, batch in drawn for image in batch.cpu()])
        if first_process():
            save_png(image_grid(images), folder.file(name))
            if isinstance(model.conditioner, TextReader):
                shown = model.conditioner.choose(None, range(options.num_samples))
                write_text(folder.file("pictures/captions.txt"), "\n".join(shown) + "\n")


@dataclass
class GenerationRecipe(Recipe):
    """Train a generator of images on a folder of images, and draw samples from it.

    Args:
        model: the generator's class and its arguments, all but the classes, which are the folders' names.
        data: what it learns from.
        optimizer: how the weights are updated.
        objective: what is learned at which times.
        preview: samples and held-out loss.
        init: training starts from the weights in this file that fit the model by name and shape, and from new ones
            elsewhere: a generator of any classes or none, or a UNet.
    """

    task = "generation"
    example = "configs/generation/shapes.yaml"
    files: ClassVar = {
        "model.safetensors": "the trained generator, for `diffperception sample`",
        "pictures/": "samples over the steps, from the averaged and the raw weights; curves.png",
    }
    lasting = ("data.labelled", "objective.times")

    model: Callable[[list[str] | None], DiffusionModel]
    data: ImageDataOptions
    optimizer: OptimizerOptions = field(
        default_factory=lambda: OptimizerOptions(lr=2e-4, base_batch_size=32, weight_decay=0.0)
    )
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    preview: PreviewOptions = field(default_factory=PreviewOptions)
    init: Path | None = None

    def prepare(self, seed: int) -> Parts:
        model = construct(self.model, self.data.classes())
        train, val = self.data.open(model.image_size, model.space.image_channels)
        model.prepare(None if train.captions is None else list(chain.from_iterable(train.captions)))
        height, width = model.image_size
        return Parts(
            GenerationModule(model, self.optimizer, seed, self.objective),
            TrainingData(train, self.data.batch_size, self.data.workers, seed),
            GenerationEvaluator(model, val, self.preview, seed),
            f"{size_of(model)} learns {height} x {width} pixels from {len(train)} images{left_out(train, val)}",
        )


def left_out(images: ImageFolder, held_out: ImageFolder | None) -> str:
    """How many images are held out, how many of the first folder, and what else in both, is not used, if any."""
    remarks = dict.fromkeys(folder.remark for folder in (images, held_out) if folder is not None and folder.remark)
    parts = [f"; {len(held_out)} are held out"] if held_out is not None and images.options.val_share else []
    parts += [f"; {images.skipped} are left out"] if images.skipped else []
    return "\n".join(["".join(parts), *remarks])


def training_crops(config: Path, number: int, seed: int) -> LazyMap[Tensor]:
    """So many crops (3, H, W), 0..1, of the images that a generator learned from, as its run's configuration says.

    Each is a function of the seed and its own number.

    Raises:
        ValueError, ArgumentError: the file does not hold the options of such a run.
    """
    if not config.is_file():
        raise FileNotFoundError(f"there is no file {config}: give the config.yaml of a training run, or a folder")
    arguments = ["--config", str(config)]
    if given(spread_files(arguments), "task") != "generation":
        raise ValueError(f"{config} is not the config.yaml of a training of a generator")
    parsed = options_for(arguments).parse(arguments)
    model, data = parsed.model.init_args, ImageDataOptions(**vars(parsed.data))
    channels = model.network.init_args.in_channels
    train_set, _ = replace(data, val_images=None).open(both_sides(model.image_size), channels)
    return LazyMap(partial(_crop, train_set, seed), range(number))


def _crop(folder: ImageFolder, seed: int, number: int) -> Tensor:
    image, _ = SeededSamples(folder)[number % len(folder), sample_seed(seed, number)]
    return image.expand(3, -1, -1)
