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
# The cosine schedule ends at noise 20,000 times as strong as the signal: most of that way nothing can be told apart.
NOISIEST = 160.0


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


def time_grid(schedule: Schedule, sampler: Sampler, steps: int) -> Tensor:
    """Times for a sampler, descending to the clean end.

    On discrete schedules the second-order samplers take steps that are even in the logarithm of the noise level
    (arXiv 2206.00927, section 3.3), the others in time.

    Raises:
        ValueError: for fewer steps than one, or more than the schedule has, or ancestral sampling on a straight path.
    """
    if not isinstance(schedule, DiscreteSchedule):
        if sampler == "ddpm":
            raise ValueError(
                "The sampler ddpm needs a schedule of discrete steps: take ddim with eta 1 on a straight path."
            )
        if steps < 1:
            raise ValueError(f"Sampling takes at least 1 step, not {steps}.")
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grid = timestep_grid(schedule.num_timesteps, steps, "trailing")
    if sampler in ("ddim", "ddpm"):
        return grid
    noisiest, cleanest = (schedule.sigma(t) / schedule.alpha(t) for t in (grid[0], torch.tensor(0)))
    highest = noisiest.clamp(max=NOISIEST)
    levels = torch.logspace(float(highest.log10()), float(cleanest.log10()), steps, dtype=torch.float64)
    times = nearest_times(schedule, torch.cat([levels, levels.new_zeros(1)]))
    return torch.cat([grid[:1], times[1:]])


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
    else:
        assert isinstance(schedule, DiscreteSchedule)  # or there would be no grid
        x = sample_ddpm(denoiser, schedule, x, grid, noise)
    return (x.clamp(-1, 1) + 1) / 2
