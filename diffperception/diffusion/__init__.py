"""The diffusion core: schedules, parameterisations, sampling, losses and guidance for any tensor with a batch axis."""

from diffperception.diffusion.denoiser import Denoiser, Estimate, Network, NetworkDenoiser, clip
from diffperception.diffusion.guidance import classifier_free_guidance, classifier_guidance
from diffperception.diffusion.noise import SampleNoise, sample_seed
from diffperception.diffusion.objective import (
    LossSecondMoment,
    Objective,
    TimeSampler,
    UniformTimes,
    UniformTimesteps,
    variational_bound,
)
from diffperception.diffusion.parameterization import Prediction, scale, target, to_eps, to_x0, x0_gain
from diffperception.diffusion.posterior import (
    learned_log_variance,
    posterior_log_variance,
    posterior_mean,
    posterior_std,
)
from diffperception.diffusion.samplers import Draw, sample_ddim, sample_ddpm, sample_dpm_solver, sample_heun
from diffperception.diffusion.sampling import (
    Spacing,
    add_noise,
    ddim_step,
    heun_step,
    nearest_times,
    noise_level_grid,
    second_order_x0,
    timestep_grid,
)
from diffperception.diffusion.schedule import (
    DiscreteSchedule,
    Schedule,
    ScheduleName,
    StraightPath,
    Time,
    VarianceExploding,
    cosine_schedule,
    linear_schedule,
    named_schedule,
)

__all__ = [
    "Denoiser",
    "DiscreteSchedule",
    "Draw",
    "Estimate",
    "LossSecondMoment",
    "Network",
    "NetworkDenoiser",
    "Objective",
    "Prediction",
    "SampleNoise",
    "Schedule",
    "ScheduleName",
    "Spacing",
    "StraightPath",
    "Time",
    "TimeSampler",
    "UniformTimes",
    "UniformTimesteps",
    "VarianceExploding",
    "add_noise",
    "classifier_free_guidance",
    "classifier_guidance",
    "clip",
    "cosine_schedule",
    "ddim_step",
    "heun_step",
    "learned_log_variance",
    "linear_schedule",
    "named_schedule",
    "nearest_times",
    "noise_level_grid",
    "posterior_log_variance",
    "posterior_mean",
    "posterior_std",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpm_solver",
    "sample_heun",
    "sample_seed",
    "scale",
    "second_order_x0",
    "target",
    "timestep_grid",
    "to_eps",
    "to_x0",
    "variational_bound",
    "x0_gain",
]
