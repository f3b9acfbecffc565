"""The conventions that a checkpoint does not tell are found by denoising a picture."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffperception.diffusion import Objective, named_schedule
from diffperception.models import DiffusionModel, UNet
from diffperception.models.convert import trial
from diffperception.models.convert.trial import (
    CLEARLY,
    NOISE_LEVELS,
    changed_options,
    denoising_errors,
    try_conventions,
)

NAMES = [
    (r"^stem\.", "input_blocks.0.0."),
    (r"^encoder\.(\d+)", lambda found: f"input_blocks.{int(found[1]) + 1}"),
    (r"^middle\.", "middle_block."),
    (r"^decoder\.", "output_blocks."),
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.skip\.", ".skip_connection."),
    (r"\.out\.", ".proj_out."),
    (r"^out_norm\.", "out.0."),
    (r"^out_conv\.", "out.2."),
]
TRUE: dict[str, Any] = {
    "image_size": 8,
    "schedule": "cosine",
    "num_timesteps": 4000,
    "rescale_timesteps": True,
    "prediction": "eps",
    "num_heads": 1,
}


def as_reference(network: UNet) -> dict[str, Tensor]:
    """The weights of a network with one attention head, as improved-diffusion names and shapes them."""
    state = {}
    for name, value in network.state_dict().items():
        for pattern, theirs in NAMES:
            name = re.sub(pattern, theirs, name)
        state[name] = value[..., None] if name.endswith(("qkv.weight", "proj_out.weight")) else value
    return state


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "FEWEST_VALUES", 2**11)


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """(1, 3, 8, 8): black and white grains."""
    return torch.randint(0, 2, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()


@pytest.fixture(scope="module")
def checkpoint(picture: Tensor) -> dict[str, Tensor]:
    """Of a network that has learned to denoise the picture, told times as improved-diffusion tells them."""
    torch.manual_seed(0)
    network = UNet(channels=32, channel_mult=[1], num_res_blocks=1, attention=[1], num_heads=1).train()
    schedule = named_schedule("cosine", 4000, rescale_timesteps=True)
    objective = Objective(schedule, "eps")
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    for step in range(120):
        t, noise = torch.randint(4000, (16,)), torch.randn(16, 3, 8, 8)
        loss = sum(
            term.mean() for term in objective(network, (2 * picture - 1).expand(16, -1, -1, -1), t, noise).values()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 120)
        optimizer.step()
    return as_reference(network)


@pytest.mark.slow
def test_the_true_conventions_fit_best(checkpoint: Mapping[str, Tensor], picture: Tensor) -> None:
    given, best = try_conventions(checkpoint, picture, TRUE)
    assert given is not None
    assert given.error < 0.9
    assert given.error <= 1.05 * best.error


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        {"rescale_timesteps": False},
        {"prediction": "x0", "schedule": "linear"},
    ],
)
def test_wrong_ones_are_told_with_what_is_better(
    checkpoint: Mapping[str, Tensor], picture: Tensor, wrong: dict[str, Any]
) -> None:
    given, best = try_conventions(checkpoint, picture, TRUE | wrong)
    assert given is not None
    assert given.error > CLEARLY * best.error
    said = changed_options(given.options, best.options)
    for name in wrong:
        assert f"--{name} {str(TRUE[name]).lower()}" in said


@pytest.mark.slow
def test_what_is_left_open_is_found(checkpoint: Mapping[str, Tensor], picture: Tensor) -> None:
    given, best = try_conventions(checkpoint, picture, TRUE | {"rescale_timesteps": None, "num_heads": None})
    assert given is None
    assert best.options["rescale_timesteps"] is True


def test_a_network_that_says_nothing_is_worse_than_a_guess(picture: Tensor) -> None:
    silent = DiffusionModel(None, UNet(channels=32, channel_mult=[1], attention=[1], num_heads=1), image_size=8)
    spread = float((2 * picture).var())
    expected = np.exp(np.mean([np.log((spread + level**2) / spread) for level in NOISE_LEVELS]))
    assert denoising_errors(silent, picture, ["eps"]) == pytest.approx([float(expected)], rel=0.1)


class Oracle(UNet):
    """Knows the picture, and believes to be told the times 0..3999 of a cosine path as 0 to 1000."""

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        path = named_schedule("cosine", 4000)
        times = (4 * t).round().long().clamp(0, 3999)
        alpha, sigma = (level(times).view(-1, 1, 1, 1) for level in (path.alpha, path.sigma))
        return ((x - alpha * self.signal) / sigma).float()


@pytest.mark.parametrize(
    ("schedule", "steps", "rescale", "fits"),
    [
        ("cosine", 4000, True, True),
        ("cosine", 1000, False, True),
        ("cosine", 4000, False, False),
        ("linear", 4000, True, False),
        ("linear", 1000, False, False),
    ],
)
def test_an_oracle_denoises_under_the_path_it_believes_in_alone(
    picture: Tensor, schedule: Any, steps: int, rescale: bool, fits: bool
) -> None:
    network = Oracle(channels=32, channel_mult=[1], attention=[1], num_heads=1)
    network.signal = 2 * picture - 1
    path: dict[str, Any] = {"schedule": schedule, "num_timesteps": steps, "rescale_timesteps": rescale}
    eps, x0, v = denoising_errors(DiffusionModel(None, network, image_size=8, **path), picture, ["eps", "x0", "v"])
    assert (eps < 0.05) == fits
    assert not fits or min(x0, v) > 5 * eps
