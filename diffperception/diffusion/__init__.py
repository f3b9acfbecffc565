"""The diffusion core: schedules, parameterisations and sampling for any tensor with a leading batch axis."""

from diffperception.diffusion.parameterization import Prediction, scale, target, to_eps, to_x0
from diffperception.diffusion.sampling import Spacing, add_noise, ddim_step, posterior_std, timestep_grid
from diffperception.diffusion.schedule import (
    DiscreteSchedule,
    Schedule,
    StraightPath,
    Time,
    VarianceExploding,
    cosine_schedule,
    linear_schedule,
)

__all__ = [
    "DiscreteSchedule",
    "Prediction",
    "Schedule",
    "Spacing",
    "StraightPath",
    "Time",
    "VarianceExploding",
    "add_noise",
    "cosine_schedule",
    "ddim_step",
    "linear_schedule",
    "posterior_std",
    "scale",
    "target",
    "timestep_grid",
    "to_eps",
    "to_x0",
]
