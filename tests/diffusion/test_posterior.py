import pytest
import torch

from diffperception.diffusion import (
    FlowSchedule,
    Schedule,
    VarianceExploding,
    cosine_schedule,
    ddim_step,
    learned_log_variance,
    linear_schedule,
    posterior_log_variance,
    posterior_mean,
    posterior_std,
)


@pytest.mark.parametrize(
    ("schedule", "t", "s"),
    [
        (linear_schedule(), 500, 499),
        (cosine_schedule(), 999, 300),
        (cosine_schedule(), 3, -1),
        (VarianceExploding(), 3.0, 0.5),
        (FlowSchedule(), 0.9, 0.2),
    ],
)
def test_mean_and_spread_are_bayes(schedule: Schedule, t: float, s: float) -> None:
    """Of (x_s, x_t) given x0, both Gaussian with Cov = (alpha_t / alpha_s) sigma_s^2, condition on x_t."""
    x0, x_t = torch.randn(2, 3, 4, dtype=torch.float64)
    alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    covariance = alpha_t / alpha_s * sigma_s**2
    mean = alpha_s * x0 + covariance / sigma_t**2 * (x_t - alpha_t * x0)
    assert torch.allclose(posterior_mean(schedule, x_t, x0, t, s), mean)
    assert torch.allclose(posterior_std(schedule, t, s).square(), sigma_s**2 - covariance**2 / sigma_t**2, atol=1e-14)


def test_the_mean_is_the_full_noise_step_without_its_noise() -> None:
    schedule, (x0, x_t) = cosine_schedule(), torch.randn(2, 2, 3, dtype=torch.float64)
    t, s = torch.tensor([900, 40]), torch.tensor([500, 20])
    expected = ddim_step(schedule, x_t, x0, t, s, 1.0, torch.zeros_like(x_t))
    assert torch.allclose(posterior_mean(schedule, x_t, x0, t, s), expected)


def test_the_clean_end_takes_the_variance_of_the_step_before() -> None:
    schedule = linear_schedule()
    t = torch.tensor([0, 1, 700])
    assert torch.allclose(
        posterior_log_variance(schedule, t, t - 1)[1:], 2 * posterior_std(schedule, t, t - 1)[1:].log()
    )
    assert posterior_log_variance(schedule, 0, -1) == posterior_log_variance(schedule, 1, 0)
    assert posterior_log_variance(schedule, 249, -1) == posterior_log_variance(schedule, 499, 249)


def test_the_learned_variance_lies_between_its_bounds() -> None:
    schedule, t = linear_schedule(), torch.tensor([0, 500])
    bounds = [learned_log_variance(schedule, torch.full((2, 3), place), t, t - 1) for place in (-1.0, 0.0, 1.0)]
    beta = 1 - (schedule.alpha(t) / schedule.alpha(t - 1)).square()
    assert torch.allclose(bounds[0][:, 0].double(), posterior_log_variance(schedule, t, t - 1))
    assert torch.allclose(bounds[2][:, 0].double(), beta.log())
    assert torch.allclose(bounds[1], (bounds[0] + bounds[2]) / 2)
