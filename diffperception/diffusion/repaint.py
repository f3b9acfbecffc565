"""Inpainting: what is known of a signal is noised along while the rest is denoised (RePaint, arXiv 2201.09865)."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from diffperception.diffusion.denoiser import Denoiser, denoise_at
from diffperception.diffusion.noise import NoiseFn
from diffperception.diffusion.schedule import Schedule
from diffperception.diffusion.steps import add_noise, ddim_step, noise_further


@torch.no_grad()
def sample_repaint(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    grid: Tensor,
    signal: Tensor,
    known: Tensor,
    jump: int = 10,
    resamples: int = 10,
    eta: float = 1.0,
    draw: NoiseFn = torch.randn_like,
) -> Tensor:
    """Signals that are those given where they are known (algorithm 1, with jumps).

    The arguments are as for the other samplers; ``eta = 1`` are DDPM's steps, as in the paper.

    Args:
        signal: (B, ...) what is known.
        known: bool, of a shape that broadcasts to the signal's.
        jump: so many steps are taken back to noise, again and again, that both parts may agree.
        resamples: how often each piece of as many steps is done in all; 1 is once.
    """
    for before, after in pairwise(resampled(len(grid) - 1, jump, resamples)):
        t, s = grid[-1 - before], grid[-1 - after]
        if after > before:
            x = noise_further(schedule, x, t, s, draw(x))
            continue
        unknown = ddim_step(schedule, x, denoise_at(denoiser, x, t).x0, t, s, eta, draw(x) if eta > 0 else None)
        x = torch.where(known, add_noise(schedule, signal, s, draw(x)), unknown)
    return x


def resampled(steps: int, jump: int, resamples: int) -> Iterator[int]:
    """How many steps are left, again and again: from all of them to 0, a step down or up at a time.

    After every ``jump`` steps before the end, but for the last piece, it goes up as many, ``resamples - 1`` times.
    ValueError for less than one of these.
    """
    if min(jump, resamples) < 1:
        raise ValueError(f"jump and resamples are 1 or more, not {jump} and {resamples}")
    left = dict.fromkeys(range(0, steps - jump, jump), resamples - 1)
    place = steps
    yield place
    while place > 0:
        place -= 1
        yield place
        if left.get(place, 0) > 0:
            left[place] -= 1
            for _ in range(jump):
                place += 1
                yield place
