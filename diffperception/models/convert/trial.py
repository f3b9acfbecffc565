"""Conventions that a generator's checkpoint does not tell, tried on pictures: under the true ones it denoises best."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffperception.diffusion.prediction import to_eps
from diffperception.models.generator import DiffusionModel

Options = Mapping[str, Any]  # arguments of DiffusionModel.from_reference

NOISE_LEVELS = (0.2, 0.5, 1.0, 2.0, 5.0)  # sigma / alpha at which pictures are denoised
FEWEST_VALUES = 2**13  # of noise at each level, so that its chance does not decide
CLEARLY, SLIGHTLY = 1.25, 1.05  # one convention fits better than another if its error is so many times smaller
HOPELESS = 0.9  # share of a guess's error that tells of a network which does not know such pictures
_HEADS = ("num_heads", "num_head_channels")


@dataclass(frozen=True)
class Fit:
    """Conventions, as arguments of :meth:`DiffusionModel.from_reference`, and the error of denoising under them.

    The error is the squared one of the noise that the network tells of pictures, as a share of that of a guess which
    knows their mean and spread alone (Wiener's); the geometric mean over NOISE_LEVELS.
    """

    options: Options
    error: float


def try_conventions(state: Mapping[str, Tensor], images: Tensor, options: Options) -> tuple[Fit | None, Fit]:
    """How well the conventions given fit a checkpoint, None where they leave some open; and those that fit best.

    Paths (linear, cosine; of the steps given, 1000 or 4000), how times are told, predictions, heads and their order are
    varied in turn, not all in all combinations.

    Args:
        state: the checkpoint's weights, as for :meth:`DiffusionModel.from_reference`.
        images: (B, 3, H, W), 0..1, of the size that the model has learned.
        options: what is said of it: image_size, schedule, ...; rescale_timesteps and heads may be None.

    Raises:
        ValueError: as :meth:`DiffusionModel.from_reference` under the options given.
    """
    is_told = _tells_times(options) and any(options.get(name) is not None for name in _HEADS)
    given = min(_fits(state, images, options, [options]), key=_error) if is_told else None
    best = given or min(_fits(state, images, options, _heads(state, _with_times(options))), key=_error)
    for vary in (_paths, lambda known: _heads(state, known), _paths):
        tried = [best, *_fits(state, images, best.options, vary(best.options))]
        best = min(tried, key=_error)
    return given, best


def changed_options(given: Options, better: Options) -> str:
    """The options of the better conventions that differ from those given, as a command line has them."""
    given = _with_times(given) if _tells_times(given) else given
    changed = {n: value for n, value in better.items() if value != given.get(n) and value is not None}
    words = [f"--{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in changed.items()]
    return " ".join(words)


def _error(fit: Fit) -> float:
    return fit.error


def _tells_times(options: Options) -> bool:
    return options["num_timesteps"] == 1000 or options.get("rescale_timesteps") is not None


def _with_times(options: Options) -> Options:
    return {**options, "rescale_timesteps": bool(options.get("rescale_timesteps"))}


def _paths(options: Options) -> Iterator[Options]:
    """Other paths; 4000 steps told as 0 to 1000 are what 1000 steps are, up to rounding."""
    steps = options["num_timesteps"]
    told = {(1000, False), (4000, False)} if steps == 1000 else {(steps, False), (steps, True)}
    for schedule, (number, rescaled) in itertools.product(("linear", "cosine"), sorted(told)):
        yield {**options, "schedule": schedule, "num_timesteps": number, "rescale_timesteps": rescaled}


def _heads(state: Mapping[str, Tensor], options: Options) -> Iterator[Options]:
    """Other numbers of attention heads, and orders of their weights; none twice."""
    widths = sorted({value.shape[0] // 3 for name, value in state.items() if name.endswith(".qkv.weight")})
    seen = set()
    for name, number in itertools.chain(
        (("num_heads", n) for n in (1, 2, 4, 8)), (("num_head_channels", n) for n in (64, 32, 128))
    ):
        heads = [number if name == "num_heads" else width // number for width in widths]
        if any(width % max(count, 1) or not count for width, count in zip(widths, heads, strict=True)):
            continue
        for new_order in (False, True) if max(heads, default=1) > 1 else (False,):
            if (key := (*heads, new_order)) not in seen:
                seen.add(key)
                chosen = {**dict.fromkeys(_HEADS), name: number, "new_attention_order": new_order}
                yield {**options, **chosen}


def _fits(state: Mapping[str, Tensor], images: Tensor, given: Options, tried: Any) -> Iterator[Fit]:
    """The fits of the conventions tried, each with every prediction; only with its own where they are those given."""
    for options in tried:
        model = DiffusionModel.from_reference(state, **options).to(images.device)
        of_flow = options["schedule"] == "flow"
        predictions = [options["prediction"]] if tried == [given] or of_flow else ["eps", "x0", "v"]
        for prediction, error in zip(predictions, denoising_errors(model, images, predictions), strict=True):
            yield Fit({**options, "prediction": prediction}, error)


@torch.no_grad()
def denoising_errors(model: DiffusionModel, images: Tensor, predictions: list[Any]) -> list[float]:
    """For each prediction that the network may give the error, see `Fit`, on images (B, 3, H, W), 0..1."""
    grey = images.mean(1, keepdim=True) if model.space.channels == 1 else images
    x0 = model.space.encode(grey.repeat(-(-FEWEST_VALUES // grey.numel()), 1, 1, 1)).to(model.dtype)
    generator = torch.Generator().manual_seed(0)
    condition = None if model.classes is None else model.condition(torch.zeros(1, dtype=torch.long))
    told = None if condition is None else condition.expand(len(x0))
    spread = x0.double().var().clamp(min=1e-4)
    logs = torch.zeros(len(predictions), dtype=torch.float64)
    times = model.schedule.from_fraction(torch.linspace(0, 1, 1000)[:-1])
    levels = (model.schedule.sigma(times) / model.schedule.alpha(times)).log()
    for level in NOISE_LEVELS:
        t = times[(levels - math.log(level)).abs().argmin()].to(x0.device)
        alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        x_t = (alpha * x0 + sigma * eps).to(x0.dtype)
        output = model(x_t, model.schedule.conditioning(t).expand(len(x0)), told)[:, : model.space.channels]
        found = [F.mse_loss(to_eps(kind, output, x_t, alpha, sigma).to(eps), eps).double() for kind in predictions]
        of_guess = alpha**2 * spread / (alpha**2 * spread + sigma**2)
        logs += (torch.stack(found) / of_guess).cpu().clamp(min=1e-12).log()
    return (logs / len(NOISE_LEVELS)).exp().tolist()
