"""Denoisers: what samplers and guidance work on, and the adapter that makes one of a network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from diffperception.diffusion.prediction import Prediction, to_x0
from diffperception.diffusion.schedule import Schedule


class DenoiserOutput(NamedTuple):
    """What a denoiser makes of a noisy sample."""

    x0: Tensor  # (B, ...) expected signal
    variance_range: Tensor | None = None  # (B, ...) learned place of the log variance between its bounds, -1..1


Network = Callable[[Tensor, Tensor], Tensor]
Denoiser = Callable[[Tensor, Tensor], DenoiserOutput]


@dataclass(eq=False)
class NetworkDenoiser:
    """A network and a schedule as a denoiser: (x_t (B, C, ...), t (B,)) -> :class:`DenoiserOutput`.

    Args:
        network: (x_t, ``schedule.conditioning(t)``) -> prediction (B, C, ...), or (B, 2C, ...) with a learned range.
        schedule: the path the network was trained on.
        prediction: what the network predicts.
        learned_range: whether the second half of the network's channels is the variance's place between its bounds.
    """

    network: Network
    schedule: Schedule
    prediction: Prediction = "eps"
    learned_range: bool = False

    def __call__(self, x_t: Tensor, t: Tensor) -> DenoiserOutput:
        raw = self.network(x_t, self.schedule.conditioning(t))
        prediction, variance_range = split_range(raw, self.learned_range)
        x0 = to_x0(self.prediction, prediction, x_t, self.schedule.alpha(t), self.schedule.sigma(t))
        return DenoiserOutput(x0, variance_range)


def split_range(output: Tensor, learned_range: bool) -> tuple[Tensor, Tensor | None]:
    """A network's output as prediction and learned range: two (B, C, ...) of (B, 2C, ...), or all of it and None."""
    if not learned_range:
        return output, None
    prediction, variance_range = output.chunk(2, dim=1)
    return prediction, variance_range


def clip(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """The denoiser with every signal kept in ``low``..``high``; goes around guidance, not inside it."""

    def clipped(x_t: Tensor, t: Tensor) -> DenoiserOutput:
        output = denoiser(x_t, t)
        return output._replace(x0=output.x0.clamp(low, high))

    return clipped
