"""UNets that attend to words: the numbers of diffusers' UNet2DConditionModel, and what words do and do not change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffperception.models import Condition, UNet
from diffperception.models.convert.unet2d import assign_theirs, to_theirs, unet_config
from tests.helpers.networks import tiny_unet
from tests.parity import arrays, distance, fill_state
from tests.parity.conditional_unets import NAME, SAME, inputs, ours

KINDS = ("added", "transformer")


def said(batch: int = 2, words: int = 5, **more: Any) -> Condition:
    return Condition(tokens=torch.randn(batch, words, 12), **more)


def network(kind: str, **changes: Any) -> UNet:
    return tiny_unet(context=12, attention_kind=kind, attention=(2, 4), **changes)


@torch.no_grad()
@pytest.mark.parametrize("kind", SAME)
def test_outputs_are_those_of_diffusers(kind: str) -> None:
    unet, reference = ours(kind), arrays(NAME)
    weights = fill_state({name: tuple(value.shape) for name, value in to_theirs(unet, unet.state_dict())})
    assign_theirs(unet, weights, False, Path(kind))
    given = inputs(unet.in_channels)
    for name, mask in (("all", None), ("counted", given["mask"])):
        out = unet(given["x"], given["t"], Condition(tokens=given["tokens"], mask=mask))
        assert distance(out, reference[f"{kind}_{name}"]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_part_in_the_output(kind: str) -> None:
    unet = network(kind)
    condition = said(vector=torch.randn(2, unet.embedding))
    unet(torch.randn(2, 3, 8, 12), torch.tensor([1, 900]), condition).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in unet.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_words_that_do_not_count_and_those_of_other_images_change_nothing(kind: str) -> None:
    unet, x, t = network(kind), torch.randn(2, 3, 8, 8), torch.tensor([10, 700])
    condition = said(mask=torch.tensor([[True, True, False, False, False], [True] * 5]))
    assert condition.tokens is not None
    out = unet(x, t, condition)
    changed = condition.tokens.clone()
    changed[0, 2:] += 1
    torch.testing.assert_close(unet(x, t, Condition(tokens=changed, mask=condition.mask)), out)
    first = Condition(tokens=condition.tokens[:1, :2])
    torch.testing.assert_close(unet(x[:1], t[:1], first), out[:1], atol=1e-5, rtol=1e-5)
    changed[0, 1] += 1
    again = unet(x, t, Condition(tokens=changed, mask=condition.mask))
    assert (again[0] - out[0]).abs().max() > 1e-3
    torch.testing.assert_close(again[1], out[1])


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_give_the_same_gradients(kind: str) -> None:
    x, t, gradients = torch.randn(2, 3, 8, 8), torch.tensor([10, 700]), []
    condition = said(mask=torch.tensor([[True, False, False, False, True], [True] * 5]))
    for checkpointing in (False, True):
        unet = network(kind, checkpointing=checkpointing)
        unet(x, t, condition).square().sum().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 700])
    for unet, condition, complaint in (
        (network("added"), None, "takes tokens 12 wide, as its context says, and is told none"),
        (network("transformer"), Condition(tokens=torch.randn(2, 3, 16)), "is told some 16 wide"),
        (tiny_unet(), said(), "takes no tokens, and is told some 12 wide"),
    ):
        with pytest.raises(ValueError, match=complaint):
            unet(x, t, condition)
    with pytest.raises(ValueError, match="give context"):
        tiny_unet(attention_kind="transformer")
    with pytest.raises(ValueError, match="context must be above 0"):
        tiny_unet(context=0)
    with pytest.raises(ValueError, match="cannot say context = 12"):
        unet_config(network("transformer"))


@torch.no_grad()
def test_a_new_network_knows_no_words_yet() -> None:
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([10])
    for kind in KINDS:
        options: dict[str, Any] = {"context": 12, "attention_kind": kind}
        unet = UNet(channels=32, channel_mult=(1, 1), attention=(2,), num_head_channels=16, **options)
        torch.nn.init.normal_(unet.out_conv.weight)
        outs: list[Tensor] = [unet(x, t, said(1)) for _ in range(2)]
        assert torch.equal(*outs)
