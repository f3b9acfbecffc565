"""The density of the probability-flow ODE against densities known in closed form."""

from functools import partial

import pytest
import torch
from torch import Tensor

from diffperception.diffusion import (
    DenoiserOutput,
    FlowSchedule,
    Schedule,
    VarianceExploding,
    cosine_schedule,
    linear_schedule,
    log_density,
)
from tests.diffusion.gaussian_mixture import Mixture

PATHS = {
    "cosine": (cosine_schedule(), lambda n: cosine_schedule().even_grid(n + 1)[:-1]),
    "linear": (linear_schedule(), lambda n: linear_schedule().even_grid(n + 1)[:-1]),
    "flow": (FlowSchedule(), lambda n: FlowSchedule().grid(n + 1)[:-1]),
    "exploding": (
        VarianceExploding(highest=160),
        lambda n: torch.logspace(2.2, -2.3, n + 1, dtype=torch.float64),
    ),
}


def errors(mixture: Mixture, name: str, steps: int) -> Tensor:
    schedule, grid = PATHS[name]
    times = grid(steps)
    x = mixture.start(schedule, times[-1], 200)
    exact = mixture.log_joint(schedule, x, times[-1].expand(200)).logsumexp(1)
    return (log_density(partial(mixture.denoise, schedule), schedule, x, times) - exact).abs()


@pytest.mark.parametrize("name", PATHS)
def test_the_density_of_a_mixture_is_exact_to_a_thousandth_of_a_nat(mixture: Mixture, name: str) -> None:
    found = errors(mixture, name, 400)
    assert found.mean() < 1e-3
    assert found.max() < 5e-3


def test_errors_fall_with_the_square_of_the_steps(mixture: Mixture) -> None:
    coarse, fine = (errors(mixture, "cosine", n).mean() for n in (25, 50))
    assert 3 < coarse / fine < 6


def correlated(schedule: Schedule, covariance: Tensor, x_t: Tensor, t: Tensor) -> DenoiserOutput:
    """The exact denoiser of N(0, covariance), of samples (B, D)."""
    alpha, sigma = float(schedule.alpha(t[0])), float(schedule.sigma(t[0]))
    noised = alpha**2 * covariance + sigma**2 * torch.eye(len(covariance), dtype=covariance.dtype)
    return DenoiserOutput(x_t @ torch.linalg.solve(noised, alpha * covariance))


def test_probes_give_the_divergence_without_bias() -> None:
    """With all signs of a small space as probes the mean is exact; one sign alone is not."""
    schedule = FlowSchedule()
    factor = torch.tensor([[0.5, 0.0], [0.4, 0.3]], dtype=torch.float64)
    denoiser = partial(correlated, schedule, factor @ factor.T)
    torch.manual_seed(0)
    x, times = torch.randn(8, 2, dtype=torch.float64), schedule.grid(21)[:-1]
    exact = log_density(denoiser, schedule, x, times)
    signs = [torch.tensor([1.0, sign], dtype=torch.float64).expand(8, 2) for sign in (1, -1)]
    torch.testing.assert_close(log_density(denoiser, schedule, x, times, signs), exact)
    assert (log_density(denoiser, schedule, x, times, signs[:1]) - exact).abs().min() > 0.01


def test_few_steps_do_where_signals_hardly_vary() -> None:
    """As those of smooth images: in most directions a point, which is integrated exactly."""
    schedule = cosine_schedule()
    denoiser = partial(correlated, schedule, 1e-8 * torch.eye(50, dtype=torch.float64))
    times = schedule.even_grid(11)[:-1]
    sigma = float(schedule.sigma(times[-1]))
    x = sigma * torch.randn(4, 50, dtype=torch.float64)
    exact = torch.distributions.Normal(0.0, sigma).log_prob(x).sum(1)
    torch.testing.assert_close(log_density(denoiser, schedule, x, times), exact, atol=0.05, rtol=0)


@pytest.mark.parametrize("times", [[0.5], [0.5, 0.0], [0.2, 0.5], [0.5, 0.5]], ids=["one", "clean", "ascend", "equal"])
def test_times_without_a_density_are_refused(mixture: Mixture, times: list[float]) -> None:
    schedule = FlowSchedule()
    with pytest.raises(ValueError, match="two or more times that descend"):
        log_density(partial(mixture.denoise, schedule), schedule, torch.zeros(1, 1), torch.tensor(times))
