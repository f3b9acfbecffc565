"""The likelihood of images under a generator, how well it denoises them, and which are foreign to it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from diffperception.data.image_folder import resized_to_hold
from diffperception.data.images import load_images
from diffperception.data.listing import list_images
from diffperception.data.split import held_out
from diffperception.devices import Precision, autocast, hide_bar, pick_device
from diffperception.diffusion import SampleNoise, add_noise, denoise_at, log_density, name_seed
from diffperception.diffusion.objective import discretized_log_likelihood
from diffperception.echo import echo_remark
from diffperception.files import write_csv
from diffperception.generation.outliers import LEAST_REFERENCES, Measured, auroc, cross_foreignness
from diffperception.generation.sampling import said_alike
from diffperception.models import DiffusionModel
from diffperception.models.base import describe, fingerprint
from diffperception.models.conditioners import Said
from diffperception.resumable import Item, ResumableFolder, content_of
from diffperception.visualization.curves import histograms
from diffperception.visualization.draw import save_png, to_pil


@dataclass
class LikelihoodOptions:
    """How the likelihood of an image is measured.

    Args:
        steps: Heun steps of the probability-flow ODE; each takes two passes of the network and a backward pass.
        probes: random directions per image by which the divergence is estimated.
        draws: of the noise that every image gets first, see :func:`bits_per_dimension`; their mean counts.
        profile: times, spread over the path, at which the error of the denoiser is measured.
    """

    steps: PositiveInt = 10
    probes: PositiveInt = 1
    draws: PositiveInt = 1
    profile: PositiveInt = 10


@dataclass(frozen=True)
class LikelihoodReport:
    """What :func:`likelihood_folder` found: a row per image, and how well each score tells the images apart."""

    rows: list[dict[str, Any]]  # set, image, bits_per_dimension, webp_bits, scores and losses
    auroc: dict[str, float] = field(default_factory=dict)  # of each score; empty without a reference
    broken: list[str] = field(default_factory=list)

    def mean(self, kind: str, column: str = "bits_per_dimension") -> float:
        """Of the images or of the reference."""
        values = [row[column] for row in self.rows if row["set"] == kind]
        return sum(values) / len(values)


def bits_per_dimension(
    model: DiffusionModel,
    images: Tensor,
    noise: SampleNoise,
    options: LikelihoodOptions = LikelihoodOptions(),  # noqa: B008 (not changed)
    said: Said | None = None,
) -> Tensor:
    """Bits that coding an image of 8 bits would take under the model, per channel of a pixel: (B,) float64.

    An upper bound on -log2 p(image) / D, as of every variational autoencoder: the image is noised to the path's first
    time, y; its density is that of the probability-flow ODE, and it is decoded as in DDPM (arXiv 2006.11239, eq. 13;
    with the mean y / alpha). So bits = -E[log p(y) + log p(image | y) - log q(y | image)], without the constants that
    uniform dequantisation adds. In another space than the pixels it is the density of the noised signal alone, in bits
    per dimension of it, which may be below 0.

    Args:
        images: (B, C, H, W) in 0..1, of a size that the model takes; rounded to 8 bits.
        noise: draws noise, and then the directions, of each image.
        said: what the model is told of each image, as its conditioner reads it.

    Raises:
        ValueError: as :meth:`DiffusionModel.denoiser` and :meth:`DiffusionModel.signal_shape`.
    """
    model.signal_shape(*images.shape[-2:])
    times = model.schedule.even_grid(options.steps + 1)[:-1]
    denoiser = model.denoiser(said)
    signal = model.space.encode((255 * images).round() / 255)
    alpha, sigma = (float(value(times[-1])) for value in (model.schedule.alpha, model.schedule.sigma))
    found = []
    for _ in range(options.draws):
        drawn = noise(signal)
        noisy = alpha * signal + sigma * drawn
        probes = [noise(signal).sign() for _ in range(options.probes)]
        nats = log_density(denoiser, model.schedule, noisy, times, probes)
        if model.space.bounded:
            decoded = discretized_log_likelihood(signal, noisy / alpha, torch.tensor(math.log(sigma / alpha)))
            encoded = -(drawn.square() + math.log(2 * math.pi * sigma**2)) / 2
            nats = nats + (decoded - encoded).double().flatten(1).sum(1)
        found.append(-nats / math.log(2) / signal[0].numel())
    return torch.stack(found).mean(0)


def coded_bits(image: Tensor) -> float:
    """Bits per channel of a pixel that lossless WebP takes for an image (C, H, W) in 0..1."""
    code = BytesIO()
    to_pil(image.expand(3, -1, -1)).save(code, "WEBP", lossless=True, quality=100, method=6)
    return 8 * len(code.getvalue()) / image.numel()


@torch.no_grad()
def denoising_losses(
    model: DiffusionModel, images: Tensor, noise: SampleNoise, times: int = 10, said: Said | None = None
) -> Tensor:
    """Mean squared errors (B, times) of the noise that a model finds in images, at times in the middle of equal parts.

    The arguments are as for :func:`bits_per_dimension`.
    """
    path, denoiser = model.schedule, model.denoiser(said)
    signal = model.space.encode(images)
    losses = []
    for t in path.from_fraction((torch.arange(times) + 0.5) / times):
        drawn = noise(signal)
        noisy = add_noise(path, signal, t, drawn)
        error = (signal - denoise_at(denoiser, noisy, t).x0) * float(path.alpha(t) / path.sigma(t))
        losses.append(error.square().flatten(1).mean(1))
    return torch.stack(losses, 1)


def likelihood_folder(
    model: DiffusionModel | str | Path,
    images: str | Path,
    output: str | Path,
    reference: str | Path | None = None,
    options: LikelihoodOptions = LikelihoodOptions(),  # noqa: B008 (not changed)
    short_side: PositiveInt | None = None,
    said: str | None = None,
    batch_size: PositiveInt = 16,
    workers: NonNegativeInt = 2,
    seed: NonNegativeInt = 0,
    device: str = "auto",
    precision: Precision = "32",
    overwrite: bool = False,
) -> LikelihoodReport:
    """How likely images are under a generator, and, beside reference images of its own kind, which are foreign to it.

    Writes OUTPUT/likelihood.csv: of each image its bits per dimension, those of lossless WebP, and the mean squared
    error of the denoiser at some times. With a reference also scores of foreignness, their AUROC (how well they tell
    the images from the reference) in OUTPUT/auroc.csv, and OUTPUT/scores.png. The bits alone are a bad alarm: smooth
    images of any kind have few. Better ones are `complexity`, the bits less those of WebP, and `typicality`, how far
    they are from the reference's; `profile` is how unusual the errors at all times are together. The command can be
    interrupted: given again, it goes on with the images that are missing.

    Args:
        model: the file of a generator, model.safetensors, or the generator itself.
        images: an image, a folder (its subfolders count too), or a pattern in quotes such as 'photos/*.jpg'.
        reference: images of the kind that the generator has learned, but not those that it has learned from.
        options: how it is measured.
        short_side: images are first resized to this short side, as in the generator's training, and their middle is
            taken; null resizes them until they are as small as holds it.
        said: the class, or the text, that a generator with such is told of all images; null for nothing.
        batch_size: images that are measured at once.
        seed: seed of the noise; that of an image hangs on this and its name alone.

    Raises:
        FileNotFoundError, ValueError: no such file or image, a reference that is too small, or a generator that does
            not know what is said.
    """
    folder, place = ResumableFolder(output, overwrite), pick_device(device)
    model = DiffusionModel.loaded(model).to(place).eval().requires_grad_(False)
    model.denoiser(said_alike(model, said, 1))  # ValueError before any work
    model.schedule.even_grid(options.steps + 1)
    of_item: dict[Item, Path] = {}
    for kind, source in {"images": images, "reference": reference}.items():
        if source is not None:
            root, paths, remark = list_images(source, leave_out=Path(output))
            echo_remark(remark)
            of_item |= {Item(f"{kind}/{p.relative_to(root).as_posix()}", content_of(p)): p for p in paths}
    settings = {"command": "likelihood", "model": fingerprint(model), "options": describe(options), "seed": seed}
    settings |= {"short_side": short_side, "said": said, "precision": precision, "images": str(images)}
    settings |= {"reference": None if reference is None else str(reference)}
    left = folder.left_of(settings, list(of_item), batch_size=batch_size)
    folder.begin(["likelihood.csv", "auroc.csv", "scores.png"])
    bar = tqdm(total=len(left), desc="likelihood", unit="image", disable=hide_bar())
    samples = load_images([of_item[item] for item in left], batch_size, workers)
    batches = (left[start : start + batch_size] for start in range(0, len(left), batch_size))
    for items, batch in zip(batches, samples, strict=True):
        for item, sample in zip(items, batch, strict=True):
            if sample.image is None:
                folder.add(item, [], sample.problem)
        good = [(item, sample.image) for item, sample in zip(items, batch, strict=True) if sample.image is not None]
        with autocast(place, precision):
            measured = _measure(model, good, options, short_side, said, seed)
            for (item, _), row in zip(good, measured, strict=True):
                folder.add(item, [], row)
        bar.update(len(items))
    bar.close()
    found = dict(zip(of_item, folder.results(of_item), strict=True))
    report = _report({item.name: row for item, row in found.items()})
    _write(report, folder)
    return report


def _measure(
    model: DiffusionModel,
    images: Sequence[tuple[Item, Tensor]],
    options: LikelihoodOptions,
    short_side: int | None,
    said: str | None,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Of each image its bits and losses."""
    if not images:
        return
    fitted = [
        F.center_crop(resized_to_hold(image, model.image_size, short_side), list(model.image_size))
        for _, image in images
    ]
    batch = torch.stack(fitted).to(model.device)
    batch = F.rgb_to_grayscale(batch) if model.space.image_channels == 1 else batch
    told = said_alike(model, said, len(batch))
    noise = SampleNoise([name_seed(seed, item.name) for item, _ in images])
    losses = denoising_losses(model, batch, noise, options.profile, told).tolist()
    bits = bits_per_dimension(model, batch, noise, options, told).tolist()
    coded = [coded_bits(image) for image in batch]
    yield from ({"bits": b, "coded": c, "losses": row} for b, c, row in zip(bits, coded, losses, strict=True))


def _report(found: dict[str, Any]) -> LikelihoodReport:
    """From what was found of each `images/NAME` and `reference/NAME`, a dictionary or what is wrong with it."""
    sound = {
        kind: {
            n.partition("/")[2]: row for n, row in found.items() if n.startswith(f"{kind}/") and isinstance(row, dict)
        }
        for kind in ("images", "reference")
    }
    broken = [row for row in found.values() if isinstance(row, str)]
    if not sound["images"]:
        raise ValueError(f"no image can be read: {broken[0]}")
    measured = {
        kind: Measured(*(torch.tensor([r[what] for r in rows.values()]) for what in ("bits", "coded", "losses")))
        for kind, rows in sound.items()
    }
    scores: dict[str, dict[str, Tensor]] = {kind: {} for kind in sound}
    aurocs = {}
    if any(name.startswith("reference/") for name in found):
        names = list(sound["reference"])
        if len(names) < 2 * LEAST_REFERENCES:
            raise ValueError(f"the reference has {len(names)} images: {2 * LEAST_REFERENCES} are needed at least")
        first_half = torch.tensor(held_out(names, 0.5, seed=0))
        scores["images"], scores["reference"] = cross_foreignness(measured["images"], measured["reference"], first_half)
        aurocs = {name: auroc(scores["images"][name], scores["reference"][name]) for name in scores["images"]}
    rows = []
    for kind, images in sound.items():
        for index, (name, row) in enumerate(images.items()):
            of_image = {n: values[index].item() for n, values in scores[kind].items() if n != "likelihood"}
            losses = {f"loss_{k}": loss for k, loss in enumerate(row["losses"])}
            bits = {"bits_per_dimension": row["bits"], "webp_bits": row["coded"]}
            rows.append({"set": kind, "image": name, **bits, **of_image, **losses})
    return LikelihoodReport(rows, aurocs, broken)


def _write(report: LikelihoodReport, folder: ResumableFolder) -> None:
    head = list(report.rows[0])
    lines = [[value if isinstance(value, str) else f"{value:.6g}" for value in row.values()] for row in report.rows]
    write_csv(folder.file("likelihood.csv"), head, lines)
    if report.auroc:
        write_csv(folder.file("auroc.csv"), ["score", "auroc"], [[n, f"{a:.4f}"] for n, a in report.auroc.items()])
        columns = {n: "bits_per_dimension" if n == "likelihood" else n for n in report.auroc}
        values = {
            f"{name}: AUROC {report.auroc[name]:.3f}": {
                kind: [row[column] for row in report.rows if row["set"] == kind] for kind in ("reference", "images")
            }
            for name, column in columns.items()
        }
        save_png(histograms(values), folder.file("scores.png"))
