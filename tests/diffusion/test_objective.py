import math

import pytest
import torch
from torch import Tensor, nn

from diffperception.diffusion import (
    DenoiserOutput,
    DiscreteSchedule,
    FlowSchedule,
    LossSecondMoment,
    NetworkDenoiser,
    Objective,
    Prediction,
    UniformTimes,
    VarianceExploding,
    add_noise,
    cosine_schedule,
    linear_schedule,
    posterior_std,
    target,
    variational_bound,
)
from diffperception.diffusion.objective import discretized_log_likelihood, gaussian_kl

KINDS: list[Prediction] = ["x0", "eps", "v", "flow"]


def batch(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, size, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x0.clamp(-1, 1), torch.randint(1, 1000, (size,), generator=generator), noise


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_answer_costs_nothing(kind: Prediction) -> None:
    schedule, (x0, t, noise) = cosine_schedule(), batch()
    goal = target(kind, x0, noise, schedule.alpha(t), schedule.sigma(t))
    losses = Objective(schedule, kind)(lambda x, t: goal, x0, t, noise)
    assert torch.equal(losses["mse"], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_error_of_the_signal_whatever_is_predicted(kind: Prediction) -> None:
    """min-SNR, arXiv 2303.09556, eq. 5: min(SNR, gamma) |x0 - x0_hat|^2."""
    schedule, (x0, t, noise) = cosine_schedule(), batch()
    goal = target(kind, x0, noise, schedule.alpha(t), schedule.sigma(t))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return goal + 0.1

    loss = Objective(schedule, kind, min_snr=5.0)(network, x0, t, noise)["mse"]
    x_t = add_noise(schedule, x0, t, noise)
    error = NetworkDenoiser(network, schedule, kind)(x_t, t).x0 - x0
    snr = (schedule.alpha(t) / schedule.sigma(t)).square()
    assert torch.allclose(loss, snr.clamp(max=5) * error.square().flatten(1).mean(1), rtol=1e-6)


def test_flow_matching_is_the_same_code_on_the_straight_path() -> None:
    """E |u(x_t, t) - (noise - x0)|^2 at x_t = (1 - t) x0 + t noise (arXiv 2210.02747), times in thousandths."""
    x0, _, noise = batch()
    t, seen = torch.rand(4), []

    def network(x: Tensor, time: Tensor) -> Tensor:
        seen.append((x, time))
        return torch.zeros_like(x)

    loss = Objective(FlowSchedule(), "flow")(network, x0, t, noise)["mse"]
    assert torch.allclose(loss, (noise - x0).square().flatten(1).mean(1))
    weight = t.double()[:, None, None, None]
    assert torch.allclose(seen[0][0], (1 - weight) * x0 + weight * noise)
    assert torch.equal(seen[0][1], 1000 * t)


@pytest.mark.parametrize("path", [FlowSchedule(), VarianceExploding()])
def test_a_learned_range_needs_discrete_steps(path: FlowSchedule | VarianceExploding) -> None:
    with pytest.raises(ValueError, match="discrete steps"):
        Objective(path, learned_range=True)


# The variational bound


def test_the_bound_is_least_at_the_true_posterior() -> None:
    schedule, (x0, t, noise) = linear_schedule(), batch()
    x_t = add_noise(schedule, x0, t, noise)

    def bound(x0_guess: Tensor, place: float) -> Tensor:
        return variational_bound(schedule, x0, x_t, t, DenoiserOutput(x0_guess, torch.full_like(x0, place)))

    assert torch.allclose(bound(x0, -1.0), torch.zeros(4, dtype=torch.float64), atol=1e-9)
    assert (bound(x0, -0.5) > 0).all()
    assert (bound(x0 + 0.1, -1.0) > 0).all()


def test_the_bound_of_a_wrong_mean_is_known() -> None:
    """With the true variance the divergence is (mean difference)^2 / (2 variance), in bits."""
    schedule, (x0, t, noise) = linear_schedule(), batch()
    x_t = add_noise(schedule, x0, t, noise)
    estimate = DenoiserOutput(x0 + 0.1, torch.full_like(x0, -1))
    alpha_t, alpha_s, sigma_t = schedule.alpha(t), schedule.alpha(t - 1), schedule.sigma(t)
    beta = 1 - (alpha_t / alpha_s).square()
    shift = 0.1 * alpha_s * beta / sigma_t.square()
    expected = shift.square() / (2 * posterior_std(schedule, t, t - 1).square()) / math.log(2)
    assert torch.allclose(variational_bound(schedule, x0, x_t, t, estimate), expected)


def test_the_first_timestep_is_the_decoders_likelihood() -> None:
    schedule, (x0, _, noise) = linear_schedule(), batch()
    t = torch.zeros(4, dtype=torch.int64)
    x0 = (x0 * 127.5 + 127.5).round() / 127.5 - 1
    x_t = add_noise(schedule, x0, t, noise)
    bound = variational_bound(schedule, x0, x_t, t, DenoiserOutput(x0, torch.ones_like(x0)))
    # At t = 0 the mean is the signal itself and the learned variance at its upper bound is beta_0 = 1e-4.
    inner = math.erf(1 / 255 / math.sqrt(2 * 1e-4))
    outer = (1 + inner) / 2
    at_edge = (x0.abs() > 0.999).double().flatten(1).mean(1)
    expected = -(at_edge * math.log2(outer) + (1 - at_edge) * math.log2(inner))
    assert torch.allclose(bound, expected, rtol=5e-3)


def test_gaussian_divergence_is_torchs() -> None:
    mean, other_mean, log_variance, other_log_variance = torch.randn(4, 5, dtype=torch.float64)
    p = torch.distributions.Normal(mean, (log_variance / 2).exp())
    q = torch.distributions.Normal(other_mean, (other_log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(p, q)
    assert torch.allclose(gaussian_kl(mean, log_variance, other_mean, other_log_variance), expected)


@pytest.mark.parametrize("log_std", [-6.0, -3.0, 0.0])
def test_the_bins_probabilities_sum_to_one(log_std: float) -> None:
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_likelihood = discretized_log_likelihood(bins, torch.tensor(0.3), torch.tensor(log_std))
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-6)


# The hybrid loss


class Ranged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        self.place = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([self.mean * x, self.place + 0 * x], dim=1)


def test_the_bound_trains_the_variance_alone_and_the_error_the_mean_alone() -> None:
    x0, t, noise = batch()
    network = Ranged()
    losses = Objective(linear_schedule(), learned_range=True)(network, x0, t, noise)
    assert losses["vlb"].shape == losses["mse"].shape == (4,)
    of_bound = torch.autograd.grad(
        losses["vlb"].sum(), [network.mean, network.place], retain_graph=True, allow_unused=True
    )
    of_error = torch.autograd.grad(losses["mse"].sum(), [network.mean, network.place], allow_unused=True)
    assert of_bound[0] is None or of_bound[0] == 0
    assert of_bound[1] != 0
    assert of_error[0] != 0
    assert of_error[1] is None or of_error[1] == 0


def test_the_bound_is_scaled_to_a_thousand_steps() -> None:
    short = DiscreteSchedule(torch.linspace(1e-3, 0.2, 100))
    x0, t, noise = batch()
    t, network = t % 99 + 1, Ranged()
    loss = Objective(short, learned_range=True)(network, x0, t, noise)["vlb"]
    x_t = add_noise(short, x0, t, noise)
    bound = variational_bound(short, x0, x_t, t, NetworkDenoiser(network, short, learned_range=True)(x_t, t))
    assert torch.allclose(loss, bound / 10)


# Timesteps


def test_uniform_timesteps_cover_the_schedule() -> None:
    t, weights = UniformTimes(cosine_schedule(10)).sample(10_000, torch.Generator().manual_seed(0))
    assert t.bincount(minlength=10).min() > 850
    assert weights.eq(1).all()
    times, _ = UniformTimes(FlowSchedule()).sample(10_000, torch.Generator().manual_seed(0))
    assert times.mean().item() == pytest.approx(0.5, abs=0.02)


def test_timesteps_are_uniform_until_all_are_known() -> None:
    sampler = LossSecondMoment(4, history=2)
    sampler.update(torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.arange(7.0))
    assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25))
    sampler.update(torch.tensor([3]), torch.tensor([1.0]))
    assert not torch.equal(sampler.probabilities(), torch.full((4,), 0.25))


def test_timesteps_follow_the_second_moment_of_the_last_losses() -> None:
    sampler = LossSecondMoment(3, history=2, uniform=0.1)
    for t, loss in [(0, 9.0), (0, 1.0), (0, 3.0), (1, 0.0), (1, 0.0), (2, 2.0), (2, 2.0)]:
        sampler.update(torch.tensor([t]), torch.tensor([loss]))
    root = torch.tensor([math.sqrt((1 + 9) / 2), 0.0, 2.0])
    assert torch.allclose(sampler.probabilities(), 0.9 * root / root.sum() + 0.1 / 3)
    batched = LossSecondMoment(3, history=2, uniform=0.1)
    batched.update(torch.tensor([0, 0, 1, 2]), torch.tensor([9.0, 1.0, 0.0, 2.0]))
    batched.update(torch.tensor([2, 0, 1]), torch.tensor([2.0, 3.0, 0.0]))
    assert torch.allclose(batched.probabilities(), sampler.probabilities())


def test_weights_keep_the_expectation_uniform() -> None:
    sampler = LossSecondMoment(5, history=1, uniform=0.05)
    losses = torch.tensor([0.1, 1.0, 4.0, 0.5, 2.0])
    sampler.update(torch.arange(5), losses)
    t, weights = sampler.sample(100_000, torch.Generator().manual_seed(0))
    assert torch.allclose(t.bincount() / len(t), sampler.probabilities(), atol=0.01)
    assert (weights * losses[t]).mean().item() == pytest.approx(losses.mean().item(), rel=0.01)


def test_what_the_sampler_learned_is_in_its_checkpoint() -> None:
    sampler, restored = LossSecondMoment(3, history=1), LossSecondMoment(3, history=1)
    sampler.update(torch.arange(3), torch.tensor([1.0, 2.0, 3.0]))
    restored.load_state_dict(sampler.state_dict())
    generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    assert torch.equal(sampler.sample(8, generators[0])[0], restored.sample(8, generators[1])[0])
