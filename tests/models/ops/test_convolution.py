import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception.models.ops.convolution import Conv1x1, Conv3x3, double, double_and_convolve
from diffperception.models.ops.winograd import winograd
from tests.helpers.devices import Device
from tests.parity import distance


def gradients(out: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), of)


# Several images in a part, one, several parts an image with a smaller last one, a single square; no two widths alike.
@pytest.mark.parametrize("shape", [(5, 3, 8, 12), (2, 4, 52, 56), (1, 2, 76, 100), (1, 1, 4, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_convolution_and_so_are_its_gradients(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(shape[1], 7, 3, padding=1)
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    exact, inputs = conv(x), [x, *conv.parameters()]
    ours = winograd(x, conv.weight, conv.bias)  # type: ignore[arg-type]
    assert distance(ours.detach(), exact.detach()) < 3e-5
    for one, other in zip(gradients(ours, inputs), gradients(exact, inputs), strict=True):
        assert distance(one, other) < 5e-5


def test_gradients_not_asked_for_are_left_out() -> None:
    x, weight, bias = torch.randn(1, 2, 8, 8, requires_grad=True), torch.randn(3, 2, 3, 3), torch.zeros(3)
    winograd(x, weight, bias).sum().backward()
    expected = F.conv_transpose2d(torch.ones(1, 3, 8, 8), weight, padding=1)
    assert torch.allclose(x.grad, expected, atol=1e-4)  # type: ignore[arg-type]
    winograd(x.detach(), weight.requires_grad_(), bias).sum().backward()
    assert torch.allclose(weight.grad[:, :, 1, 1], x.detach().sum((0, 2, 3)), atol=1e-4)  # type: ignore[index]


def test_wide_convolutions_keep_to_double_precision() -> None:
    torch.manual_seed(0)
    conv, x = Conv3x3(256, 128), torch.randn(2, 256, 32, 32) + 1
    assert conv._pays(x)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)  # type: ignore[union-attr]
    assert distance(conv(x).detach().double(), exact.detach()) < 5e-5


@pytest.mark.parametrize(
    ("channels", "shape", "dtype"),
    [
        (32, (8, 128, 16, 16), torch.float32),
        (128, (1, 128, 16, 16), torch.float32),
        (128, (8, 128, 18, 16), torch.float32),
        (128, (8, 128, 16, 18), torch.float32),
        (128, (8, 128, 16, 16), torch.bfloat16),
    ],
)
def test_elsewhere_it_is_torchs(channels: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    conv, x = Conv3x3(128, channels).to(dtype), torch.randn(shape, dtype=dtype)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))


def test_autocast_computes_in_half_precision() -> None:
    conv, x = Conv3x3(128, 128), torch.randn(8, 128, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16


def test_single_pixels_are_a_linear_layer() -> None:
    conv, x = Conv1x1(6, 5), torch.randn(2, 6, 3, 4)
    assert torch.allclose(conv(x), F.conv2d(x, conv.weight, conv.bias), atol=1e-6)


def test_doubling_and_convolving_at_once_is_the_same() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    at_once, in_turn = double_and_convolve(x, conv), conv(double(x))
    assert torch.allclose(at_once, in_turn)
    weights = torch.randn_like(in_turn)
    for one, other in zip(
        torch.autograd.grad((at_once * weights).sum(), [x, *conv.parameters()]),
        torch.autograd.grad((in_turn * weights).sum(), [x, *conv.parameters()]),
        strict=True,
    ):
        assert torch.allclose(one, other)


@torch.no_grad()
def test_every_device_convolves_the_same(device: Device) -> None:
    """Winograd's way, linear layers and transposed convolutions are the CPU's alone."""
    torch.manual_seed(0)
    wide, single, x = Conv3x3(64, 64), Conv1x1(64, 5), torch.randn(8, 64, 16, 16)
    expected = wide(x), single(x), double_and_convolve(x, wide)
    wide, single, x = device.move((wide, single, x))
    for out, value in zip((wide(x), single(x), double_and_convolve(x, wide)), expected, strict=True):
        torch.testing.assert_close(device.host(out), value, atol=1e-4, rtol=1e-4)
