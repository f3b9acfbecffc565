"""Group norm on every device: torch's values and gradients, exact far from zero on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffperception.models.ops.normalization import group_norm
from tests.helpers.devices import Device


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_group_norm_and_its_gradient_are_torchs(memory_format: torch.memory_format) -> None:
    norm = nn.GroupNorm(4, 8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    scale, shift = torch.randn(2, 2, 8, dtype=torch.float64, requires_grad=True)
    inputs, weights = [x, scale, shift, *norm.parameters()], torch.randn(2, 8, 3, 5, dtype=torch.float64)
    expected = F.group_norm(x, 4, norm.weight, norm.bias) * (1 + scale[..., None, None]) + shift[..., None, None]
    ours = group_norm(norm, x, scale, shift)
    assert torch.allclose(ours, expected)
    assert torch.allclose(group_norm(norm, x), norm(x))
    for one, other in ((ours, expected), (group_norm(norm, x, scale, shift, activate=True), F.silu(expected))):
        gradients = (torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True) for y in (one, other))
        assert torch.allclose(one, other)
        assert all(map(torch.allclose, *gradients))


def test_group_norm_is_exact_far_from_zero() -> None:
    x = (torch.randn(2, 32, 64, 64) + 30).contiguous(memory_format=torch.channels_last)
    norm = nn.GroupNorm(32, 32)
    assert torch.allclose(group_norm(norm, x).double(), F.group_norm(x.double(), 32), atol=2e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_every_device_computes_the_same(
    device: Device, memory_format: torch.memory_format, activate: bool, modulated: bool
) -> None:
    """The way of GPUs and that of the CPU, with and without a scale and a shift; and their gradients."""
    torch.manual_seed(0)
    norm, x = nn.GroupNorm(4, 8), torch.randn(2, 8, 3, 5).contiguous(memory_format=memory_format).requires_grad_()
    scale, shift = torch.randn(2, 2, 8) if modulated else (None, None)
    expected = F.group_norm(x, 4, eps=norm.eps)
    if scale is not None and shift is not None:
        expected = expected * (1 + scale[..., None, None]) + shift[..., None, None]
    expected = F.silu(expected) if activate else expected
    (of_x,) = torch.autograd.grad(expected.square().sum(), x)
    norm, moved, scale, shift = device.move((norm, x.detach(), scale, shift))
    moved.requires_grad_()
    out = group_norm(norm, moved, scale, shift, activate)
    (gradient,) = torch.autograd.grad(out.square().sum(), moved)
    assert not device.waits, device.report()
    torch.testing.assert_close(device.host(out), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(device.host(gradient), of_x, atol=1e-4, rtol=1e-4)
