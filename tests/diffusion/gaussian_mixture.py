from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffperception.diffusion import DenoiserOutput, Schedule
from diffperception.diffusion.prediction import broadcast_mul


@dataclass
class Mixture:
    """Gaussians on the line, whose noised densities, scores and denoisers are known in closed form."""

    means: Tensor = field(default_factory=lambda: torch.tensor([-0.8, 0.1, 0.9], dtype=torch.float64))
    stds: Tensor = field(default_factory=lambda: torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64))
    weights: Tensor = field(default_factory=lambda: torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64))

    def log_joint(self, schedule: Schedule, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 1) samples at (B,) times -> (B, K) log p(x_t, component)."""
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        noised = torch.distributions.Normal(alpha * self.means, ((alpha * self.stds) ** 2 + sigma**2).sqrt())
        return noised.log_prob(x_t) + self.weights.log()

    def denoise(self, schedule: Schedule, x_t: Tensor, t: Tensor) -> DenoiserOutput:
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        gain = alpha * self.stds**2 / ((alpha * self.stds) ** 2 + sigma**2)
        component = self.means + gain * (x_t - alpha * self.means)
        return DenoiserOutput((self.log_joint(schedule, x_t, t).softmax(1) * component).sum(1, keepdim=True))

    def start(self, schedule: Schedule, t: Tensor, count: int, seed: int = 0) -> Tensor:
        """(count, 1) samples noised as at ``t``."""
        generator = torch.Generator().manual_seed(seed)
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        x0, noise = torch.randn(2, count, generator=generator, dtype=torch.float64)
        x0 = self.means[component] + self.stds[component] * x0
        return (broadcast_mul(schedule.alpha(t), x0) + broadcast_mul(schedule.sigma(t), noise))[:, None]

    def distance(self, samples: Tensor) -> float:
        """Kolmogorov-Smirnov: the largest difference of the cumulative distributions."""
        x = samples.flatten().sort().values[:, None]
        exact = (torch.distributions.Normal(self.means, self.stds).cdf(x) * self.weights).sum(1)
        empirical = torch.arange(1, len(x) + 1) / len(x)
        return float((exact - empirical).abs().max())
