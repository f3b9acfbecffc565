"""Training losses, and the timesteps at which they are taken."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffperception.diffusion.denoiser import DenoiserOutput, Network, split_range
from diffperception.diffusion.prediction import Prediction, broadcast_mul, target, to_x0
from diffperception.diffusion.schedule import Schedule
from diffperception.diffusion.steps import add_noise, learned_log_variance, posterior_log_variance, posterior_mean


@dataclass(eq=False)
class Objective:
    """The loss of one noised batch; ``prediction="flow"`` on a :class:`FlowSchedule` is flow matching.

    Args:
        schedule: the path from signal to noise.
        prediction: what the network predicts.
        learned_range: the network's output has twice the channels, the second half placing the log variance between
            its bounds; the variational bound trains that half alone (the hybrid of arXiv 2102.09672, eq. 16).
            ValueError on a path without discrete steps.
        min_snr: weigh the loss of x0 by the signal-to-noise ratio, at most this (arXiv 2303.09556; 5 there), instead
            of weighing the loss of the prediction by 1.
    """

    schedule: Schedule
    prediction: Prediction = "eps"
    learned_range: bool = False
    min_snr: float | None = None

    def __post_init__(self) -> None:
        if self.learned_range:
            self.schedule.require_discrete("A learned range")

    def __call__(self, network: Network, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Terms whose sum is each sample's loss: ``mse`` (B,) and, with a learned range, ``vlb``, bound * T / 1000.

        Args:
            network: (x_t (B, C, ...), time (B,)) -> (B, C, ...), or (B, 2C, ...) with a learned range.
            x0: (B, C, ...) signal, -1..1.
            t: (B,) times.
            noise: standard normal, of x0's shape.
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x_t = add_noise(self.schedule, x0, t, noise)
        output = network(x_t, self.schedule.conditioning(t))
        # Under autocast the output is in half precision; losses are not.
        prediction, variance_range = split_range(output.to(x0.dtype), self.learned_range)
        goal = target(self.prediction, x0, noise, alpha, sigma)
        mse = (prediction - goal).square().flatten(1).mean(1)
        if self.min_snr is not None:
            # The error of x0 is that of the prediction times its slope, what a prediction of 1 makes of a sample of 0.
            slope = to_x0(self.prediction, torch.ones_like(alpha), torch.zeros_like(alpha), alpha, sigma)
            mse = broadcast_mul((alpha / sigma).square().clamp(max=self.min_snr) * slope.square(), mse)
        losses = {"mse": mse}
        if variance_range is not None:
            found = to_x0(self.prediction, prediction.detach(), x_t, alpha, sigma)
            bound = variational_bound(self.schedule, x0, x_t, t, DenoiserOutput(found, variance_range))
            losses["vlb"] = bound * (self.schedule.require_discrete("A learned range") / 1000)
        return losses


def variational_bound(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, output: DenoiserOutput) -> Tensor:
    """The variational bound's term at ``t`` in bits per dimension, (B,) (Improved DDPM, arXiv 2102.09672, eq. 4-7).

    Args:
        x0, x_t: (B, C, ...) signal of 8 bits, -1..1, and its noised sample at times ``t`` (B,).
        output: what the denoiser makes of ``x_t``, with a variance range.
    """
    assert output.variance_range is not None
    s = t - 1
    mean = posterior_mean(schedule, x_t, output.x0, t, s)
    log_variance = learned_log_variance(schedule, output.variance_range, t, s)
    true_mean = posterior_mean(schedule, x_t, x0, t, s)
    true_log_variance = broadcast_mul(posterior_log_variance(schedule, t, s), torch.ones_like(x0))
    divergence = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    decoder = -discretized_log_likelihood(x0, mean, log_variance / 2)
    nats = torch.where(t == 0, decoder.flatten(1).mean(1), divergence.flatten(1).mean(1))
    return nats / math.log(2)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other)) elementwise, in nats."""
    ratio = log_variance - other_log_variance
    return (ratio.exp() - 1 - ratio + (mean - other_mean).square() * (-other_log_variance).exp()) / 2


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the bin of ``x``, one of 256 in -1..1, the outer ones infinite (arXiv 2006.11239, eq. 13)."""
    upper = _normal_cdf((x - mean + 1 / 255) * (-log_std).exp())
    lower = _normal_cdf((x - mean - 1 / 255) * (-log_std).exp())
    upper = torch.where(x > 0.999, 1, upper)
    lower = torch.where(x < -0.999, 0, lower)
    return (upper - lower).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    # The tanh approximation, as in the published models' losses; within 2e-4 of the error function's.
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


class UniformTimes:
    """All times of a path, each as likely."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Times (batch,) and their weights (batch,) in the loss: 1."""
        t = self.schedule.uniform(batch, generator)
        return t, torch.ones_like(t, dtype=torch.float32)


class LossSecondMoment(nn.Module):
    """Timesteps in proportion to the root of their mean squared loss (Improved DDPM, arXiv 2102.09672, section 3.3).

    Until every one of the ``num_timesteps`` has been seen ``history`` times they are uniform. A module, so that a
    checkpoint holds what it has learned.

    Args:
        history: how many losses of each timestep are remembered.
        uniform: fraction of the probability that stays uniform.
    """

    losses: Tensor
    seen: Tensor

    def __init__(self, num_timesteps: int, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(num_timesteps, history))
        self.register_buffer("seen", torch.zeros(num_timesteps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """(T,) probability of each timestep."""
        root = self.losses.square().mean(1).sqrt()
        flat = torch.full_like(root, 1 / len(root))
        learned = torch.lerp(root / root.sum(), flat, self.uniform)
        return torch.where((self.seen >= self.losses.shape[1]).all(), learned, flat)

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Times (batch,) and the weights (batch,) that keep the loss's mean as if times were uniform."""
        probabilities = self.probabilities()
        uniform = torch.rand(batch, generator=generator, device=generator.device).to(probabilities.device)
        t = torch.searchsorted(probabilities.cumsum(0), uniform).clamp(max=len(probabilities) - 1)
        return t, 1 / (len(probabilities) * probabilities[t])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the losses (N,) found at times (N,); give those of every process."""
        # A timestep that comes more than once in the batch fills as many places of its ring.
        earlier = (t[:, None] == t[None, :]).tril(-1).sum(1)
        self.losses[t, (self.seen[t] + earlier) % self.losses.shape[1]] = losses.detach().to(self.losses.dtype)
        self.seen.index_add_(0, t, torch.ones_like(t))
