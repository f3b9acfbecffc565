"""Drawing images from a generator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffperception.diffusion import (
    Denoiser,
    DiscreteSchedule,
    SampleNoise,
    Schedule,
    clip,
    nearest_times,
    noise_level_grid,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    sample_seed,
    timestep_grid,
)
from diffperception.generation.model import DiffusionModel

Sampler = Literal["dpm_solver", "ddim", "ddpm", "heun"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)


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


def time_grid(schedule: Schedule, sampler: Sampler, steps: int) -> Tensor:
    """Times for a sampler, descending to the clean end.

    On discrete schedules the second-order samplers take steps that are even in noise level, the others in time.

    Raises:
        ValueError: for fewer steps than one, or more than the schedule has.
    """
    if not isinstance(schedule, DiscreteSchedule):
        if steps < 1:
            raise ValueError(f"Sampling takes at least 1 step, not {steps}.")
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grid = timestep_grid(schedule.num_timesteps, steps, "trailing")
    if sampler in ("ddim", "ddpm"):
        return grid
    first, last = torch.tensor(0), torch.tensor(schedule.num_timesteps - 1)
    lowest, highest = (float(schedule.sigma(t) / schedule.alpha(t)) for t in (first, last))
    return nearest_times(schedule, noise_level_grid(steps, lowest, highest))


@torch.no_grad()
def sample(
    model: DiffusionModel,
    indices: Sequence[int],
    options: SamplingOptions,
    seed: int = 0,
    labels: Tensor | None = None,
    image_size: tuple[int, int] | None = None,
    denoiser: Denoiser | None = None,
) -> Tensor:
    """Images, each a function of the seed and its own index.

    Args:
        indices: B numbers of images; the same number gives the same image in whatever batch.
        options: how.
        seed: of all images.
        labels: (B,) int64 classes wanted.
        image_size: height and width; those the model learned by default.
        denoiser: to use instead of the model's own, such as one that a classifier guides.

    Returns:
        (B, C, height, width), 0..1.

    Raises:
        ValueError: for a size or labels that the model does not take, or ancestral sampling on a straight path.
    """
    schedule = model.schedule
    denoiser = denoiser or model.denoiser(labels, options.guidance)
    denoiser = clip(denoiser) if options.clip else denoiser
    grid = time_grid(schedule, options.sampler, options.steps)
    noise = SampleNoise([sample_seed(seed, index) for index in indices])
    shape = (len(indices), model.unet.in_channels, *(image_size or model.image_size))
    x = noise(torch.empty(shape, device=model.device))
    if options.sampler == "dpm_solver":
        x = sample_dpm_solver(denoiser, schedule, x, grid)
    elif options.sampler == "heun":
        x = sample_heun(denoiser, schedule, x, grid)
    elif options.sampler == "ddim":
        x = sample_ddim(denoiser, schedule, x, grid, options.eta, noise)
    elif isinstance(schedule, DiscreteSchedule):
        x = sample_ddpm(denoiser, schedule, x, grid, noise)
    else:
        raise ValueError(
            "The sampler ddpm needs a schedule of discrete steps: take ddim with eta 1 on a straight path."
        )
    return (x.clamp(-1, 1) + 1) / 2
