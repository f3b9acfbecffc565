"""The diffusion core: schedules, parameterisations, sampling, losses and guidance for any tensor with a batch axis."""

from diffperception.diffusion.denoiser import (
    Denoiser,
    DenoiserOutput,
    GuidanceRescale,
    Network,
    NetworkDenoiser,
    classifier_free_guidance,
    classifier_guidance,
    clip,
    denoise_at,
    threshold,
)
from diffperception.diffusion.likelihood import log_density
from diffperception.diffusion.noise import NoiseFn, SampleNoise, derive_seed, name_seed, sample_seed, spread_noise
from diffperception.diffusion.objective import LossSecondMoment, Objective, UniformTimes, variational_bound
from diffperception.diffusion.prediction import Prediction, target, to_eps, to_x0
from diffperception.diffusion.repaint import sample_repaint
from diffperception.diffusion.samplers import (
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    sample_predictor_corrector,
)
from diffperception.diffusion.schedule import (
    DiscreteSchedule,
    FlowSchedule,
    Schedule,
    ScheduleName,
    Spacing,
    SubVariancePreserving,
    Time,
    VarianceExploding,
    cosine_schedule,
    linear_schedule,
    named_schedule,
    scaled_linear_schedule,
)
from diffperception.diffusion.steps import (
    add_noise,
    ddim_step,
    heun_step,
    langevin_step,
    learned_log_variance,
    noise_further,
    posterior_log_variance,
    posterior_mean,
    posterior_std,
    reverse_diffusion_step,
    second_order_x0,
)
