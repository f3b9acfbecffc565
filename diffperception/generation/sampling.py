"""Drawing images from a generator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffperception.diffusion import Denoiser, NoiseFn, SampleNoise, Schedule, clip, sample_seed, threshold
from diffperception.diffusion.samplers import (
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    sample_predictor_corrector,
)
from diffperception.models import DiffusionModel
from diffperception.models.conditioners import Said

Sampler = Literal["dpm_solver", "ddim", "ddpm", "heun", "predictor_corrector"]
SNR = 0.16  # of the corrector, as in the paper for pictures of 32 pixels


class SamplerKind(NamedTuple):
    """A sampler and the grid that it wants."""

    loop: "Callable[[Denoiser, Schedule, Tensor, Tensor, SamplingOptions, NoiseFn], Tensor]"  # last: noise of a step
    even: bool = False  # its steps are even in the logarithm of the noise level, as those of second order want
    discrete: bool = False  # it needs a path of discrete steps


SAMPLERS: dict[Sampler, SamplerKind] = {
    "dpm_solver": SamplerKind(lambda d, path, x, grid, o, noise: sample_dpm_solver(d, path, x, grid), even=True),
    "ddim": SamplerKind(lambda d, path, x, grid, o, noise: sample_ddim(d, path, x, grid, o.eta, noise)),
    "ddpm": SamplerKind(lambda d, path, x, grid, o, noise: sample_ddpm(d, path, x, grid, noise), discrete=True),
    "heun": SamplerKind(lambda d, path, x, grid, o, noise: sample_heun(d, path, x, grid), even=True),
    "predictor_corrector": SamplerKind(
        lambda d, path, x, grid, o, noise: sample_predictor_corrector(d, path, x, grid, o.snr or SNR, noise)
    ),
}


@dataclass
class SamplingOptions:
    """How noise becomes an image.

    Args:
        sampler: dpm_solver (DPM-Solver++(2M)), ddim, ddpm (ancestral), heun or predictor_corrector (score SDEs).
        steps: steps from noise to image, each a pass of the network (two with heun and predictor_corrector).
        eta: ddim's fraction of fresh noise in every step, 0 to 1.
        guidance: weight of classifier-free guidance, for models trained with null_class or captions that were dropped;
            1 is none.
        guidance_rescale: how far guided predictions are brought back to the spread of those that are not, 0 to 1, such
            as 0.7, so that strong guidance makes images neither too bright nor too plain (arXiv 2305.08891).
        clip: keep every predicted image within the range of pixels on the way.
        threshold: instead, divide every predicted image by this quantile of its absolute values where that is beyond
            the range of pixels, such as 0.995 (dynamic thresholding, arXiv 2205.11487); null for none.
        noise: where random numbers are drawn: cpu gives the same images on every machine; device draws on the GPU,
            which saves copies and gives other images.
        snr: how large the step of predictor_corrector's corrector is beside its noise; null for 0.16.
    """

    sampler: Sampler = "dpm_solver"
    steps: int = 20
    eta: float = 0.0
    guidance: float = 1.0
    guidance_rescale: float = 0.0
    clip: bool = True
    threshold: float | None = None
    noise: Literal["cpu", "device"] = "cpu"
    snr: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is a fraction, 0 to 1, not {self.eta:g}")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta belongs to the sampler ddim, not to {self.sampler}: leave it out")
        if self.snr is not None and self.sampler != "predictor_corrector":
            raise ValueError(f"snr belongs to the sampler predictor_corrector, not to {self.sampler}: leave it out")
        if self.snr is not None and not self.snr > 0:
            raise ValueError(f"snr is above 0, such as {SNR}, not {self.snr:g}")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale is a fraction, 0 to 1, not {self.guidance_rescale:g}")
        if self.guidance_rescale and self.guidance == 1:
            raise ValueError("guidance_rescale belongs to guidance, which is 1, none: give guidance, such as 3")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is a quantile, above 0 and up to 1, such as 0.995, not {self.threshold:g}")

    def draws(self, seeds: Sequence[int], device: torch.device) -> SampleNoise:
        """The noise of samples with these seeds, drawn where `noise` says; the device is the model's."""
        return SampleNoise(seeds, device if self.noise == "device" else "cpu")

    def limit(self, denoiser: Denoiser, bounded: bool) -> Denoiser:
        """The denoiser with its signals kept in range, where they have one; ValueError to threshold others."""
        if self.threshold is not None and not bounded:
            raise ValueError("threshold needs a generator of pixels, and this one's space has no range: leave it out")
        if self.threshold is not None:
            return threshold(denoiser, self.threshold)
        return clip(denoiser) if self.clip and bounded else denoiser


def sampling_grid(schedule: Schedule, sampler: Sampler, steps: int) -> Tensor:
    """Times for a sampler, descending to the clean end.

    ValueError for fewer steps than one or more than the schedule has, or for ddpm on a path without discrete steps.
    """
    kind = SAMPLERS[sampler]
    if kind.discrete:
        schedule.require_discrete(f"The sampler {sampler}")
    return schedule.even_grid(steps) if kind.even else schedule.grid(steps)


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
    """Images (B, C, height, width), 0..1, each a function of the seed and its own index, up to rounding.

    Args:
        indices: B numbers of images; the same number gives the same image in whatever batch.
        said: of each image, as the model's conditioner reads it: labels (B,) of the classes wanted, for example.
        image_size: height and width; those the model learned by default.
        denoiser: to use instead of the model's own, such as one that a classifier guides.

    Raises:
        ValueError: for a size or labels that the model does not take, or as :func:`sampling_grid`.
    """
    denoiser = denoiser or model.denoiser(said, options.guidance, rescale=options.guidance_rescale)
    denoiser = options.limit(denoiser, model.space.bounded)
    grid = sampling_grid(model.schedule, options.sampler, options.steps)
    noise = options.draws([sample_seed(seed, index) for index in indices], model.device)
    shape = model.signal_shape(*(image_size or model.image_size))
    x = noise(torch.empty((len(indices), *shape), device=model.device))
    signal = SAMPLERS[options.sampler].loop(denoiser, model.schedule, x, grid, options, noise)
    return model.space.decode(signal)


def said_alike(model: DiffusionModel, said: str | None, count: int) -> Said | None:
    """The same class or text said of as many images, as the model reads it; ValueError if it does not know it."""
    if said is None:
        return None
    if model.conditioner is None:
        raise ValueError("this generator was trained without classes or words: leave said out")
    return model.conditioner.choose([said], range(count))
