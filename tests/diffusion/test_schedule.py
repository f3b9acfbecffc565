import copy
import math

import numpy as np
import pytest
import torch

from diffperception.diffusion import (
    DiscreteSchedule,
    FlowSchedule,
    SubVariancePreserving,
    VarianceExploding,
    add_noise,
    cosine_schedule,
    linear_schedule,
    named_schedule,
)
from diffperception.diffusion.schedule import precise


@pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule(), linear_schedule(250), cosine_schedule(50)])
def test_discrete_paths_preserve_variance_and_lose_signal(schedule: DiscreteSchedule) -> None:
    t = torch.arange(-1, schedule.num_timesteps)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones_like(alpha), atol=1e-14)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert (alpha[0], sigma[0]) == (1, 0)


def test_linear_schedule_is_the_papers() -> None:
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert np.allclose(linear_schedule().alpha(torch.arange(1000)).square(), alpha_bar, rtol=1e-12)


def test_cosine_schedule_is_the_papers() -> None:
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = cosine_schedule()
    assert schedule.alpha(499).square().item() == pytest.approx(f(0.5) / f(0), rel=1e-12)
    # The last step would lose everything; the bound on beta keeps one thousandth of the step before it.
    assert schedule.alpha(999).square().item() == pytest.approx(f(0.999) / f(0) * 1e-3, rel=1e-9)
    assert schedule.alpha(999).square().item() == pytest.approx(2.43e-9, rel=1e-2)


def test_sub_vp_is_the_papers() -> None:
    """Its mean is that of the linear VP path in the limit of many steps, and its noise the square of that one's."""
    path, t = SubVariancePreserving(), torch.linspace(0, 1, 11, dtype=torch.float64)
    fine = linear_schedule(100_000)
    discrete = fine.alpha((t * 100_000 - 1).round().long())
    torch.testing.assert_close(path.alpha(t), discrete, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(path.sigma(t), 1 - path.alpha(t).square())
    # d mean / dt = -beta mean / 2 and d var / dt = -beta var + g^2 with g^2 = beta (1 - alpha^4): equation 29 itself.
    t = t[1:-1].requires_grad_()
    beta = 0.1 + 19.9 * t
    variance, alpha = path.sigma(t).square(), path.alpha(t)
    (rate,) = torch.autograd.grad(variance.sum(), t, retain_graph=True)
    torch.testing.assert_close(rate, beta * (1 - alpha**4 - variance))
    assert named_schedule("sub_vp", 1000) == path


def test_even_steps_of_sub_vp_are_even() -> None:
    path = SubVariancePreserving()
    grid = path.even_grid(9)
    levels = (path.sigma(grid) / path.alpha(grid)).log()
    torch.testing.assert_close(levels[:-1].diff(), levels[:-1].diff().mean().expand(8))
    assert grid[0].item() == pytest.approx(1)
    assert grid[-1] == 0
    assert path.levels([0.5])[0][2] == 500
    with pytest.raises(ValueError, match="from 0 to 1"):
        path.levels([1.5])
    with pytest.raises(ValueError, match="above 0 and grow"):
        SubVariancePreserving(1.0, 0.5)


@pytest.mark.parametrize("t", [7, torch.tensor(7), torch.tensor([3, 9]), torch.tensor([[0, -1, 5]])])
def test_values_are_float64_of_the_shape_of_t(t: int | torch.Tensor) -> None:
    for schedule in (linear_schedule(), VarianceExploding(), FlowSchedule()):
        for value in (schedule.alpha(t), schedule.sigma(t)):
            assert value.dtype == torch.float64
            assert value.shape == torch.as_tensor(t).shape


def test_no_float64_reaches_apples_gpus() -> None:
    """They do not know it; all numbers of schedules that leave the CPU are of this type."""
    assert precise(torch.device("mps")) == torch.float32
    assert precise(torch.device("cuda")) == precise(torch.device("cpu")) == torch.float64


def test_values_follow_the_device_of_t() -> None:
    assert cosine_schedule().alpha(torch.zeros(2, dtype=torch.int64, device="meta")).device.type == "meta"


def test_casting_a_model_leaves_its_schedule_alone() -> None:
    model = torch.nn.Linear(1, 1)
    model.schedule = cosine_schedule()
    model = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(model.schedule.alpha(999), cosine_schedule().alpha(999))


@pytest.mark.parametrize("t", [-2, 1000, torch.tensor([5, -2])])
def test_times_off_the_schedule_are_refused(t: int | torch.Tensor) -> None:
    with pytest.raises(IndexError):
        linear_schedule().alpha(t)


@pytest.mark.parametrize("beta", [0.0, 1.0, float("nan")])
def test_impossible_betas_are_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        DiscreteSchedule(torch.tensor([0.1, beta]))


def test_continuous_paths() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    assert VarianceExploding().alpha(t).tolist() == [1, 1, 1]
    assert VarianceExploding().sigma(t).tolist() == [0, 0.25, 1]
    assert FlowSchedule().alpha(t).tolist() == [1, 0.75, 0]
    assert FlowSchedule().sigma(t).tolist() == [0, 0.25, 1]


def test_noised_samples_have_the_paths_mean_and_spread() -> None:
    schedule, generator = cosine_schedule(), torch.Generator().manual_seed(0)
    x0, noise = torch.full((2, 100_000), 3.0), torch.randn(2, 100_000, generator=generator)
    t = torch.tensor([300, -1])
    x_t = add_noise(schedule, x0, t, noise)
    assert torch.allclose(x_t.mean(1).double(), 3 * schedule.alpha(t), atol=0.01)
    assert torch.allclose(x_t.std(1).double(), schedule.sigma(t), atol=0.01)
    assert torch.equal(x_t[1], x0[1])


def test_noising_keeps_the_dtype_of_the_signal() -> None:
    x0 = torch.randn(2, 3, dtype=torch.bfloat16)
    assert add_noise(cosine_schedule(), x0, 500, torch.randn_like(x0)).dtype == torch.bfloat16


def test_names_stand_for_their_paths_on_any_default_device() -> None:
    times = torch.arange(50)
    with torch.device("meta"):
        named = [named_schedule(name, 50) for name in ("linear", "cosine")]
    for schedule, expected in zip(named, (linear_schedule(50), cosine_schedule(50)), strict=True):
        assert torch.equal(schedule.alpha(times), expected.alpha(times))
    assert isinstance(named_schedule("flow", 50), FlowSchedule)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_rescaled_times_are_those_of_improved_diffusion(name) -> None:
    t = torch.tensor([0, 1, 1234, 3999])
    assert torch.equal(named_schedule(name, 4000, True).conditioning(t), t.float() * (1000.0 / 4000))
    assert torch.equal(named_schedule(name, 4000).conditioning(t), t)
    assert named_schedule(name, 4000, True).levels([1234])[0][2] == 308.5


def test_betas_and_their_bounds_belong_to_their_schedules():
    given = named_schedule("betas", 3, betas=[0.1, 0.2, 0.5])
    assert given.alpha(torch.tensor([-1, 0, 1, 2])).square().tolist() == pytest.approx([1, 0.9, 0.72, 0.36])
    assert torch.equal(linear_schedule(1000, 1e-4, 0.02).alpha(T999), linear_schedule().alpha(T999))
    assert linear_schedule(2, 0.1, 0.3).alpha(1).square() == pytest.approx(0.9 * 0.7)
    assert named_schedule("scaled_linear", 3, beta_start=0.04, beta_end=0.36).alpha(1).square() == pytest.approx(
        (1 - 0.04) * (1 - 0.4**2)
    )


T999 = torch.arange(1000)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "betas"}, "belong together"),
        ({"name": "linear", "betas": [0.1]}, "belong together"),
        ({"name": "cosine", "beta_end": 0.1}, "belong to linear and scaled_linear, not to cosine"),
        ({"name": "flow", "beta_start": 0.1}, "not to flow"),
        ({"name": "betas", "betas": [0.1, 0.2]}, "2 betas for num_timesteps = 50"),
        ({"name": "linear", "beta_end": 1.5}, "strictly between 0 and 1"),
        ({"name": "scaled_linear", "beta_start": -0.1}, "strictly between 0 and 1"),
        ({"name": "linear", "num_timesteps": 20}, "21 steps or more"),
    ],
)
def test_options_of_another_schedule_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        named_schedule(**{"num_timesteps": 50, **options})
