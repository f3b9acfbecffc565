"""How close generated images are to real ones, from their features: FID, KID, precision and recall.

All functions of features take two matrices, one row per image, (N, D) and (M, D), and compute in float64. They raise
ValueError where the matrices do not go together or hold too few rows.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from tqdm import tqdm

from diffperception.data.images import LazyMap, read_ahead, read_image
from diffperception.data.listing import list_images
from diffperception.devices import Precision, autocast, hide_bar, pick_device
from diffperception.generation.feature_networks import FeatureNetwork, feature_network
from diffperception.models.convert.checkpoints import state_of
from diffperception.table import format_table

DISTANCE_ROWS = 512  # rows of a matrix of distances that are held at once
SUBSET_SIZE = 1000  # as KID is usually measured


@dataclass(frozen=True)
class ImageScores:
    """Lower is better for the distances FID and KID, higher (up to 1) for precision and recall."""

    fid: float
    kid: float
    kid_std: float
    precision: float
    recall: float


@dataclass(frozen=True)
class SampleReport:
    """What `evaluate_samples` found; only figures of equal settings and numbers of images can be compared."""

    metrics: ImageScores
    images: dict[str, int]  # how many samples, and how many real images, there were
    settings: dict[str, Any]  # what figures depend on
    notes: list[str]  # what makes these doubtful

    def table(self) -> str:
        """The scores as lines of text."""
        scores, settings = self.metrics, self.settings
        subsets = f"mean and deviation over {settings['subsets']} subsets of {settings['subset_size']}"
        within = f"samples within reach of real images ({settings['neighbours']} neighbours)"
        rows = [
            ("FID", f"{scores.fid:.4g}", "lower is better"),
            ("KID", f"{scores.kid:.4g} +- {scores.kid_std:.2g}", f"lower is better; {subsets}"),
            ("precision", f"{scores.precision:.3f}", within),
            ("recall", f"{scores.recall:.3f}", "real images within reach of samples"),
        ]
        return format_table(rows, ["score", "value", "meaning"])


@dataclass(frozen=True)
class ScoringOptions:
    """How generated images are scored.

    Args:
        features: the feature network: a timm model; random: and a timm model for untrained weights, such as
            random:resnet18, a weak measure that needs no network; or the model.safetensors file of a detector, for its
            backbone.
        weights: file with the timm model's weights, .pth or .safetensors, instead of fetching them.
        size: pixels in height and width that images are resized to; by default what the timm model was trained with,
            224 for a detector.
        subsets: how often KID is measured, each time on other images.
        subset_size: images of either kind in one such measurement; by default 1000, or half of the smaller folder if
            that is less.
        neighbours: precision and recall take an image's distance to so many nearest ones as its reach.
        batch_size: images in one pass.
        seed: the seed of the subsets, and of the crops of a training's images.
    """

    features: str = "inception_v3.tf_in1k"
    weights: str | Path | None = None
    size: PositiveInt | None = None
    subsets: PositiveInt = 100
    subset_size: PositiveInt | None = None
    neighbours: PositiveInt = 3
    batch_size: PositiveInt = 32
    workers: NonNegativeInt = 2
    device: str = "auto"
    precision: Precision = "32"
    seed: NonNegativeInt = 0


def evaluate_samples(
    samples: str | Path, reference: str | Path | Sequence[Tensor], options: ScoringOptions = ScoringOptions()
) -> SampleReport:
    """Score generated images against real ones; nothing is written.

    Args:
        samples: folder with the generated images; its subfolders count.
        reference: folder with real images; or such images (3, H, W), uint8 or 0..1.

    Raises:
        FileNotFoundError: there is no such folder, file, or no image in it.
        ValueError: there are too few images, one is broken, or there is no such feature network.
    """
    if options.subset_size == 1:
        raise ValueError("option subset_size: KID compares 2 images of either kind at least, not 1")
    images: dict[str, Sequence[Tensor]] = {}
    remarks = []
    for name, each in (("samples", samples), ("reference", reference)):
        if isinstance(each, str | Path):
            _, paths, remark = list_images(each)
            remarks += [remark] if remark else []
            images[name] = LazyMap(read_image, paths)
        else:
            images[name] = each
    counts = {name: len(each) for name, each in images.items()}
    least = max(options.neighbours + 1, options.subset_size or 2)
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"the scores need {least} images or more, and there are {count} in the folder of {name}")
    place = pick_device(options.device)
    weights = None if options.weights is None else state_of(options.weights)
    network = feature_network(options.features, weights, options.size).to(place)
    with autocast(place, options.precision):
        found = {name: read_features(network, each, name, options, place) for name, each in images.items()}
    real, fake = found["reference"].rows, found["samples"].rows
    subset_size = options.subset_size or max(2, min(SUBSET_SIZE, min(counts.values()) // 2))
    generator = torch.Generator().manual_seed(options.seed)
    kid = kernel_distance(real, fake, options.subsets, subset_size, generator)
    within = precision_recall(real, fake, options.neighbours)
    settings = {
        **{name: getattr(options, name) for name in ("features", "subsets", "neighbours", "seed")},
        "subset_size": subset_size,
        "weights": None if weights is None else str(options.weights),
        "size": list(network.size),
        "channels": network.channels,
    }
    scores = ImageScores(frechet_distance(real, fake), *kid, *within)
    return SampleReport(scores, counts, settings, remarks + _doubts(found, network.channels))


class ImageFeatures(NamedTuple):
    """The features of images (N, D), and how many have each height and width."""

    rows: Tensor
    sizes: Counter[tuple[int, int]]


def read_features(
    network: FeatureNetwork, images: Sequence[Tensor], name: str, options: ScoringOptions, place: torch.device
) -> ImageFeatures:
    """The features of images, on the CPU. Shows the time left; BrokenImageError names a file without an image."""
    rows, sizes = [], Counter[tuple[int, int]]()
    prepared = LazyMap(partial(_prepare, network.transform), images)
    with tqdm(total=len(images), desc=name, unit="image", leave=False, disable=hide_bar()) as bar:
        for batch in read_ahead(prepared, options.batch_size, options.workers):
            rows.append(network(torch.stack([image for image, _ in batch]).to(place)).float().cpu())
            sizes.update(size for _, size in batch)
            bar.update(len(batch))
    return ImageFeatures(torch.cat(rows), sizes)


def _prepare(transform: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """An image as a feature network takes it, and the height and width that it had."""
    height, width = image.shape[-2:]
    return transform(image), (height, width)


def _doubts(found: dict[str, ImageFeatures], channels: int) -> list[str]:
    """What to say where images differ in size, or are too few for a covariance of all features."""
    notes = []
    if len({size for part in found.values() for size in part.sizes}) > 1:
        listed = "; ".join(f"{name}: {_most_common(part.sizes)}" for name, part in found.items())
        notes.append(f"the images are not all of one size, and how much each is resized may tell them apart ({listed})")
    fewest = min(len(part.rows) for part in found.values())
    if fewest <= channels:
        notes.append(
            f"{fewest} images cannot fill a covariance of {channels} features, so FID is far too high: compare it"
            " between equal numbers of images only, and prefer KID, which few images do not shift"
        )
    return notes


def _most_common(sizes: Counter[tuple[int, int]]) -> str:
    listed = ", ".join(f"{count} of {width} x {height}" for (height, width), count in sizes.most_common(3))
    return listed + (", ..." if len(sizes) > 3 else "")


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """The Frechet distance between the Gaussians of the two sets' means and covariances (FID, arXiv 1706.08500).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)). With A = R^T R and B = S^T S, the eigenvalues of A B are the squares of
    the singular values of R S^T, so that neither a product of covariances nor its root is ever formed: covariances
    without full rank, as of fewer images than features, lose no digits.

    It is biased upwards, the more so the fewer images there are: compare figures of equal numbers of images only.
    """
    real, fake = _pair(real, fake, least=2)
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    r, s = _covariance_factor(real), _covariance_factor(fake)
    distance = shift + r.square().sum() + s.square().sum() - 2 * torch.linalg.svdvals(r @ s.T).sum()
    return distance.clamp(min=0).item()


def kernel_distance(
    real: Tensor,
    fake: Tensor,
    subsets: int = 100,
    subset_size: int = SUBSET_SIZE,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """The squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (KID, arXiv 1801.01401).

    Unbiased: its mean is zero for equal distributions, however few the images are, and it may fall below.

    Returns: mean and standard deviation over the subsets, each of `subset_size` rows of either set, drawn without
        replacement by the generator on the CPU.
    """
    real, fake = _pair(real, fake, least=max(2, subset_size))
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"KID needs 1 subset of 2 rows at least: subsets is {subsets}, subset_size {subset_size}")

    def draw(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:subset_size].to(rows.device)]

    values = torch.stack([_squared_discrepancy(draw(real), draw(fake)) for _ in range(subsets)])
    return values.mean().item(), values.std(correction=0).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Which fraction of `fake` lies among `real`, and which fraction of `real` among `fake` (arXiv 1904.06991).

    A row lies among the others if it is, for any one of them, no farther away than that one's k-th nearest neighbour in
    its own set. Precision tells how real the samples are, recall how much of the real variety they have.
    """
    real, fake = _pair(real, fake, least=k + 1)
    centre = real.mean(0)  # distances are taken from products, which lose digits far from the origin
    real, fake = real - centre, fake - centre
    return _fraction_within(fake, real, k), _fraction_within(real, fake, k)


def _pair(real: Tensor, fake: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features are (N, D) and (M, D) of one D, not {tuple(real.shape)} and {tuple(fake.shape)}")
    if min(len(real), len(fake)) < least:
        raise ValueError(f"this needs {least} images of either kind, not {len(real)} real ones and {len(fake)} samples")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("some features are not finite: take another feature network")
    return real.double(), fake.double()


def _covariance_factor(rows: Tensor) -> Tensor:
    """R (min(N, D), D) with R^T R the unbiased covariance of the rows (N, D)."""
    centred = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R


def _squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of the squared discrepancy of two sets of m rows."""
    pairs = len(x) * (len(x) - 1)
    k_x, k_y = _kernel(x, x), _kernel(y, y)
    return (k_x.sum() - k_x.trace() + k_y.sum() - k_y.trace()) / pairs - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _fraction_within(points: Tensor, support: Tensor, k: int) -> float:
    """The fraction of `points` inside the balls around `support` that reach to the k-th nearest other of `support`."""
    # The nearest is the point itself.
    radii = torch.cat([torch.cdist(rows, support).kthvalue(k + 1).values for rows in support.split(DISTANCE_ROWS)])
    inside = torch.cat([(torch.cdist(rows, support) <= radii).any(1) for rows in points.split(DISTANCE_ROWS)])
    return inside.double().mean().item()
