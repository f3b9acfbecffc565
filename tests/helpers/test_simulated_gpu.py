import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.detection.scenes import random_image, random_target, tiny_detector
from tests.helpers import simulated_gpu
from tests.helpers.devices import Device
from tests.helpers.simulated_gpu import SimulatedGPU

GPU = torch.device("cuda", 0)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _kinds(action: Callable[[Tensor], object]) -> list[str]:
    """The kinds of events of an action on [-1, 0, 1] of the GPU."""
    with SimulatedGPU() as gpu:
        x = gpu.move(torch.tensor([-1.0, 0.0, 1.0]))
        action(x)
    return [event.kind for event in gpu.events]


def _assign(target: Tensor, index: object, value: object) -> None:
    target[index] = value


@pytest.mark.parametrize(
    "action",
    [
        lambda x: x[0].item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: _assign(x, x > 0, x.sum()),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.long().abs().bincount(),
        lambda x: x.repeat_interleave(x.long().abs()),
        lambda x: x.masked_fill(x > 0, x.sum()),
        lambda x: x.abs().multinomial(1),
        lambda x: torchvision.ops.nms(x[:, None].expand(3, 4), x, 0.5),
    ],
)
def test_the_host_waits_for_numbers_and_sizes(action):
    assert _kinds(action) == ["wait"]


@pytest.mark.parametrize(
    "action",
    [
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: x.numpy(force=True),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: torch.zeros(3).to(x),
        lambda x: torch.zeros(3).cuda(),
        lambda x: torch.zeros(3).to(x.device, non_blocking=True),  # the memory is not pinned
        lambda x: torch.zeros(3, 2, pin_memory=True)[:, 0].to(x.device, non_blocking=True),  # nor in one piece
        lambda x: torch.zeros(3).pin_memory().to(x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: x[[0, 2]],
        lambda x: x[torch.tensor([0, 2])],
    ],
)
def test_copies_block(action):
    assert _kinds(action) == ["copy"]


@pytest.mark.parametrize(
    "action",
    [
        lambda x: torch.zeros(3).pin_memory().to(x.device, non_blocking=True),
        lambda x: torch.zeros(3, pin_memory=True).to(x.device, torch.float64, non_blocking=True),
        lambda x: x.copy_(torch.zeros(3).pin_memory(), non_blocking=True),
        lambda x: x.to("cpu", non_blocking=True),
    ],
)
def test_copies_of_pinned_memory_need_not_block(action):
    assert _kinds(action) == ["asynchronous copy"]


@pytest.mark.parametrize(
    "action",
    [
        lambda x: x + torch.zeros(3),
        lambda x: torch.zeros(3).add_(x),
        lambda x: torch.stack([x[0], torch.tensor(1.0)]),
        lambda x: F.linear(x, torch.zeros(2, 3)),
        lambda x: torch.zeros(3)[x.long()],
        lambda x: _assign(x, x.long(), torch.zeros(3)),
        lambda x: torch.randn(3, device=x.device, generator=torch.Generator()),
        lambda x: torch.randn(3, generator=torch.Generator(x.device)),
    ],
)
def test_mixed_devices_are_seen(action):
    assert _kinds(action) == ["mix"]


@pytest.mark.parametrize(
    "action",
    [
        lambda x: x.to(x.device),
        lambda x: x.double().to(torch.float32),
        lambda x: x * torch.tensor(2.0) + 1,  # a number of the host is passed along
        lambda x: x.masked_fill(x > 0, 1.0),
        lambda x: _assign(x, x > 0, 1.0),
        lambda x: _assign(x, x > 0, torch.tensor(1.0)),
        lambda x: _assign(x, slice(1), 1.0),
        lambda x: x[x.long()],
        lambda x: x[1:].sum(),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: torch.zeros(3, device=x.device) + x.new_zeros(3) + torch.zeros_like(x),
        lambda x: torch.arange(3, device=x.device) + x,
        lambda x: F.one_hot(x.long().abs(), 2),
        lambda x: torch.randn(3, device=x.device, generator=torch.Generator(x.device).manual_seed(1)) + x,
        lambda x: x.repeat_interleave(x.long().abs(), output_size=2),
        lambda x: torch.zeros(3)[torch.zeros(3) > 0].tolist(),
    ],
)
def test_clean_code_leaves_no_event(action):
    assert _kinds(action) == []


def test_tensors_claim_to_be_on_the_gpu():
    with SimulatedGPU() as gpu:
        x = torch.zeros(2, device="cuda")
        assert x.device == GPU == gpu.device
        assert x.is_cuda
        assert not x.is_cpu
        assert x.cpu().device.type == "cpu"
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            x.numpy()
        assert "SimulatedTensor" in repr(x)


def test_an_event_names_the_line_of_the_package():
    with SimulatedGPU() as gpu:
        tiny_detector().to("cuda").predict([random_image(32, 32)])
    assert any(re.fullmatch(r"detection/detector\.py:\d+", event.place) for event in gpu.events)
    counts = [int(line.split()[0]) for line in gpu.report().splitlines()]
    assert sum(counts) == len(gpu.events)
    assert counts == sorted(counts, reverse=True)


def test_an_event_outside_of_the_package_names_the_caller():
    with SimulatedGPU() as gpu:
        torch.zeros(1, device="cuda").item()
    assert gpu.events[0].place.startswith("test_simulated_gpu.py:")


def test_moving_leaves_no_event():
    with SimulatedGPU() as gpu:
        model, (x, [y, n]) = gpu.move((nn.Linear(3, 2), (_random(4, 3), [{"y": _random(2)}, 7])))
        assert model.weight.device == x.device == y["y"].device == GPU
        assert n == 7
        host = gpu.host(model(x) + y["y"])
    assert type(host) is Tensor
    assert not gpu.events


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (2, 6)),
        (nn.LayerNorm(6), (2, 6)),
        (nn.Conv2d(6, 4, 3, stride=2), (2, 6, 9, 9)),
        (nn.ConvTranspose2d(6, 4, 2, stride=2), (2, 6, 5, 5)),
        (nn.GroupNorm(2, 6), (2, 6, 5, 5)),
        (nn.BatchNorm2d(6), (2, 6, 5, 5)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (2, 6, 5, 5)),
        (nn.MaxPool2d(2), (2, 6, 4, 4)),
        (nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3), nn.Softmax(-1)), (2, 6)),
        (nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), (2, 5, 6)),
    ],
)
def test_values_and_gradients_are_the_cpus(device: Device, layer: nn.Module, shape: tuple[int, ...]):
    def run(layer: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        result = layer(x)
        result.square().sum().backward()
        return [result, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]

    expected = run(copy.deepcopy(layer), _random(*shape))
    found = run(device.move(copy.deepcopy(layer)), device.move(_random(*shape)))
    torch.testing.assert_close(device.host(found), device.host(expected), atol=1e-4, rtol=1e-4)
    assert not device.waits


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.grid_sample(x.view(1, 1, 4, 6), x.view(1, 3, 4, 2).tanh(), align_corners=False),
        lambda x: F.embedding_bag(
            torch.arange(6, device=x.device).view(3, 2) % 4, x, mode="sum", per_sample_weights=x[:3, :2].exp()
        ),
        lambda x: F.interpolate(x.view(1, 1, 4, 6), size=(7, 5), mode="nearest"),
        lambda x: F.scaled_dot_product_attention(*x.view(3, 1, 2, 4).unbind()),
        lambda x: nn.MultiheadAttention(6, 2, bias=False).to(x.device).requires_grad_(False)(x, x, x)[1],
        lambda x: torch.cdist(x, x.flip(1), p=1),
        lambda x: x.gather(1, x.argsort(1)[:, :2]) * x[:, [0, 1]].max() + x.unbind()[0][0],
        lambda x: x.expand(2, 4, 6).sum(0) + x.half().float(),
        lambda x: checkpoint(torch.tanh, x, use_reentrant=False),
        lambda x: _Double.apply(x),
    ],
)
def test_functions_and_their_gradients_are_the_cpus(device: Device, function: Callable[[Tensor], Tensor]):
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        torch.manual_seed(0)
        result = function(x)
        return result, torch.autograd.grad(result.sum() + result.square().sum(), x)[0]

    expected = run(_random(4, 6))
    torch.testing.assert_close(device.host(run(device.move(_random(4, 6)))), device.host(expected))


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2, x * 3

    @staticmethod
    def backward(ctx, grad, unused):
        return grad * 2 + unused

    @classmethod
    def apply(cls, x):
        return super().apply(x)[0]


def test_gradients_of_gradients(device: Device):
    x = device.move(torch.tensor([2.0, 3.0])).requires_grad_()
    (first,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert device.host(first).tolist() == [12.0, 27.0]
    assert device.host(second).tolist() == [12.0, 18.0]


def test_gradients_add_up_and_reach_leaves_alone(device: Device):
    x, y = (device.move(torch.ones(2)).requires_grad_() for _ in range(2))
    for _ in range(2):
        ((x + x) * y).sum().backward(inputs=[x])
    assert device.host(x.grad).tolist() == [4.0, 4.0]
    assert y.grad is None
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(x.sum(), [x, y])
    assert torch.autograd.grad(x.sum(), [x, y], allow_unused=True)[1] is None


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_an_optimizer_steps_as_on_the_cpu(device: Device, options: dict[str, bool]):
    def run(model: nn.Module, x: Tensor) -> list[Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return list(model.parameters())

    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    expected = run(copy.deepcopy(model), _random(5, 3))
    found = run(device.move(copy.deepcopy(model)), device.move(_random(5, 3)))
    torch.testing.assert_close(device.host(found), device.host(expected))
    assert not device.waits


def test_autocast(device: Device):
    x = device.move(_random(2, 8))
    layer = device.move(nn.Linear(8, 4))
    with torch.autocast(x.device.type, torch.bfloat16):
        y = layer(x)
        assert torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            assert layer(x).dtype == torch.float32
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    assert not device.waits


def test_state_and_copies_of_modules(device: Device):
    model = device.move(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))
    twin = copy.deepcopy(model)
    assert isinstance(twin[0].weight, nn.Parameter)
    assert twin[0].weight.device == device.device
    with torch.no_grad():
        twin[0].weight.zero_()
    assert device.host(model[0].weight).any()
    model.load_state_dict(device.host(dict(twin.state_dict())))
    assert not device.host(model[0].weight).any()
    weight = model[0].weight
    model.double().to(memory_format=torch.channels_last)
    assert model[0].weight is weight
    assert weight.dtype == torch.float64
    weight.data = weight.data[:, :1]
    assert device.host(weight).shape == (3, 1, 1, 1)
    assert type(device.move(nn.Linear(2, 2)).cpu().weight) is nn.Parameter


def test_the_detector_has_the_cpus_losses_and_gradients(device: Device):
    images = [random_image(48, 64, seed) for seed in range(2)]
    targets = [random_target(3, 48, 64, seed) for seed in range(2)]

    def run(device: Device) -> tuple[dict[str, Tensor], list[Tensor]]:
        detector = device.move(tiny_detector().train())
        generator = torch.Generator().manual_seed(0)
        losses = detector.loss(device.move(images), device.move(targets), generator)
        sum(losses.values()).backward()
        return device.host((losses, [p.grad for p in detector.parameters() if p.grad is not None]))

    torch.testing.assert_close(run(device), run(Device("cpu")), atol=1e-3, rtol=1e-3)


def test_pinned_memory_is_marked():
    with SimulatedGPU():
        pageable = torch.zeros(3)
        pinned = pageable.pin_memory()
        assert not pageable.is_pinned()
        assert pinned.is_pinned()
        assert pinned[1:].is_pinned()
        assert torch.empty(2, pin_memory=True).is_pinned()
        assert not (pinned + 1).is_pinned()


def test_generators():
    with SimulatedGPU() as gpu:
        on_gpu, on_cpu = torch.Generator(gpu.device), torch.Generator()
        assert on_gpu.manual_seed(3).device == GPU
        assert on_cpu.manual_seed(3).device.type == "cpu"
        assert isinstance(on_gpu, torch.Generator)
        assert isinstance(on_cpu, torch.Generator)
        assert not isinstance(3, torch.Generator)
        drawn = gpu.host(torch.randn(2, generator=on_gpu, device="cuda"))
        assert torch.equal(drawn, torch.randn(2, generator=on_cpu))


def test_torch_is_as_before_afterwards():
    def state() -> tuple:
        names = ["Generator", "autocast", "tensor"]
        return (
            F.scaled_dot_product_attention,
            torch.cuda._lazy_init,
            torch.cuda.is_bf16_supported,
            torch.autograd._engine_run_backward,
            torch.backends.cudnn.enabled,
            torch._C._only_lift_cpu_tensors(),
            torch._C._len_torch_dispatch_stack(),
            torch.__future__.get_swap_module_params_on_conversion(),
            *(getattr(torch, name) for name in names),
        )

    before = state()
    with SimulatedGPU():
        assert state() != before
        assert torch.cuda.is_available() == (torch.cuda.device_count() > 0)
        assert not torch.compiler.is_compiling()
    assert state() == before
    with pytest.raises(ZeroDivisionError), SimulatedGPU():
        _ = 1 / 0
    assert state() == before
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
            torch.zeros(1, device="cuda")


def test_a_tensor_is_of_no_use_outside_but_can_be_brought_back():
    with SimulatedGPU() as gpu:
        x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="outside `with SimulatedGPU"):
        x + 1
    assert gpu.host(x).tolist() == [1.0, 1.0]


def test_another_torch_is_refused_by_the_name_of_what_it_lacks(monkeypatch):
    monkeypatch.setattr(simulated_gpu, "PRIVATE", ((torch, "_gone"),))
    with pytest.raises(RuntimeError, match=r"adjusted to torch .* no \['_gone'\]"), SimulatedGPU():
        pass


@pytest.mark.gpu
def test_a_gpu_refuses_what_the_simulated_one_records():
    x = torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.zeros(3)
