"""Gaussian paths: ``x_t = alpha(t) x0 + sigma(t) eps`` (Variational Diffusion Models, arXiv 2107.00630, eq. 1)."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

Time = Tensor | float
ScheduleName = Literal["linear", "cosine", "straight"]


class Schedule(ABC):
    """How much signal and how much noise there is at time ``t``.

    ``alpha`` and ``sigma`` take a tensor of any shape, or a Python number, and return float64 of the same shape on the
    same device. A schedule is not a module: casting a model to another dtype leaves it alone.
    """

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Factor of the signal."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Standard deviation of the noise."""

    def conditioning(self, t: Tensor) -> Tensor:
        """The time as a network is told it, about 0 to 1000 whatever the path's own unit."""
        return t


class DiscreteSchedule(Schedule):
    """A variance-preserving path on integers 0..T-1 (DDPM, arXiv 2006.11239); ``t = -1`` is the clean end.

    Args:
        betas: (T,) variance added at each step, in (0, 1).

    Raises:
        ValueError: if a beta lies outside (0, 1).
    """

    def __init__(self, betas: Tensor) -> None:
        betas = betas.to("cpu", torch.float64)
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                "Every beta of a schedule must lie strictly between 0 and 1; change the schedule's bounds."
            )
        alpha_bar = torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])
        self.num_timesteps = len(betas)
        # Row 0 is t = -1. A table lives once on each device, so that looking it up never waits for the device.
        self._tables = {torch.device("cpu"): torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()])}

    def alpha(self, t: Time) -> Tensor:
        return self._look_up(0, t)

    def sigma(self, t: Time) -> Tensor:
        return self._look_up(1, t)

    def _look_up(self, row: int, t: Time) -> Tensor:
        t = torch.as_tensor(t)
        if t.device not in self._tables:
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        # index_select, unlike indexing, refuses times below -1 instead of counting from the end.
        return self._tables[t.device][row].index_select(0, (t + 1).reshape(-1)).reshape(t.shape)


class VarianceExploding(Schedule):
    """``alpha = 1``, ``sigma = t`` for t >= 0: the path of arXiv 2206.00364, where time is the noise level itself."""

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(_float64(t))

    def sigma(self, t: Time) -> Tensor:
        return _float64(t)


class StraightPath(Schedule):
    """``alpha = 1 - t``, ``sigma = t`` for t in 0..1: the path of flow matching (arXiv 2210.02747)."""

    def alpha(self, t: Time) -> Tensor:
        return 1 - _float64(t)

    def sigma(self, t: Time) -> Tensor:
        return _float64(t)

    def conditioning(self, t: Tensor) -> Tensor:
        return 1000 * t


def linear_schedule(T: int = 1000) -> DiscreteSchedule:
    """DDPM's schedule, its 1000 steps' bounds 1e-4 and 0.02 scaled to ``T`` steps (arXiv 2102.09672).

    Raises:
        ValueError: for 20 steps or fewer, whose last would leave nothing of the signal.
    """
    if T <= 20:
        raise ValueError(f"A linear schedule takes 21 steps or more, not {T}: raise num_timesteps, or take cosine.")
    scale = 1000 / T
    return DiscreteSchedule(torch.linspace(scale * 1e-4, scale * 0.02, T, dtype=torch.float64, device="cpu"))


def cosine_schedule(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> DiscreteSchedule:
    """The schedule of Improved DDPM (arXiv 2102.09672, eq. 17), with every beta at most ``max_beta``.

    Raises:
        ValueError: for no step.
    """
    if T < 1:
        raise ValueError(f"A cosine schedule takes 1 step or more, not {T}: raise num_timesteps.")
    time = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
    alpha_bar = torch.cos((time + s) / (1 + s) * math.pi / 2).square()
    return DiscreteSchedule((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))


def named_schedule(name: ScheduleName, num_timesteps: int) -> Schedule:
    """The path of a name, with so many steps where it is of discrete steps, which the straight one is not."""
    if name == "straight":
        return StraightPath()
    return linear_schedule(num_timesteps) if name == "linear" else cosine_schedule(num_timesteps)


def _float64(t: Time) -> Tensor:
    return torch.as_tensor(t).to(torch.float64)
