from functools import partial

import pytest
import torch
from torch import Tensor

from diffperception.diffusion import (
    Denoiser,
    DenoiserOutput,
    FlowSchedule,
    GuidanceRescale,
    NetworkDenoiser,
    Prediction,
    Schedule,
    VarianceExploding,
    classifier_free_guidance,
    classifier_guidance,
    clip,
    cosine_schedule,
    sample_heun,
    threshold,
)
from tests.diffusion.gaussian_mixture import Mixture

SCHEDULES = [cosine_schedule(), VarianceExploding(), FlowSchedule()]
TIMES = map(torch.tensor, ([10, 400, 800], [0.1, 1.0, 5.0], [0.1, 0.5, 0.9]))
PATHS = list(zip(SCHEDULES, TIMES, strict=True))


def component(mixture: Mixture, k: int) -> Mixture:
    return Mixture(mixture.means[k : k + 1], mixture.stds[k : k + 1], torch.ones(1, dtype=torch.float64))


def log_class(mixture: Mixture, schedule: Schedule, k: int, x: Tensor, t: Tensor) -> Tensor:
    return mixture.log_joint(schedule, x, t).log_softmax(1)[:, k]


@pytest.mark.parametrize(("schedule", "t"), PATHS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_true_classifier_makes_the_denoiser_of_its_class(
    mixture: Mixture, schedule: Schedule, t: Tensor, mode: type
) -> None:
    """Bayes: the score of p(x | y) is that of p(x) plus that of p(y | x)."""
    with mode():
        x = torch.randn(3, 1, dtype=torch.float64)
        guided = classifier_guidance(
            partial(mixture.denoise, schedule), partial(log_class, mixture, schedule, 2), schedule, 1.0
        )
        expected = component(mixture, 2).denoise(schedule, x, t).x0
        assert torch.allclose(guided(x, t).x0, expected, atol=1e-8)


def test_guided_samples_are_of_the_class(mixture: Mixture) -> None:
    schedule = cosine_schedule()
    grid = schedule.timesteps(VarianceExploding(lowest=0.01).grid(40))
    guided = classifier_guidance(
        partial(mixture.denoise, schedule), partial(log_class, mixture, schedule, 0), schedule, 1.0
    )
    samples = sample_heun(guided, schedule, component(mixture, 0).start(schedule, grid[0], 5000), grid)
    assert component(mixture, 0).distance(samples) < 0.03


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_noise_alone_is_not_guided(mixture: Mixture, weight: float) -> None:
    """At the straight path's start alpha is 0: x_t says nothing of the class, and sigma^2 / alpha is infinite."""
    x, t = torch.randn(3, 1, dtype=torch.float64), torch.ones(3)
    own: Denoiser = partial(mixture.denoise, FlowSchedule())
    guided = classifier_guidance(own, partial(log_class, mixture, FlowSchedule(), 1), FlowSchedule(), weight)
    assert torch.equal(guided(x, t).x0, own(x, t).x0)


@pytest.mark.parametrize(("schedule", "t"), PATHS)
def test_both_guidances_are_one_at_the_true_classifier(mixture: Mixture, schedule: Schedule, t: Tensor) -> None:
    x, weight = torch.randn(3, 1, dtype=torch.float64), 2.5
    unconditional: Denoiser = partial(mixture.denoise, schedule)
    free = classifier_free_guidance(partial(component(mixture, 1).denoise, schedule), unconditional, weight)
    classified = classifier_guidance(unconditional, partial(log_class, mixture, schedule, 1), schedule, weight)
    assert torch.allclose(free(x, t).x0, classified(x, t).x0, atol=1e-8)


def test_weights_of_zero_and_one_choose_a_denoiser() -> None:
    yes, no = torch.randn(2, 2, 3)
    learned = torch.zeros(2, 3)
    for weight, expected in ((0.0, no), (1.0, yes)):
        guided = classifier_free_guidance(
            lambda x, t: DenoiserOutput(yes, learned), lambda x, t: DenoiserOutput(no), weight
        )
        output = guided(yes, torch.zeros(2))
        assert torch.equal(output.x0, expected)
        assert output.variance_range is learned


def test_clipping_keeps_the_signal_in_range() -> None:
    clipped = clip(lambda x, t: DenoiserOutput(x, x), -0.5, 0.7)(torch.tensor([[-2.0, 0.1, 2.0]]), torch.zeros(1))
    assert torch.equal(clipped.x0, torch.tensor([[-0.5, 0.1, 0.7]]))
    assert clipped.variance_range is not None
    assert clipped.variance_range.max() == 2


def constant(value: Tensor) -> Denoiser:
    return lambda x_t, t: DenoiserOutput(value.to(x_t))


def test_thresholding_is_imagens() -> None:
    """Section 2.3 of arXiv 2205.11487, sample by sample."""
    x0 = torch.stack([torch.linspace(-4, 4, 101), torch.linspace(-0.5, 0.9, 101)])
    found = threshold(constant(x0), 0.9)(torch.zeros(2, 101), torch.zeros(2)).x0
    limit = x0[0].abs().quantile(0.9)
    assert limit == pytest.approx(3.6)
    torch.testing.assert_close(found[0], x0[0].clamp(-limit, limit) / limit)
    torch.testing.assert_close(found[1], x0[1])


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_rescaled_guidance_is_that_of_the_networks_own_prediction(kind: Prediction) -> None:
    """Equations 15 and 16 of arXiv 2305.08891, as diffusers' rescale_noise_cfg has them."""
    torch.manual_seed(0)
    schedule = FlowSchedule() if kind == "flow" else cosine_schedule()
    t = torch.tensor([0.3, 0.6] if kind == "flow" else [200, 600])
    x, plain, without = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    with_words, nothing = (NetworkDenoiser(lambda *_, value=value: value, schedule, kind) for value in (plain, without))
    guided = without + 5 * (plain - without)
    std = plain.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    expected = 0.7 * guided * std + 0.3 * guided
    rescale = GuidanceRescale(0.7, schedule, kind)
    found = classifier_free_guidance(with_words, nothing, 5.0, rescale)(x, t).x0
    wanted = NetworkDenoiser(lambda *_: expected, schedule, kind)(x, t).x0
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
