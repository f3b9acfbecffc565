"""The paths and predictions that configurations of diffusers' schedulers say, and the configurations that say ours."""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from diffperception.diffusion import named_schedule
from diffperception.diffusion.schedule import beta_bounds
from diffperception.models.convert.unet2d import LARGEST, as_json, is_number

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
# Options that change a path or its times, with the values alone that paths of ours have: straight ones, those of betas.
_FIXED_OF_FLOW = {"num_train_timesteps": 1000, "invert_sigmas": False}
_FIXED_OF_BETAS = {"timestep_type": "discrete", "use_flow_sigmas": False, "snr_shift_scale": 1}
HIGHEST_BETA = 1 - 1e-9  # stands for 1, the last one of a path that ends in noise alone


def path_arguments(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a generator for a scheduler: schedule, prediction, and what belongs to them.

    How it samples (spacing, clipping, the shift of flow matching) is no part of a generator.

    Raises:
        ValueError: the path is of another kind; it names the option and its value.
    """
    steps, prediction = scheduler.get("num_train_timesteps", 1000), scheduler.get("prediction_type", "epsilon")
    is_flow = "FlowMatch" in str(scheduler.get("_class_name")) or prediction == "flow_prediction"
    for name, value in (_FIXED_OF_FLOW if is_flow else _FIXED_OF_BETAS).items():
        if scheduler.get(name, value) != value:
            _refuse(scheduler, name, as_json(value))
    if is_flow:
        return {"schedule": "flow", "prediction": "flow"}
    if prediction not in PREDICTIONS.values():
        _refuse(scheduler, "prediction_type", _listed(PREDICTIONS))
    if not isinstance(steps, int) or not is_number(steps) or steps < 1:
        _refuse(scheduler, "num_train_timesteps", f"whole numbers from 1 to {LARGEST}")
    path = _beta_arguments(scheduler, steps)
    if scheduler.get("rescale_betas_zero_snr"):
        path = {"schedule": "betas", "betas": _ending_in_noise({"num_timesteps": steps, **path})}
    return {"num_timesteps": steps, **path, "prediction": _ours(PREDICTIONS, prediction)}


def scheduler_config(arguments: Mapping[str, Any], learned_range: bool) -> dict[str, Any]:
    """The class and options of the scheduler for a generator with such arguments."""
    name, steps = arguments["schedule"], arguments["num_timesteps"]
    if name == "flow":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    if name == "sub_vp":
        raise ValueError(
            "diffusers has no scheduler for the schedule sub_vp: train with another to use the model there"
        )
    path: dict[str, Any] = {"trained_betas": arguments["betas"]}
    if name in SCHEDULES:
        path = {"beta_schedule": SCHEDULES[name]}
    if name in ("linear", "scaled_linear"):
        bounds = beta_bounds(steps, arguments["beta_start"], arguments["beta_end"])
        path |= dict(zip(("beta_start", "beta_end"), bounds, strict=True))
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        **path,
        "prediction_type": PREDICTIONS[arguments["prediction"]],
        "variance_type": "learned_range" if learned_range else "fixed_small",
        "clip_sample": True,
        "timestep_spacing": "trailing",
    }


def _beta_arguments(scheduler: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The schedule's name and what belongs to it."""
    betas, theirs = scheduler.get("trained_betas"), scheduler.get("beta_schedule")
    if betas is None and theirs is None:
        name = scheduler.get("_class_name")
        raise ValueError(f"{name} has no beta_schedule: schedulers of discrete betas, as DDPMScheduler, are read")
    if betas is not None:
        if not isinstance(betas, list) or not betas or not all(map(is_number, betas)):
            _refuse(scheduler, "trained_betas", "a list of numbers")
        return {"schedule": "betas", "betas": betas, "num_timesteps": len(betas)}
    start, end = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    for name, value in {"beta_start": start, "beta_end": end}.items():
        if not is_number(value):
            _refuse(scheduler, name, "numbers")
    if theirs == "sigmoid":  # GeoDiff's (arXiv 2203.02923)
        betas = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start
        return {"schedule": "betas", "betas": betas.tolist()}
    if theirs not in SCHEDULES.values():
        _refuse(scheduler, "beta_schedule", f'{_listed(SCHEDULES)}, "sigmoid", or numbers as trained_betas')
    name = _ours(SCHEDULES, theirs)
    is_cosine = theirs == "squaredcos_cap_v2"
    if is_cosine or (steps > 20 and (start, end) == beta_bounds(steps)):
        return {"schedule": name}
    return {"schedule": name, "beta_start": start, "beta_end": end}


def _ending_in_noise(path: Mapping[str, Any]) -> list[float]:
    """The betas of a path that is stretched so that nothing of the signal is left (arXiv 2305.08891, algorithm 1)."""
    options = {name: value for name, value in path.items() if name != "schedule"}
    alphas = named_schedule(path["schedule"], **options).alpha(torch.arange(path["num_timesteps"]))
    stretched = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    before = torch.cat([stretched.new_ones(1), stretched[:-1]])
    return (1 - (stretched / before).square()).clamp(max=HIGHEST_BETA).tolist()


def _ours(names: Mapping[str, str], theirs: object) -> str:
    return next(ours for ours, name in names.items() if name == theirs)


def _listed(names: Mapping[str, str]) -> str:
    return ", ".join(map(as_json, names.values()))


def _refuse(scheduler: Mapping[str, Any], name: str, known: str) -> NoReturn:
    raise ValueError(f"the scheduler's {name} = {as_json(scheduler[name])} is not ours, only {known}")
