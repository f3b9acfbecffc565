from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffperception.diffusion import (
    Denoiser,
    DenoiserOutput,
    DiscreteSchedule,
    FlowSchedule,
    Schedule,
    SubVariancePreserving,
    VarianceExploding,
    cosine_schedule,
    langevin_step,
    linear_schedule,
    posterior_std,
    reverse_diffusion_step,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    sample_predictor_corrector,
    to_x0,
)
from tests.diffusion.gaussian_mixture import Mixture

Loop = Callable[[Denoiser, Schedule, Tensor, Tensor], Tensor]


PATHS: list[tuple[Schedule, Callable[[int], Tensor]]] = [
    (cosine_schedule(), lambda steps: cosine_schedule().timesteps(VarianceExploding(lowest=0.01).grid(steps))),
    (VarianceExploding(), VarianceExploding().grid),
    (FlowSchedule(), FlowSchedule().grid),
    (SubVariancePreserving(), SubVariancePreserving().even_grid),
]
PATH_NAMES = ["cosine", "exploding", "flow", "sub-vp"]
DETERMINISTIC: list[tuple[Loop, int]] = [(sample_ddim, 1), (sample_dpm_solver, 2), (sample_heun, 2)]


@pytest.mark.parametrize(("schedule", "grid"), PATHS, ids=PATH_NAMES)
@pytest.mark.parametrize(
    ("loop", "steps"),
    [
        (sample_ddim, 100),
        (partial(sample_ddim, eta=0.5), 200),
        (partial(sample_ddim, eta=1.0), 200),
        (sample_ddpm, 200),
        (sample_dpm_solver, 25),
        (sample_heun, 25),
    ],
    ids=["ddim", "eta-half", "eta-one", "ddpm", "dpm-solver", "heun"],
)
def test_every_sampler_reaches_the_distribution(
    mixture: Mixture, schedule: Schedule, grid: Callable[[int], Tensor], loop: Loop, steps: int
) -> None:
    torch.manual_seed(0)
    times, count = grid(steps), 10_000
    start = mixture.start(schedule, times[0], count)
    samples = loop(partial(mixture.denoise, schedule), schedule, start, times)
    # A perfect sampler exceeds 0.022 once in ten thousand times; the rest is left to the finite number of steps.
    assert mixture.distance(samples) < 0.03


@pytest.mark.parametrize(("loop", "order"), DETERMINISTIC, ids=["ddim", "dpm-solver", "heun"])
@pytest.mark.parametrize(
    "path", [VarianceExploding(), FlowSchedule(), linear_schedule(20_000)], ids=["exploding", "flow", "linear"]
)
def test_errors_fall_at_the_claimed_order(mixture: Mixture, path: Schedule, loop: Loop, order: int) -> None:
    """Twice the steps, error / 2^order, against the same equation solved with many more."""

    def grid(steps: int) -> Tensor:
        # Ends before the clean end: a first-order last step there would hide the order of the others.
        levels = VarianceExploding(lowest=0.02, highest=20).grid(steps + 1)[:-1]
        if isinstance(path, DiscreteSchedule):
            return path.timesteps(torch.cat([levels, levels.new_zeros(1)]))[:-1]
        return levels if isinstance(path, VarianceExploding) else levels / (1 + levels)

    denoiser = partial(mixture.denoise, path)
    start = mixture.start(path, grid(1)[0], 300)
    exact = sample_heun(denoiser, path, start, grid(512))
    errors = [(loop(denoiser, path, start, grid(n)) - exact).abs().mean().item() for n in (64, 128)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize(("schedule", "grid"), PATHS, ids=PATH_NAMES)
def test_the_predictor_corrector_reaches_the_distribution(
    mixture: Mixture, schedule: Schedule, grid: Callable[[int], Tensor]
) -> None:
    """Of samples of many entries, as images have: the corrector's step hangs on the length of a sample's score."""
    torch.manual_seed(0)
    times = grid(200)

    def denoise(x: Tensor, t: Tensor) -> DenoiserOutput:
        x0 = mixture.denoise(schedule, x.reshape(-1, 1), t.repeat_interleave(x.shape[1])).x0
        return DenoiserOutput(x0.view_as(x))

    start = mixture.start(schedule, times[0], 10_000).view(20, 500)
    assert mixture.distance(sample_predictor_corrector(denoise, schedule, start, times)) < 0.03


@pytest.mark.parametrize("schedule", [cosine_schedule(), SubVariancePreserving()], ids=["cosine", "sub-vp"])
def test_the_corrector_keeps_a_gaussian_and_widens_what_is_too_narrow(schedule: Schedule) -> None:
    """Langevin dynamics alone, at one time: samples of the right distribution stay, others come to it."""
    t, s2 = (torch.tensor(400) if isinstance(schedule, DiscreteSchedule) else torch.tensor(0.3)), 0.3**2
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    std = float((alpha**2 * s2 + sigma**2).sqrt())
    torch.manual_seed(0)
    for start, tolerance in ((std, 0.02), (0.3 * std, 0.05)):
        x = start * torch.randn(100, 400, dtype=torch.float64)
        for _ in range(60 if start < std else 5):
            x = langevin_step(schedule, x, alpha * s2 / std**2 * x, t, 0.16, torch.randn_like(x))
        # The step size of the paper leaves a little too much: 1 / (1 - step / 2) of the variance.
        assert x.std().item() == pytest.approx(std, rel=tolerance)


PREDICTIONS = Path(__file__).parents[1] / "parity" / "score_sde_ve.npz"


def test_predictor_and_corrector_are_those_of_diffusers() -> None:
    """Against what diffusers' ScoreSdeVeScheduler has made of the same samples, scores and noise."""
    stored = {name: torch.from_numpy(value) for name, value in np.load(PREDICTIONS).items()}
    path, (t, s) = VarianceExploding(), stored["sigmas"]
    x0 = stored["sample"] + t**2 * stored["score"]
    predicted = reverse_diffusion_step(path, stored["sample"], x0, t, s, stored["noise"])
    torch.testing.assert_close(predicted, stored["predicted"], rtol=1e-5, atol=1e-5)
    corrected = langevin_step(path, stored["sample"], x0, t, 0.15, stored["noise"])
    torch.testing.assert_close(corrected, stored["corrected"], rtol=1e-5, atol=1e-5)
    last = reverse_diffusion_step(path, stored["sample"], x0, t, 0.0, stored["noise"])
    torch.testing.assert_close(last, x0, rtol=1e-5, atol=1e-5)


def sine(x: Tensor, t: int) -> Tensor:
    return torch.sin(3 * x) + t / 1000


def test_dpm_solver_is_diffusers() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear", solver_order=2, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(20)
    grid = torch.cat([scheduler.timesteps, torch.tensor([-1])])
    x = start = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(sine(x, t), t, x).prev_sample
    schedule = linear_schedule()

    def denoiser(x: Tensor, t: Tensor) -> DenoiserOutput:
        return DenoiserOutput(to_x0("eps", sine(x, int(t[0])), x, schedule.alpha(t), schedule.sigma(t)))

    assert torch.allclose(sample_dpm_solver(denoiser, schedule, start, grid), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", [-1.0, 0.3, 1.0])
def test_learned_variance_is_what_ancestral_sampling_draws_with(place: float) -> None:
    """Known signal, two steps of a chain: the spread of the first is the learned one, and the last adds none."""
    schedule, grid = cosine_schedule(), torch.tensor([600, 400, -1])
    seen: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor) -> DenoiserOutput:
        seen.append(x)
        return DenoiserOutput(torch.full_like(x, 0.5), torch.full_like(x, place))

    samples = sample_ddpm(denoiser, schedule, torch.zeros(100_000, 1), grid)
    lower = posterior_std(schedule, 600, 400).square()
    upper = 1 - (schedule.alpha(600) / schedule.alpha(400)).square()
    expected = lower ** ((1 - place) / 2) * upper ** ((1 + place) / 2)
    assert seen[1].var().item() == pytest.approx(expected.item(), rel=0.02)
    assert torch.allclose(samples, torch.tensor(0.5))


@pytest.mark.parametrize("loop", [sample_ddim, sample_ddpm, sample_dpm_solver, sample_heun, sample_predictor_corrector])
@pytest.mark.parametrize("steps", [1, 2])
def test_samplers_keep_no_graph_and_take_few_steps(loop: Loop, steps: int) -> None:
    weight = torch.ones(1, requires_grad=True)
    grid = linear_schedule().grid(steps, "trailing")
    x = loop(lambda x, t: DenoiserOutput(weight.expand_as(x)), cosine_schedule(), torch.randn(2, 3), grid)
    assert not x.requires_grad
    assert torch.equal(x, torch.ones(2, 3))


@pytest.mark.parametrize("loop", [partial(sample_ddim, eta=1.0), sample_ddpm, sample_predictor_corrector])
def test_samples_of_own_noise_do_not_depend_on_the_batch(mixture: Mixture, loop: Callable[..., Tensor]) -> None:
    schedule, grid = cosine_schedule(), linear_schedule().grid(5, "trailing")
    denoiser, start = partial(mixture.denoise, schedule), mixture.start(schedule, torch.tensor(999), 3)

    def draw_from(seeds: list[int]) -> Callable[[Tensor], Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return lambda x: torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in generators])

    together = loop(denoiser, schedule, start, grid, draw=draw_from([0, 1, 2]))
    for i in range(3):
        assert torch.equal(loop(denoiser, schedule, start[i : i + 1], grid, draw=draw_from([i])), together[i : i + 1])


def test_noise_levels_are_the_papers() -> None:
    grid = VarianceExploding().grid(18)
    assert grid[[0, -2, -1]].tolist() == pytest.approx([80, 0.002, 0])
    assert (grid ** (1 / 7)).diff()[:-1].std() < 1e-12


def test_timesteps_find_the_schedules_own_levels() -> None:
    schedule, times = linear_schedule(), torch.tensor([999, 640, 20, 0, -1])
    assert torch.equal(schedule.timesteps(schedule.sigma(times) / schedule.alpha(times)), times)


def test_levels_closer_than_the_schedules_own_get_the_times_that_come_next() -> None:
    schedule = cosine_schedule(10)
    assert schedule.timesteps(torch.tensor([1e9, 1e8, 0.0])).tolist() == [9, 8, -1]
    assert schedule.timesteps(torch.tensor([1e-8, 1e-9, 0.0])).tolist() == [1, 0, -1]
    assert schedule.timesteps(torch.linspace(1e-3, 0, 11)).tolist() == [*range(9, -2, -1)]
    with pytest.raises(ValueError, match="at most 10 steps"):
        schedule.timesteps(torch.linspace(1, 0, 12))
