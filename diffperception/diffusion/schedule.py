"""Gaussian paths: ``x_t = alpha(t) x0 + sigma(t) eps`` (Variational Diffusion Models, arXiv 2107.00630, eq. 1)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Time = Tensor | float
ScheduleName = Literal["linear", "scaled_linear", "cosine", "betas", "flow", "sub_vp"]
Spacing = Literal["leading", "trailing", "linspace", "diffusiondet"]
# The cosine schedule ends at noise 20,000 times as strong as the signal: most of that way nothing can be told apart.
NOISIEST = 160.0
CLEANEST = 0.002  # noise that nobody sees: continuous paths need no steps below it


class Schedule(ABC):
    """How much signal and how much noise there is at time ``t``.

    ``alpha`` and ``sigma`` take a tensor of any shape, or a number, and return float64 (float32 where a device has no
    float64) of this shape and device. A schedule is not a module: casting a model to another dtype leaves it alone.
    """

    num_timesteps: int | None = None  # T of a path of discrete steps, whose times are 0..T-1 and -1, the clean end
    times_in_words: str = "0 or more"  # which times there are, for messages

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Factor of the signal."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Standard deviation of the noise."""

    @abstractmethod
    def grid(self, steps: int, spacing: Spacing = "trailing") -> Tensor:
        """Times from the noisiest to the clean end; consecutive pairs are the steps of a sampler.

        Args:
            steps: how many; ValueError for fewer than one, or more than there are.
            spacing: which times of a path of discrete steps, see :meth:`DiscreteSchedule.grid`.

        Returns: (steps + 1,) descending, on the CPU.
        """

    @abstractmethod
    def from_fraction(self, fraction: Tensor) -> Tensor:
        """The times (B,) at fractions (B,) of the way from the clean end, 0, to pure noise, 1 (excluded)."""

    def uniform(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) times, each as likely, on the generator's device."""
        return self.from_fraction(torch.rand(count, generator=generator, device=generator.device))

    def conditioning(self, t: Tensor) -> Tensor:
        """The time as a network is told it, 0 to 1000 on most paths; those of discrete steps may tell others."""
        return t

    def even_grid(self, steps: int) -> Tensor:
        """As :meth:`grid`, even in log(sigma / alpha), as second-order samplers want it (arXiv 2206.00927, 3.3)."""
        return self.grid(steps)

    def levels(self, timesteps: Sequence[float]) -> list[tuple[float, float, float]]:
        """(alpha, sigma, conditioning) at each time that a user names; ValueError if the path has no such time."""
        outside = [t for t in timesteps if not self.has_time(t)]
        if outside:
            raise ValueError(f"the timesteps {outside} lie outside of this path: its times are {self.times_in_words}")
        t = torch.tensor(timesteps, dtype=torch.float32 if self.num_timesteps is None else torch.int64)
        values = self.alpha(t), self.sigma(t), self.conditioning(t).float()
        return list(zip(*(value.tolist() for value in values), strict=True))

    def has_time(self, t: float) -> bool:
        """Whether the path has a time that a user names."""
        return float(self.alpha(t)) >= 0 and float(self.sigma(t)) >= 0

    def require_discrete(self, what: str) -> int:
        """T; ValueError if ``what`` needs discrete steps and the path has none."""
        if self.num_timesteps is None:
            raise ValueError(f"{what} needs a schedule of discrete steps, such as linear or cosine.")
        return self.num_timesteps


class DiscreteSchedule(Schedule):
    """A variance-preserving path on integers 0..T-1 (DDPM, arXiv 2006.11239); ``t = -1`` is the clean end.

    ``betas`` (T,) are the variances added at each step; ValueError if one lies outside (0, 1).
    """

    num_timesteps: int
    rescale_timesteps: bool = False  # a network is told t * 1000 / T (``rescale_timesteps`` of improved-diffusion)

    def __init__(self, betas: Tensor) -> None:
        betas = betas.to("cpu", torch.float64)
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("Every beta of a schedule must lie strictly between 0 and 1; change its bounds.")
        alpha_bar = torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])
        self.num_timesteps = len(betas)
        self.times_in_words = f"whole, 0 to {self.num_timesteps - 1}"
        # Row 0 is t = -1. A table lives once on each device, so that looking it up never waits for the device.
        self._tables = {torch.device("cpu"): torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()])}

    def alpha(self, t: Time) -> Tensor:
        return self._look_up(0, t)

    def sigma(self, t: Time) -> Tensor:
        return self._look_up(1, t)

    def grid(self, steps: int, spacing: Spacing = "trailing", start: int | None = None) -> Tensor:
        """As :meth:`Schedule.grid`: (steps + 1,) int64; ValueError for an unknown spacing too.

        From the time `start` on, if one is given: as on the path of the times up to it alone.

        ``leading``, ``trailing`` and ``linspace`` are named as in diffusers (arXiv 2305.08891, table 2);
        ``diffusiondet`` is the integers of linspace(-1, T-1, steps + 1) (arXiv 2211.09788). guided-diffusion's
        respacing "25" is 25 steps of ``linspace``, its "ddim25" 25 of ``leading``. A single step of these two starts
        at 0.
        """
        T = self.num_timesteps if start is None else start + 1
        if not 1 <= T <= self.num_timesteps:
            raise ValueError(f"Start at a time from 0 to {self.num_timesteps - 1} of this schedule, not at {start}.")
        if not 1 <= steps <= T:
            on_this = "on this schedule" if start is None else f"from the time {start} on"
            raise ValueError(f"Take between 1 and {T} steps {on_this}, not {steps}.")
        if spacing == "leading":
            times = np.arange(steps) * (T // steps)
        elif spacing == "trailing":
            times = np.round(np.arange(1, steps + 1) * (T / steps)) - 1
        elif spacing == "linspace":
            times = np.round(np.linspace(0, T - 1, steps))
        elif spacing == "diffusiondet":
            times = torch.linspace(-1, T - 1, steps + 1)[1:].numpy()
        else:
            raise ValueError(f"A spacing is one of {', '.join(get_args(Spacing))}, not {spacing!r}.")
        return torch.tensor([*times[::-1].astype(int), -1])

    def even_grid(self, steps: int) -> Tensor:
        grid = self.grid(steps)
        noisiest, cleanest = (self.sigma(t) / self.alpha(t) for t in (grid[0], torch.tensor(0)))
        highest = noisiest.clamp(max=NOISIEST)
        levels = torch.logspace(float(highest.log10()), float(cleanest.log10()), steps, dtype=torch.float64)
        times = self.timesteps(torch.cat([levels, levels.new_zeros(1)]))
        return torch.cat([grid[:1], times[1:]])

    def timesteps(self, levels: Tensor) -> Tensor:
        """Different times whose sigma / alpha come near to each noise level, and -1 for level 0: int64, on the CPU.

        Args:
            levels: (steps + 1,) descending, the last one 0. Where they are closer than the schedule's own, the times
                that come next are taken, so that there are always as many; ValueError if they are more than the times.
        """
        steps = len(levels) - 1
        if steps > self.num_timesteps:
            raise ValueError(f"Take at most {self.num_timesteps} steps on this schedule, not {steps}.")
        times = torch.arange(-1, self.num_timesteps)
        # Compared as angles, in which clean and pure noise are equally far from the middle.
        angles = (self.sigma(times) / self.alpha(times)).atan()
        nearest = torch.bucketize(levels.to("cpu", torch.float64).atan(), (angles[1:] + angles[:-1]) / 2)
        order = torch.arange(steps + 1)
        descending = (times[nearest] + order).cummin(0).values - order
        return torch.maximum(descending, steps - 1 - order)  # as many times are left as steps

    def from_fraction(self, fraction: Tensor) -> Tensor:
        return (fraction * self.num_timesteps).long()

    def conditioning(self, t: Tensor) -> Tensor:
        return t.float() * (1000 / self.num_timesteps) if self.rescale_timesteps else t

    def uniform(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.num_timesteps, (count,), generator=generator, device=generator.device)

    def has_time(self, t: float) -> bool:
        return t in range(self.num_timesteps)

    def _look_up(self, row: int, t: Time) -> Tensor:
        t = torch.as_tensor(t)
        if t.device not in self._tables:
            table = self._tables[torch.device("cpu")]
            self._tables[t.device] = table.to(precise(t.device)).to(t.device)
        # index_select, unlike indexing, refuses times below -1 instead of counting from the end.
        return self._tables[t.device][row].index_select(0, (t + 1).reshape(-1)).reshape(t.shape)


@dataclass
class VarianceExploding(Schedule):
    """``alpha = 1``, ``sigma = t`` for t >= 0: the path of EDM (arXiv 2206.00364), whose time is the noise level.

    Args:
        lowest, highest: noise levels between which a grid runs and times are drawn.
        rho: how much steps gather at low noise (eq. 5).
    """

    lowest: float = CLEANEST
    highest: float = 80.0
    rho: float = 7.0

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(_real(t))

    def sigma(self, t: Time) -> Tensor:
        return _real(t)

    def grid(self, steps: int, spacing: Spacing = "trailing") -> Tensor:
        """Noise levels from ``highest`` to ``lowest``, then 0 (eq. 5)."""
        _require_steps(steps)
        ends = self.highest ** (1 / self.rho), self.lowest ** (1 / self.rho)
        levels = torch.linspace(*ends, steps, dtype=torch.float64) ** self.rho
        return torch.cat([levels, levels.new_zeros(1)])

    def from_fraction(self, fraction: Tensor) -> Tensor:
        low, high = self.lowest ** (1 / self.rho), self.highest ** (1 / self.rho)
        return (low + fraction * (high - low)) ** self.rho


class FlowSchedule(Schedule):
    """``alpha = 1 - t``, ``sigma = t`` for t in 0..1: the straight path of flow matching (arXiv 2210.02747)."""

    times_in_words = "from 0 to 1, such as 0.05 and 0.15"

    def alpha(self, t: Time) -> Tensor:
        return 1 - _real(t)

    def sigma(self, t: Time) -> Tensor:
        return _real(t)

    def grid(self, steps: int, spacing: Spacing = "trailing") -> Tensor:
        _require_steps(steps)
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def from_fraction(self, fraction: Tensor) -> Tensor:
        return fraction

    def conditioning(self, t: Tensor) -> Tensor:
        return 1000 * t


@dataclass
class SubVariancePreserving(Schedule):
    """The sub-VP SDE (arXiv 2011.13456, eq. 29): the signal of the linear VP path, its noise's variance squared.

    ``alpha^2 = exp(-beta_start t - (beta_end - beta_start) t^2 / 2)`` and ``sigma = 1 - alpha^2`` for t in 0..1.

    Args:
        beta_start, beta_end: rates of noise at t = 0 and 1; ValueError unless 0 < start < end.
    """

    beta_start: float = 0.1
    beta_end: float = 20.0

    times_in_words = "from 0 to 1, such as 0.05 and 0.15"

    def __post_init__(self) -> None:
        if not 0 < self.beta_start < self.beta_end:
            raise ValueError(
                f"The betas of sub-VP must be above 0 and grow, not {self.beta_start:g}, {self.beta_end:g}."
            )

    def alpha(self, t: Time) -> Tensor:
        return (-self._loss(t) / 2).exp()

    def sigma(self, t: Time) -> Tensor:
        return -torch.expm1(-self._loss(t))

    def grid(self, steps: int, spacing: Spacing = "trailing") -> Tensor:
        _require_steps(steps)
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def even_grid(self, steps: int) -> Tensor:
        _require_steps(steps)
        highest = float((self.sigma(1.0) / self.alpha(1.0)).log10())
        levels = torch.logspace(highest, math.log10(CLEANEST), steps, dtype=torch.float64)
        # level = 1 / alpha - alpha, and -2 log(alpha) = beta_start t + (beta_end - beta_start) t^2 / 2.
        loss, growth = 2 * (levels / 2).asinh(), self.beta_end - self.beta_start
        times = ((self.beta_start**2 + 2 * growth * loss).sqrt() - self.beta_start) / growth
        return torch.cat([times, times.new_zeros(1)])

    def from_fraction(self, fraction: Tensor) -> Tensor:
        return fraction

    def conditioning(self, t: Tensor) -> Tensor:
        return 1000 * t

    def has_time(self, t: float) -> bool:
        return 0 <= t <= 1

    def _loss(self, t: Time) -> Tensor:
        """-2 log alpha, the integral of the rates."""
        t = _real(t)
        return self.beta_start * t + (self.beta_end - self.beta_start) / 2 * t.square()


def linear_schedule(T: int = 1000, beta_start: float | None = None, beta_end: float | None = None) -> DiscreteSchedule:
    """Betas even between two bounds; by default those of DDPM, 1e-4 and 0.02 of 1000 steps, scaled to ``T`` steps.

    ValueError for 20 steps or fewer of these, whose last would leave nothing of the signal.
    """
    return DiscreteSchedule(torch.linspace(*beta_bounds(T, beta_start, beta_end), T, dtype=torch.float64, device="cpu"))


def scaled_linear_schedule(
    T: int = 1000, beta_start: float | None = None, beta_end: float | None = None
) -> DiscreteSchedule:
    """Square roots of betas even between those of two bounds, see :func:`linear_schedule` (arXiv 2112.10752's code)."""
    start, end = (beta**0.5 for beta in beta_bounds(T, beta_start, beta_end))
    return DiscreteSchedule(torch.linspace(start, end, T, dtype=torch.float64, device="cpu").square())


def beta_bounds(T: int, beta_start: float | None = None, beta_end: float | None = None) -> tuple[float, float]:
    """The first and the last beta of a path that is linear in them: what is given, DDPM's scaled to ``T`` steps else.

    ValueError for fewer than one step, or 20 or fewer whose last is DDPM's.
    """
    if T < 1 or (T <= 20 and beta_end is None):
        raise ValueError(f"A linear schedule takes 21 steps or more, not {T}: raise num_timesteps, or take cosine.")
    scale = 1000 / T
    start, end = (
        default if given is None else given for given, default in ((beta_start, scale * 1e-4), (beta_end, scale * 0.02))
    )
    if not 0 < start < 1 or not 0 < end < 1:
        raise ValueError(f"beta_start and beta_end must lie strictly between 0 and 1, not {start:g} and {end:g}.")
    return start, end


def cosine_schedule(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> DiscreteSchedule:
    """The schedule of Improved DDPM (arXiv 2102.09672, eq. 17), with every beta at most ``max_beta``."""
    if T < 1:
        raise ValueError(f"A cosine schedule takes 1 step or more, not {T}: raise num_timesteps.")
    time = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
    alpha_bar = torch.cos((time + s) / (1 + s) * math.pi / 2).square()
    return DiscreteSchedule((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))


def named_schedule(
    name: ScheduleName,
    num_timesteps: int,
    rescale_timesteps: bool = False,
    beta_start: float | None = None,
    beta_end: float | None = None,
    betas: Sequence[float] | None = None,
) -> Schedule:
    """The path of this name, see :class:`DiscreteSchedule`; ``flow`` and ``sub_vp`` have no discrete steps.

    These ignore the other arguments.

    Args:
        name: ``betas`` is the path whose betas are given.
        num_timesteps: T.
        rescale_timesteps: a network is told times of 0 to 1000 whatever T is.
        beta_start, beta_end: bounds of ``linear`` and ``scaled_linear``, see :func:`linear_schedule`.
        betas: T variances added at each step.

    Raises:
        ValueError: for options of another path, or numbers that make none.
    """
    if (betas is None) == (name == "betas"):
        raise ValueError("The schedule betas and the numbers given as betas belong together: set both, or neither.")
    if name not in ("linear", "scaled_linear") and (beta_start, beta_end) != (None, None):
        raise ValueError(f"beta_start and beta_end belong to linear and scaled_linear, not to {name}: leave them out.")
    if name in ("flow", "sub_vp"):
        return FlowSchedule() if name == "flow" else SubVariancePreserving()
    if betas is not None and len(betas) != num_timesteps:
        raise ValueError(f"There are {len(betas)} betas for num_timesteps = {num_timesteps}: give as many as steps.")
    if betas is not None:
        schedule = DiscreteSchedule(torch.tensor(betas, dtype=torch.float64, device="cpu"))
    elif name == "cosine":
        schedule = cosine_schedule(num_timesteps)
    else:
        of_bounds = linear_schedule if name == "linear" else scaled_linear_schedule
        schedule = of_bounds(num_timesteps, beta_start, beta_end)
    schedule.rescale_timesteps = rescale_timesteps
    return schedule


def precise(device: torch.device) -> torch.dtype:
    """The most exact type of numbers that a device computes with: Apple's GPUs do not know float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _real(t: Time) -> Tensor:
    t = torch.as_tensor(t)
    return t.to(precise(t.device))


def _require_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"Sampling takes at least 1 step, not {steps}.")
