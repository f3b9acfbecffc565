import pytest
import torch

from diffperception.diffusion import (
    FlowSchedule,
    Prediction,
    Schedule,
    VarianceExploding,
    add_noise,
    cosine_schedule,
    target,
    to_eps,
    to_x0,
)
from diffperception.diffusion.prediction import broadcast_mul

PATHS = [
    (cosine_schedule(), torch.tensor([0, 400, 990])),
    (VarianceExploding(), torch.tensor([0.01, 1.0, 80.0])),
    (FlowSchedule(), torch.tensor([0.01, 0.5, 0.99])),
]


@pytest.mark.parametrize(("schedule", "t"), PATHS)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_every_prediction_gives_back_the_signal_and_the_noise(
    schedule: Schedule, t: torch.Tensor, kind: Prediction
) -> None:
    x0, eps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = add_noise(schedule, x0, t, eps)
    prediction = target(kind, x0, eps, alpha, sigma)
    assert torch.allclose(to_x0(kind, prediction, x_t, alpha, sigma), x0, atol=1e-9)
    assert torch.allclose(to_eps(kind, prediction, x_t, alpha, sigma), eps, atol=1e-9)


def test_flow_is_the_velocity_of_the_straight_path() -> None:
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    path, t, dt = FlowSchedule(), torch.tensor(0.4, dtype=torch.float64), 1e-6
    velocity = (add_noise(path, x0, t + dt, eps) - add_noise(path, x0, t - dt, eps)) / (2 * dt)
    assert torch.allclose(velocity, target("flow", x0, eps, path.alpha(t), path.sigma(t)), atol=1e-8)


def test_v_is_the_derivative_along_the_circle() -> None:
    """v = d x / d angle with alpha = cos(angle), sigma = sin(angle) (arXiv 2202.00512, appendix D)."""
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    angle = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.functional.jacobian(lambda a: a.cos() * x0 + a.sin() * eps, (angle,))
    assert torch.allclose(derivative, target("v", x0, eps, angle.cos(), angle.sin()))


def test_a_clean_sample_and_pure_noise_do_not_divide_by_zero() -> None:
    x, zero, one = torch.randn(2, 3), torch.tensor(0.0), torch.tensor(1.0)
    assert torch.equal(to_x0("x0", x, x, one, zero), x)
    assert torch.equal(to_eps("eps", x, x, zero, one), x)
    assert torch.equal(to_x0("eps", x, x, one, zero), x)
    assert to_x0("v", x, x, zero, one).isfinite().all()


def test_unknown_predictions_are_named() -> None:
    with pytest.raises(ValueError, match="'epsilon'"):
        target("epsilon", *torch.zeros(4, 1))  # type: ignore[arg-type]


def test_scale_aligns_coefficients_with_samples() -> None:
    x = torch.ones(2, 3, 4)
    assert broadcast_mul(torch.tensor([1.0, 2.0]), x)[1].eq(2).all()
    assert broadcast_mul(torch.tensor(3.0), x).eq(3).all()
    assert broadcast_mul(torch.tensor(1e-3, dtype=torch.float64), x.bfloat16()).dtype == torch.float32
