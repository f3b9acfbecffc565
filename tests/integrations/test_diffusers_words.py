"""diffusers' UNets that attend to words still give the numbers that ours are held to."""

import pytest
import torch

from tests.parity import arrays, distance
from tests.parity.conditional_unets import IDS, NAME, SAME, clip_text_tower, inputs, outputs, theirs

pytest.importorskip("diffusers")


@pytest.mark.parametrize("kind", SAME)
def test_stored_numbers_are_still_those_of_diffusers(kind: str) -> None:
    network, reference = theirs(kind), arrays(NAME)
    for name, value in outputs(network, inputs(SAME[kind][0]["in_channels"])).items():
        assert distance(value, reference[f"{kind}_{name}"]) < 1e-5


@torch.no_grad()
def test_stored_numbers_are_still_those_of_clip() -> None:
    pytest.importorskip("transformers")
    out = clip_text_tower()(torch.tensor(IDS)).last_hidden_state
    assert distance(out, arrays(NAME)["clip"]) < 1e-5
