"""What a generator's features are worth where few images are labelled, beside other ways to learn from them."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import groupby, product
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffperception.configuration.settings import differences, read_settings
from diffperception.data.batches import spread
from diffperception.data.masks import MaskDataOptions, MaskFolder, read_mask
from diffperception.devices import Precision, autocast, pick_device
from diffperception.echo import echo, echo_notes, plural
from diffperception.files import OutputFolder, digest, safe_path, write_json, write_text
from diffperception.models import DiffusionModel, UNet
from diffperception.models.base import describe
from diffperception.segmentation import DiffusionFeatures, FeatureExtractor, MeanIoU, PixelSegmenter, RGBFeatures
from diffperception.segmentation.baseline import own_unet, predict_labels
from diffperception.segmentation.feature_cache import CachedFeatures, in_bytes, parse_bytes, settings_of, stored_bytes
from diffperception.segmentation.features import untrained
from diffperception.table import format_table
from diffperception.training.options import TrainerOptions
from diffperception.training.recipe import Recipe
from diffperception.training.recipes.baseline import BaselineOptions, BaselineRecipe
from diffperception.training.recipes.segmentation import FitOptions, SegmentationRecipe
from diffperception.training.run import fit_quietly
from diffperception.visualization.curves import label_curves
from diffperception.visualization.draw import save_png
from diffperception.visualization.panels import PANEL_SIDE, image_row, legend, mask_overlay, stack

Method = Literal["diffusion", "untrained", "rgb", "scratch"]
COMPARISON = "compare.json"
TITLES = {
    "diffusion": "diffusion features",
    "untrained": "untrained UNet's features",
    "rgb": "colours",
    "scratch": "UNet from scratch",
}


@dataclass
class Learner:
    """A way to learn from labelled images and to predict."""

    recipe: Callable[[MaskDataOptions], Recipe]  # for some images
    predict: Callable[[Any, Tensor, tuple[int, int]], Tensor]  # model and resized image to labels (height, width)
    trainer: TrainerOptions


Run = tuple[str, int, int]  # method, number of labelled images, seed


class Results:
    """compare.json: settings, and a row for each method, number of labelled images and seed that is finished.

    Those of earlier calls are kept, if they are not to be overwritten and the content that they were made of is still
    the same; ValueError if they are of other settings.
    """

    def __init__(self, folder: OutputFolder, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.rows: list[dict[str, Any]] = []
        path = folder.path / COMPARISON
        if folder.overwrite or not path.exists():
            return
        kept = read_settings(path)
        changed = differences(kept["settings"], settings)
        if changed:
            raise ValueError(
                f"{path} holds results of other settings ({', '.join(changed)}): choose another --output, or"
                " replace them with --overwrite"
            )
        self.rows = kept["results"]

    def choices(self, *wanted: Iterable[int]) -> list[tuple[int, int]]:
        """Numbers of labelled images and seeds: those wanted, and those that there are results of."""
        return list(dict.fromkeys([*product(*wanted), *((row["labels"], row["seed"]) for row in self.rows)]))

    def begin(self, contents: Mapping[tuple[int, int], str]) -> None:
        """Let go of results whose images or masks were others, and say so; what is to be overwritten goes too.

        Args:
            contents: of what is learned from and tested on, for the :meth:`choices`.
        """
        same = [row for row in self.rows if row["content"] == contents[row["labels"], row["seed"]]]
        if changed := len(self.rows) - len(same):
            echo(f"{plural(changed, 'result')} of images or masks that have changed since: made anew where asked for")
        self.rows = same
        if self.folder.overwrite:
            self.folder.clear()
        self.folder.remove_parts()
        self.write()

    def missing(self, *wanted: Iterable[Any]) -> list[Run]:
        """What is still to be done of some methods, numbers of labelled images and seeds."""
        done = {(row["method"], row["labels"], row["seed"]) for row in self.rows}
        return [run for run in product(*wanted) if run not in done]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished row, on disk too."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the file."""
        content = {"settings": self.settings, "summary": mean_and_spread(self.rows), "results": self.rows}
        write_json(self.folder.file(COMPARISON), content)


def compare_label_efficiency(
    features: DiffusionFeatures,
    data: MaskDataOptions,
    output: str | Path,
    labels: list[PositiveInt] = [5, 10, 20],  # noqa: B006 (the defaults are not changed)
    num_seeds: PositiveInt = 3,
    methods: list[Method] = ["diffusion", "untrained", "rgb", "scratch"],  # noqa: B006
    members: PositiveInt = 10,
    fit: FitOptions = FitOptions(),  # noqa: B008
    baseline: BaselineOptions = BaselineOptions(),  # noqa: B008
    num_pictures: NonNegativeInt = 4,
    max_memory: str = "8GB",
    device: str = "auto",
    precision: Precision = "32",
    seed: NonNegativeInt = 0,
    overwrite: bool = False,
    task: Literal["segmentation"] = "segmentation",
) -> list[dict[str, Any]]:
    """Compare a generator's features with other ways to learn from a few labelled images.

    With each number of labelled images and each seed, which chooses them, it trains pixel classifiers on the features
    of the generator (diffusion), of the same UNet with random weights (untrained) and on the colours alone (rgb), and a
    UNet of the same size from scratch (scratch); and scores them on `data.val_images`.

    Writes compare.json (every result), compare.md (the table of means and spreads), compare.png (curves) and
    examples.png (predictions with the fewest labelled images). The command can be interrupted: given again, it goes on
    with what is missing, also where seeds, methods or numbers of labelled images have been added, and makes those
    results anew whose images or masks have changed.

    For example: `diffperception compare configs/segmentation/bccd_compare.yaml --labels 5 10 20 --num_seeds 3`.

    Args:
        features: the features of the generator.
        data: the images to choose labelled ones from, whatever its max_images, and those to score on.
        output: folder for the results.
        labels: numbers of labelled images; each choice is a part of the larger ones of its seed.
        num_seeds: how many choices of labelled images, each with its own weights and minibatches.
        methods: which of the four ways to learn are compared.
        members: members of the ensembles of pixel classifiers.
        fit: how pixel classifiers learn.
        baseline: how the UNet from scratch learns.
        num_pictures: how many images of those scored on are drawn.
        max_memory: how much the features that are kept may take, such as 4GB.
        precision: 32, or bf16, in which the UNet from scratch then learns and predicts.
        seed: seed of the first choice of labelled images; the next has the next seed.
        overwrite: replace the results that the output folder holds.
        task: that of the training whose configuration this one builds on.

    Returns: the table: a dictionary per method and number of labelled images, see :func:`mean_and_spread`.

    Raises:
        ValueError: options, images and the results in the folder do not fit each other.
    """
    output, place = Path(output), pick_device(device)
    features, limit = features.to(place), parse_bytes(max_memory)
    if not (labels and methods):
        raise ValueError("name at least one number of labelled images in labels, and one of the methods")
    if "scratch" in methods:
        own_unet(features.generator.network).check_size(baseline.crop, baseline.crop)
    trainer = TrainerOptions(
        accelerator={"cuda": "gpu"}.get(place.type, place.type),
        devices=1 if place.index is None else [place.index],
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )
    # All that results depend on, but not what only chooses which are made.
    about = {"data": asdict(replace(data, max_images=None)), "fit": asdict(fit), "baseline": asdict(baseline)}
    settings = describe({**about, **settings_of(features), "members": members, "precision": trainer.precision})
    results = Results(OutputFolder(output, overwrite, goes_on=COMPARISON), settings)
    tried = range(seed, seed + num_seeds)
    test = data.open_val()
    if test is None:
        raise ValueError("give data.val_images and data.val_masks, the images to score on")
    said: set[str] = set()  # many choices of images give one note
    _echo_new(test.notes, said)
    contents = contents_of_choices(data, test, results.choices(labels, tried))
    images = [*map(data.resized, test.images), *images_to_learn_from(data, max(labels), tried)]
    results.begin(contents)
    left = len(results.missing(methods, labels, tried))
    echo(f"{left} of {len(methods) * len(labels) * num_seeds} results are still to be made")

    def learner(method: Method) -> Learner:
        if method == "scratch":
            return unet_learner(features.generator, baseline, trainer)
        extractors = {"diffusion": lambda: features, "untrained": lambda: untrained(features), "rgb": RGBFeatures}
        kept = keep(extractors[method](), images, limit, TITLES[method])
        return pixel_learner(kept, members, fit, trainer)

    began = time.monotonic()
    for method in methods:
        known = None  # the features that were kept for the method before are let go
        for _, count, number in results.missing([method], labels, tried):
            known = known or learner(method)
            row, predictions = measure_learner(known, replace(data, max_images=count), test, number, said)
            if count == min(labels) and number == seed:
                for name, found in zip(test.names, predictions, strict=True):
                    save_png(Image.fromarray(found.numpy()), results.folder.file(_example(method, name)))
            content = contents[count, number]
            results.add({"method": method, "labels": count, "seed": number, "content": content, **row})
            left, so_far = left - 1, tqdm.format_interval(time.monotonic() - began)
            echo(f"{_in_words(results.rows[-1])}; {so_far} so far, {left} results left")
    summary = mean_and_spread(results.rows)
    _report(summary, data.classes, test, num_pictures, results.folder)
    return summary


def contents_of_choices(
    data: MaskDataOptions, test: MaskFolder, choices: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], str]:
    """A number of the content of images and masks: those tested on, and so many labelled ones of a seed's choice."""
    files: dict[Path, str] = {}

    def content(folder: MaskFolder, count: int) -> list[tuple[str, str, str]]:
        chosen = list(zip(folder.names, folder.images.items, folder.masks.items, strict=True))[:count]
        files.update({path: digest(path) for pair in chosen for path in pair[1:] if path not in files})
        return [(name, files[image], files[mask]) for name, image, mask in chosen]

    most = max(count for count, _ in choices)
    folders = {seed: replace(data, max_images=most).open(seed) for seed in {seed for _, seed in choices}}
    tested = content(test, len(test))
    return {
        (count, seed): blake2b(repr((content(folders[seed], count), tested)).encode(), digest_size=16).hexdigest()
        for count, seed in choices
    }


def images_to_learn_from(data: MaskDataOptions, count: int, seeds: Iterable[int]) -> list[Tensor]:
    """The images, resized, of all choices of so many; ValueError if there are fewer."""
    folders = [replace(data, max_images=count).open(seed) for seed in seeds]
    if len(folders[0]) < count:
        found = plural(len(folders[0]), "labelled image")
        raise ValueError(f"{data.images} has {found}, but {count} are to be chosen")
    named: dict[str, Tensor] = {}
    for folder in folders:
        named |= zip(folder.names, folder.images, strict=True)
    return list(named.values())


def keep(features: FeatureExtractor, images: Sequence[Tensor], limit: int, title: str) -> CachedFeatures:
    """The extractor with the features of these images in memory, in half precision; ValueError for too many bytes."""
    needed = stored_bytes(features, [image.shape[1:] for image in images], torch.float16)
    if needed > limit:
        raise ValueError(
            f"the {title} of {plural(len(images), 'image')} take {in_bytes(needed)} of memory, but the limit is"
            f" {in_bytes(limit)}: name fewer blocks or timesteps, set a smaller data.short_side, or raise --max_memory"
        )
    start = time.monotonic()
    kept = CachedFeatures(features)
    for image in tqdm(images, desc=title, unit="image", leave=False, disable=None):
        kept.maps(image)
    echo(f"{title}: {features.channels} per pixel, {in_bytes(needed)} in memory, {time.monotonic() - start:.0f} s")
    return kept


def pixel_learner(features: FeatureExtractor, members: int, fit: FitOptions, trainer: TrainerOptions) -> Learner:
    """Pixel classifiers on features, which may be kept for all images, in float32."""

    def predict(model: PixelSegmenter, image: Tensor, size: tuple[int, int]) -> Tensor:
        return model.classifier.segment(features.maps(image)).resized(*size).labels.cpu()

    in_full = replace(trainer, precision="32-true")
    return Learner(lambda data: SegmentationRecipe(features, data, members, fit), predict, in_full)


def unet_learner(generator: DiffusionModel | UNet, options: BaselineOptions, trainer: TrainerOptions) -> Learner:
    """A UNet as large as a generator's, from scratch."""

    def predict(model: UNet, image: Tensor, size: tuple[int, int]) -> Tensor:
        with autocast(model.device, "bf16" if trainer.precision == "bf16-mixed" else "32"):
            return predict_labels(model, image, size)

    return Learner(lambda data: BaselineRecipe(generator, data, options), predict, trainer)


def measure_learner(
    learner: Learner, data: MaskDataOptions, test: MaskFolder, seed: int, said: set[str]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Scores, seconds and the images learned from, for the results; and the predictions of the test images.

    Args:
        said: notes that are not to be said again.
    """
    data, start = replace(data, val_images=None, val_masks=None), time.monotonic()
    torch.manual_seed(seed)
    parts = learner.recipe(data).prepare(seed)
    _echo_new(parts.notes, said)
    model = fit_quietly(parts.module, parts.data, learner.trainer)
    learned = time.monotonic()
    score, predictions = MeanIoU(len(data.classes)), []
    for index in tqdm(range(len(test)), desc="test", unit="image", leave=False, disable=None):
        image, mask = test[index]
        found = learner.predict(model, data.resized(image), (mask.shape[0], mask.shape[1]))
        predictions.append(found.to(torch.uint8))
        score.update(found, mask)
    seconds = {"training": round(learned - start, 1), "test": round(time.monotonic() - learned, 1)}
    return {**score.summary(data.classes), "seconds": seconds, "images": data.open(seed).names}, predictions


def mean_and_spread(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread (sample standard deviation; null for one seed) of the mIoU over the seeds."""

    def place(row: Mapping[str, Any]) -> tuple[int, int]:
        return list(TITLES).index(row["method"]), row["labels"]

    summary = []
    for (method, labels), cell in groupby(sorted(rows, key=place), place):
        values = [row["miou"] for row in cell]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        about = {"miou": statistics.fmean(values), "spread": deviation, "seeds": len(values)}
        summary.append({"method": list(TITLES)[method], "labels": labels, **about})
    return summary


def label_table(summary: Iterable[Mapping[str, Any]]) -> str:
    """The mIoU in percent as Markdown, a row per method and a column per number of labelled images."""
    rows: dict[str, dict[int, str]] = {}
    for cell in summary:
        deviation = "" if cell["spread"] is None else f" ± {100 * cell['spread']:.1f}"
        rows.setdefault(cell["method"], {})[cell["labels"]] = f"{100 * cell['miou']:.1f}{deviation}"
    counts = sorted({count for row in rows.values() for count in row})
    table = [[TITLES[method], *(row.get(count, "") for count in counts)] for method, row in rows.items()]
    return format_table(table, ["labelled images", *map(str, counts)], markdown=True)


def lead_sentence(summary: Iterable[Mapping[str, Any]]) -> str:
    """How far the diffusion features are above or below the best of the others, for each number of labelled images."""
    means: dict[int, dict[str, float]] = {}
    for cell in summary:
        means.setdefault(cell["labels"], {})[cell["method"]] = cell["miou"]
    parts = []
    for count, by_method in sorted(means.items()):
        ours = by_method.pop("diffusion", None)
        if by_method and ours is not None:
            best = max(by_method, key=by_method.__getitem__)
            parts.append(f"{100 * (ours - by_method[best]):+.1f} at {count} ({TITLES[best]})")
    return "mIoU of diffusion features over the best of the others, in points: " + ", ".join(parts) if parts else ""


def _echo_new(notes: Sequence[str], said: set[str]) -> None:
    echo_notes([note for note in notes if note not in said])
    said.update(notes)


def _in_words(row: Mapping[str, Any]) -> str:
    ious = ", ".join(f"{name} {100 * iou:.1f}" for name, iou in row["iou"].items() if iou is not None)
    seconds = f"{row['seconds']['training']:.0f} s training, {row['seconds']['test']:.0f} s test"
    return (
        f"{TITLES[row['method']]}, {plural(row['labels'], 'labelled image')}, seed {row['seed']}:"
        f" mIoU {100 * row['miou']:.1f} ({ious}); {seconds}"
    )


def _example(method: str, name: str) -> Path:
    """Where a method's prediction of a test image is kept, whether it is to be drawn now, later or never."""
    path = "examples" / Path(method) / safe_path(name)
    return path.with_name(f"{path.name}.png")


def _report(
    summary: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    test: MaskFolder,
    num_pictures: int,
    folder: OutputFolder,
) -> None:
    """Print the table; write it, its curves and the pictures."""
    text = f"{label_table(summary)}\n\n{lead_sentence(summary)}"
    write_text(folder.file("compare.md"), text + "\n")
    save_png(label_curves(summary, TITLES), folder.file("compare.png"))
    rows = [_example_row(test, index, folder.path) for index in spread(len(test), num_pictures)]
    if rows:
        save_png(stack([*rows, legend(classes)], vertical=True), folder.file("examples.png"))
    echo(f"{text}\n{folder.path / COMPARISON}: every result; beside it compare.md, compare.png and examples.png")


def _example_row(test: MaskFolder, index: int, output: Path) -> Image.Image:
    """An image beside its mask and what each method predicted from the fewest labelled images."""
    image, mask = test[index]
    files = {title: output / _example(method, test.names[index]) for method, title in TITLES.items()}
    predicted = {title: torch.tensor(read_mask(file)) for title, file in files.items() if file.exists()}
    panels = {title: mask_overlay(image, labels) for title, labels in {"truth": mask, **predicted}.items()}
    return image_row({"image": image, **panels}, PANEL_SIDE)
