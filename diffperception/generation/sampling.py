"""Drawing images from a generator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffperception.diffusion import (
    Denoiser,
    SampleNoise,
    Schedule,
    clip,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    sample_seed,
)
from diffperception.models import DiffusionModel
from diffperception.models.conditioners import Said

Sampler = Literal["dpm_solver", "ddim", "ddpm", "heun"]
FIRST_ORDER: tuple[Sampler, ...] = ("ddim", "ddpm")


@dataclass
class SamplingOptions:
    """How noise becomes an image.

    Args:
        sampler: dpm_solver (DPM-Solver++(2M)), ddim, ddpm (ancestral) or heun (two network passes a step).
        steps: from noise to image.
        eta: ddim's share of fresh noise in every step, 0 to 1.
        guidance: weight of classifier-free guidance, for models trained with an absent label; 1 is none.
        clip: keep every predicted image within the range of pixels on the way.
    """

    sampler: Sampler = "dpm_solver"
    steps: int = 20
    eta: float = 0.0
    guidance: float = 1.0
    clip: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is a share, 0 to 1, not {self.eta:g}")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta belongs to the sampler ddim, not to {self.sampler}: leave it out")


def sampling_grid(schedule: Schedule, sampler: Sampler, steps: int) -> Tensor:
    """Times for a sampler, descending to the clean end.

    Raises:
        ValueError: for fewer steps than one, or more than the schedule has, or ancestral sampling on a path without
            discrete steps.
    """
    if sampler == "ddpm":
        schedule.require_discrete("The sampler ddpm")
    return schedule.grid(steps) if sampler in FIRST_ORDER else schedule.even_grid(steps)


@torch.no_grad()
def sample(
    model: DiffusionModel,
    indices: Sequence[int],
    options: SamplingOptions,
    seed: int = 0,
    said: Said | None = None,
    image_size: tuple[int, int] | None = None,
    denoiser: Denoiser | None = None,
) -> Tensor:
    """Images, each a function of the seed and its own index (up to rounding, which may depend on the batch).

    Args:
        indices: B numbers of images; the same number gives the same image in whatever batch.
        options: how.
        seed: of all images.
        said: of each image, as the model's conditioner reads it: labels (B,) of the classes wanted, for example.
        image_size: height and width; those the model learned by default.
        denoiser: to use instead of the model's own, such as one that a classifier guides.

    Returns:
        (B, C, height, width), 0..1.

    Raises:
        ValueError: for a size or labels that the model does not take, or ancestral sampling on a straight path.
    """
    schedule = model.schedule
    denoiser = denoiser or model.denoiser(said, options.guidance)
    denoiser = clip(denoiser) if options.clip and model.space.bounded else denoiser
    grid = sampling_grid(schedule, options.sampler, options.steps)
    noise = SampleNoise([sample_seed(seed, index) for index in indices])
    shape = model.signal_shape(*(image_size or model.image_size))
    x = noise(torch.empty((len(indices), *shape), device=model.device))
    if options.sampler == "dpm_solver":
        x = sample_dpm_solver(denoiser, schedule, x, grid)
    elif options.sampler == "heun":
        x = sample_heun(denoiser, schedule, x, grid)
    elif options.sampler == "ddim":
        x = sample_ddim(denoiser, schedule, x, grid, options.eta, noise)
    else:
        x = sample_ddpm(denoiser, schedule, x, grid, noise)
    return model.space.decode(x)
