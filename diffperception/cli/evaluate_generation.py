"""`diffperception evaluate --task generation`: how close generated images are to real ones."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffperception.cli import say
from diffperception.cli.evaluate import pick_device
from diffperception.cli.main import find
from diffperception.cli.parsing import build_parser, parse
from diffperception.cli.report import write_text
from diffperception.data import SeededSamples
from diffperception.data.image_folder import ImageFolder
from diffperception.data.images import read_image
from diffperception.detection.inference import ignore_interrupts
from diffperception.diffusion import sample_seed
from diffperception.files import images_below
from diffperception.generation.evaluator import ImageScores, compare
from diffperception.generation.feature_networks import RANDOM, FeatureNetwork, feature_network
from diffperception.models.convert.checkpoints import read_weights
from diffperception.models.generator import both_sides
from diffperception.training.recipes.generation import ImageDataOptions

SUBSET_SIZE = 1000  # as KID is usually measured


def evaluate(
    samples: Path,
    reference: Path,
    features: str = "inception_v3.tf_in1k",
    weights: Path | None = None,
    size: PositiveInt | None = None,
    output: Path | None = None,
    subsets: PositiveInt = 100,
    subset_size: PositiveInt | None = None,
    neighbours: PositiveInt = 3,
    batch_size: PositiveInt = 32,
    workers: NonNegativeInt = 2,
    device: str = "auto",
    seed: NonNegativeInt = 0,
) -> None:
    """Score generated images against real ones: FID, KID, precision and recall.

    The images of both folders and their subfolders are resized, with antialiasing, to what the feature network takes.
    Figures can be compared only within one feature network, one size and equal numbers of images; none of these
    networks is the one of published FIDs.

    Args:
        samples: folder with the generated images.
        reference: folder with real images, cropped as those that the generator learned from; or the YAML file of its
            training, whose pictures are then cropped as they were there, as many crops as there are samples.
        features: the feature network: a timm model; random: and a timm model for untrained weights, such as
            random:resnet18, a weak measure that needs no network; or the model.safetensors file of a detector, for its
            backbone.
        weights: file with the timm model's weights, .pth or .safetensors, instead of fetching them.
        size: pixels in height and width that images are resized to; by default what the timm model was trained with,
            224 for a detector.
        output: folder for metrics.json; nothing is written without it.
        subsets: how often KID is measured, each time on other images.
        subset_size: images of either kind in one such measurement; by default 1000, or half of the smaller folder if
            that is less.
        neighbours: precision and recall take an image's distance to so many nearest ones as its reach.
        batch_size: images in one pass.
        workers: processes that read images.
        device: cpu, cuda, cuda:1, ... or auto.
        seed: of the subsets, and of the crops of a training's pictures.
    """
    if subset_size == 1:
        raise ValueError("option subset_size: KID compares 2 images of either kind at least, not 1")
    pictures: dict[str, Sequence[Tensor]] = {"samples": Files(images_below(samples))}
    pictures["reference"] = (
        training_crops(reference, len(pictures["samples"]), seed)
        if reference.suffix in (".yaml", ".yml")
        else Files(images_below(reference))
    )
    counts = {name: len(images) for name, images in pictures.items()}
    require_images(counts, max(neighbours + 1, subset_size or 2))
    chosen = pick_device(device)
    if weights is None and not features.startswith(RANDOM) and not features.endswith(".safetensors"):
        say(f"the weights of {features} are fetched, unless they have been before")
    network = feature_network(features, None if weights is None else read_weights(weights)[0], size).to(chosen)
    found = {name: extract(network, images, name, batch_size, workers, chosen) for name, images in pictures.items()}
    say("the features are read; comparing them takes up to some minutes")
    subset_size = subset_size or max(2, min(SUBSET_SIZE, min(counts.values()) // 2))
    generator = torch.Generator().manual_seed(seed)
    scores = compare(found["reference"].rows, found["samples"].rows, subsets, subset_size, neighbours, generator)
    notes = [*size_notes(found), *rank_notes(counts, network.channels)]
    say(table(scores, neighbours, f"mean and deviation over {subsets} subsets of {subset_size}"))
    say(f"{counts['samples']} samples, {counts['reference']} real images; {network.channels} features of {features}")
    for note in notes:
        say(f"note: {note}")
    if output is None:
        return
    settings = {
        "features": features,
        "weights": None if weights is None else str(weights),
        "size": list(network.size),
        "subsets": subsets,
        "subset_size": subset_size,
        "neighbours": neighbours,
        "seed": seed,
    }
    content = {"metrics": asdict(scores), "images": counts, "settings": settings, "notes": notes}
    write_text(output / "metrics.json", json.dumps(content, indent=2) + "\n")
    say(f"{output / 'metrics.json'}: these numbers")


def require_images(counts: dict[str, int], least: int) -> None:
    """ValueError if a folder has fewer images than the scores need."""
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"the scores need {least} images or more, and there are {count} in the folder of {name}")


class Found(NamedTuple):
    """The features of a folder's images (N, D), and how many have each height and width."""

    rows: Tensor
    sizes: Counter[tuple[int, int]]


class Files(Sequence[Tensor]):
    """Image files, each read when it is asked for: uint8 (3, H, W)."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        return read_image(self.paths[index])


class Crops(Sequence[Tensor]):
    """Random crops of a folder's pictures, in turn, each a function of the seed and its number: (C, H, W), 0..1."""

    def __init__(self, folder: ImageFolder, number: int, seed: int):
        self.folder, self.number, self.seed = SeededSamples(folder), number, seed
        self.pictures = len(folder)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: Any) -> Any:
        image, _ = self.folder[index % self.pictures, sample_seed(self.seed, index)]
        return image.expand(3, -1, -1)


def training_crops(config: Path, number: int, seed: int) -> Crops:
    """Crops of the pictures that a run of `train --task generation` learned from, made as it made them.

    Raises:
        ValueError, ArgumentError: the file does not hold the options of such a run.
    """
    if not config.is_file():
        raise FileNotFoundError(f"there is no file {config}: give the config.yaml of a training run, or a folder")
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or settings.get("task") != "generation":
        raise ValueError(f"{config} is not the config.yaml of a run of `train --task generation`")
    train = find("train", "generation")
    options = parse(build_parser(train), train, ["--config", str(config), "--output", ""])
    model, data = options.model.init_args, ImageDataOptions(**vars(options.data))
    train_set, _ = replace(data, val_images=None).open(both_sides(model.image_size), model.unet.init_args.in_channels)
    return Crops(train_set, number, seed)


class Prepared(Dataset[tuple[Tensor, tuple[int, int]]]):
    """Images as a feature network takes them, each with its height and width before."""

    def __init__(self, images: Sequence[Tensor], transform: Callable[[Tensor], Tensor]):
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        image = self.images[index]
        height, width = image.shape[-2:]
        return self.transform(image), (height, width)


def extract(
    network: FeatureNetwork, pictures: Sequence[Tensor], name: str, batch_size: int, workers: int, device: torch.device
) -> Found:
    """The features of images, on the CPU. Shows the time left; BrokenImageError names a file without an image."""
    rows, sizes = [], Counter[tuple[int, int]]()
    images = DataLoader(
        Prepared(pictures, network.transform),
        batch_size,
        num_workers=min(workers, (len(pictures) - 1) // batch_size),
        collate_fn=list,
        worker_init_fn=ignore_interrupts,
    )
    with tqdm(total=len(pictures), desc=name, unit="image", leave=False, disable=None) as bar:
        for batch in images:
            rows.append(network(torch.stack([image for image, _ in batch]).to(device)).cpu())
            sizes.update(size for _, size in batch)
            bar.update(len(batch))
    return Found(torch.cat(rows), sizes)


def size_notes(found: dict[str, Found]) -> list[str]:
    """What to say where images differ in size before they are resized."""
    if len({size for part in found.values() for size in part.sizes}) == 1:
        return []
    listed = "; ".join(f"{name}: {_most_common(part.sizes)}" for name, part in found.items())
    return [f"the images are not all of one size, and how much each is resized may tell them apart ({listed})"]


def rank_notes(counts: dict[str, int], channels: int) -> list[str]:
    """What to say where there are too few images for a covariance of all features."""
    fewest = min(counts.values())
    if fewest > channels:
        return []
    return [
        f"{fewest} images cannot fill a covariance of {channels} features, so FID is far too high: compare it between"
        " equal numbers of images only, and prefer KID, which few images do not shift"
    ]


def table(scores: ImageScores, neighbours: int, subsets: str) -> str:
    """The scores as lines of text."""
    lines = [
        ("FID", f"{scores.fid:.4g}", "lower is better"),
        ("KID", f"{scores.kid:.4g} +- {scores.kid_std:.2g}", f"lower is better; {subsets}"),
        ("precision", f"{scores.precision:.3f}", f"samples within reach of real images ({neighbours} neighbours)"),
        ("recall", f"{scores.recall:.3f}", "real images within reach of samples"),
    ]
    width = max(len(value) for _, value, _ in lines)
    return "\n".join(f"{name:<9}  {value:<{width}}  {meaning}" for name, value, meaning in lines)


def _most_common(sizes: Counter[tuple[int, int]]) -> str:
    listed = ", ".join(f"{count} of {width} x {height}" for (height, width), count in sizes.most_common(3))
    return listed + (", ..." if len(sizes) > 3 else "")
