"""A simulated GPU for machines without one: CPU arithmetic under tensors that claim to be on cuda:0.

Branches on `device.type` go the GPU's way with real values, and what a GPU would refuse or wait for is recorded with
the line that asked for it. Speed, memory and the rounding of CUDA kernels are not simulated.

    with SimulatedGPU() as gpu:
        detector = gpu.move(detector)
        losses = detector.loss(images, targets)
        assert not gpu.mixes
        assert len(gpu.waits) <= 4, gpu.report()
        values = gpu.host(losses)
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import diffperception
from tests.helpers import devices
from tests.helpers.backward import run_backward

Kind = Literal["mix", "wait", "copy", "asynchronous copy"]
aten = torch.ops.aten
TorchGenerator = torch.Generator
PACKAGE = f"{Path(diffperception.__file__).parent}{os.sep}"
TORCH = str(Path(torch.__file__).parent)
OWN = (__file__, devices.__file__, contextlib.__file__)
PRIVATE = (
    (torch._C, "_only_lift_cpu_tensors"),
    (torch._C, "_set_only_lift_cpu_tensors"),
    (torch._C, "_ensureCUDADeviceGuardSet"),
    (torch.cuda, "_lazy_init"),
    (torch.autograd, "_engine_run_backward"),
    (aten, "_scaled_dot_product_attention_math"),
)

# Operations whose kernels read numbers back, beside those that torch tags; `nms` copies its masks to the host.
WAITING = {"torchvision::nms", "aten::multinomial", "aten::unique_dim_consecutive", "aten::_linalg_check_errors"}
WAITING_TAGS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPYING = {aten.copy_.default, aten._foreach_copy_.default}
FILLING = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill.Tensor, aten.fill_.Tensor}


@dataclass(frozen=True)
class Event:
    """What a GPU would refuse ("mix"), stand still for ("wait", "copy") or do meanwhile ("asynchronous copy")."""

    kind: Kind
    operation: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}, {self.operation}"


class SimulatedTensor(Tensor):
    """Claims to be on cuda:0; `inner` on the CPU holds the numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "SimulatedTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("cuda", 0),
        )
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a simulated tensor outside `with SimulatedGPU()`; `gpu.host` brings it back")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SimulatedTensor({self.inner})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy; copy it to the host with Tensor.cpu()")
        return self.detach().cpu().numpy()

    def register_hook(self, hook: Any) -> Any:
        raise NotImplementedError("the simulated backward pass runs no hooks of tensors")

    def retain_grad(self) -> None:
        raise NotImplementedError("the simulated backward pass keeps no gradients but those of leaves")

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: "SimulatedTensor") -> None:
        Tensor.data.__set__(self, new)
        self.inner = new.inner


class _GeneratorType(type(torch.Generator)):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, TorchGenerator)


class _Generator(TorchGenerator, metaclass=_GeneratorType):
    """Stands for `torch.Generator` meanwhile: one of the GPU's draws the CPU's numbers."""

    of_gpu: ClassVar[dict[int, "_Generator"]] = {}  # by address: operations receive them in other Python objects

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        if not _is_gpu(device):
            return TorchGenerator(device)
        generator = super().__new__(cls)
        cls.of_gpu[generator._cdata] = generator
        return generator

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


class SimulatedGPU(TorchDispatchMode, devices.Device):
    """Tensors on "cuda" inside `with` are simulated; outside they can only be brought back with `host`.

    What is changed of torch meanwhile is put back at the end, but for a guard of CUDA devices that does nothing; fake
    tensors leave the same. Not simulated are the functions of `torch.cuda`, hooks of gradients, `torch.compile`,
    tensors without strides, more than one GPU, and other threads.

    Attributes:
        events: all of them, in order.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.device = torch.device("cuda", 0)
        self.events: list[Event] = []
        self._pinned: dict[int, torch.UntypedStorage] = {}  # kept, so that no other storage takes an address
        self._silent = False
        self._changes = ExitStack()

    @property
    def mixes(self) -> list[Event]:
        """What CUDA refuses: operations on tensors of two devices."""
        return [event for event in self.events if event.kind == "mix"]

    @property
    def waits(self) -> list[Event]:
        """What lets the host stand until the GPU's queue is empty, copies among them."""
        return [event for event in self.events if event.kind in ("wait", "copy")]

    def report(self) -> str:
        """The number of events of each kind and place, the most frequent first."""
        return "\n".join(f"{count:5d}  {event}" for event, count in Counter(self.events).most_common())

    def move(self, value: Any) -> Any:
        """See `Device.move`; leaves no event."""
        with self._without_events():
            return super().move(value)

    def host(self, value: Any) -> Any:
        """See `Device.host`; leaves no event, and works after the end too."""
        return super().host(tree_map(_inner, value))

    def __enter__(self) -> "SimulatedGPU":
        missing = [name for owner, name in PRIVATE if not hasattr(owner, name)]
        if missing:
            raise RuntimeError(f"SimulatedGPU must be adjusted to torch {torch.__version__}, which has no {missing}")
        with ExitStack() as changes:
            # torch.tensor(..., device="cuda") makes a CPU tensor and copies it, as FakeTensorMode has it.
            changes.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)
            if not torch.cuda.is_available():
                torch._C._ensureCUDADeviceGuardSet()
                changes.enter_context(patch.object(torch.cuda, "_lazy_init", lambda: None))
                changes.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
                changes.enter_context(patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True))
            # A module that moves swaps its tensors; their storages, which it would exchange, are not used.
            future = torch.__future__
            changes.callback(future.set_swap_module_params_on_conversion, future.get_swap_module_params_on_conversion())
            future.set_swap_module_params_on_conversion(True)
            changes.enter_context(patch.object(torch, "Generator", _Generator))
            changes.enter_context(patch.object(F, "scaled_dot_product_attention", _attention))
            changes.enter_context(torch.backends.cudnn.flags(enabled=False))
            changes.callback(_Generator.of_gpu.clear)
            changes.enter_context(patch.object(torch.autograd, "_engine_run_backward", run_backward))
            super().__enter__()
            self._changes = changes.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._changes.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        simulated = any(isinstance(x, SimulatedTensor) for x in tensors)
        device = kwargs.get("device")
        on_gpu = simulated if device is None else _is_gpu(device)
        if simulated or on_gpu or kwargs.get("generator") is not None:
            self._record(func, args, kwargs, on_gpu)
        result = self._compute(func, *tree_map(_inner, (args, kwargs)))
        if not on_gpu:
            return result
        known = {id(_inner(x)): x for x in tensors}  # an operation in place returns the tensor that it was given
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else SimulatedTensor(x), result)

    def _compute(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """On the CPU, where pinned memory is but a mark."""
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if kwargs.get("device") is not None and _is_gpu(kwargs["device"]):
            kwargs = kwargs | {"device": torch.device("cpu")}
        pin = bool(kwargs.get("pin_memory")) or func is aten._pin_memory.default
        if pin:
            func = aten.clone.default if func is aten._pin_memory.default else func
            kwargs = {name: value for name, value in kwargs.items() if name not in ("pin_memory", "device")}
        result = func(*args, **kwargs)
        if pin:
            self._pin(result)
        return result

    def _pin(self, tensor: Tensor) -> None:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _record(self, func: Any, args: tuple, kwargs: dict[str, Any], on_gpu: bool) -> None:
        if func is aten._to_copy.default:
            self._record_copy(args[0], on_gpu, bool(kwargs.get("non_blocking")))
        elif func in COPYING:
            non_blocking = bool(kwargs.get("non_blocking", args[2:] == (True,)))
            pairs = [args[:2]] if func is aten.copy_.default else zip(*args[:2], strict=True)
            for target, source in pairs:
                self._record_copy(source, isinstance(target, SimulatedTensor), non_blocking)
        elif func in INDEXING:
            self._record_indexing(func, *args[:3])
        else:
            self._record_mixes(func, args, kwargs, on_gpu)
            if _waits(func, args, kwargs):
                self._add("wait", _name(func))

    def _record_copy(self, source: Tensor, to_gpu: bool, non_blocking: bool) -> None:
        if isinstance(source, SimulatedTensor) == to_gpu or not source.numel():
            return
        # Memory that is not pinned, or not in one piece, goes through a buffer of the driver, which waits.
        meanwhile = non_blocking and (not to_gpu or (self._is_pinned(source) and _is_dense(source)))
        self._add("asynchronous copy" if meanwhile else "copy", "host to device" if to_gpu else "device to host")

    def _record_indexing(self, func: Any, tensor: Tensor, indices: Any, value: Tensor | None = None) -> None:
        on_gpu = isinstance(tensor, SimulatedTensor)
        indices = [index for index in indices if index is not None]
        for index in indices:
            if isinstance(index, SimulatedTensor) and not on_gpu:
                self._add("mix", f"{_name(func)} of a CPU tensor by a GPU's")
            elif not isinstance(index, SimulatedTensor) and on_gpu:
                self._add("copy", "host to device, of an index")
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        foreign_value = value is not None and isinstance(value, SimulatedTensor) != on_gpu
        if foreign_value and on_gpu and value.numel() == 1 and len(indices) == len(masks) == 1:
            return  # CUDA has masked_fill for a number of the host
        if any(isinstance(mask, SimulatedTensor) for mask in masks):
            self._add("wait", f"{_name(func)} by a mask")
        if foreign_value and on_gpu and value.dim() == 0:
            self._add("copy", "host to device, of a number")
        elif foreign_value:
            self._add("mix", f"{_name(func)} of a value of the other device")

    def _record_mixes(self, func: Any, args: tuple, kwargs: dict[str, Any], on_gpu: bool) -> None:
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(x, SimulatedTensor) for x in leaves):
            takes_numbers = torch.Tag.pointwise in func.tags or func in FILLING or "_foreach" in _name(func)
            hosts = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, SimulatedTensor)]
            if any(x.dim() > 0 or not takes_numbers for x in hosts):
                self._add("mix", _name(func))
        generator = kwargs.get("generator")
        if generator is not None and (generator._cdata in _Generator.of_gpu) != on_gpu:
            self._add("mix", f"{_name(func)} with a generator of the {'CPU' if on_gpu else 'GPU'}")

    def _add(self, kind: Kind, operation: str) -> None:
        if not self._silent:
            self.events.append(Event(kind, operation, _place(sys._getframe(1))))

    @contextmanager
    def _without_events(self) -> Iterator[None]:
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before


def _waits(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the host needs numbers of the device to go on."""
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func in (aten.masked_fill.Tensor, aten.masked_fill_.Tensor):
        return isinstance(args[2], SimulatedTensor)
    return func._schema.name in WAITING or not WAITING_TAGS.isdisjoint(func.tags)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by products and softmax: the choice of a kernel asks the GPU that is not there."""
    attend = aten._scaled_dot_product_attention_math
    options = {"scale": scale, "enable_gqa": enable_gqa}
    return attend(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]


def _place(frame: FrameType | None) -> str:
    """File and line of the package's innermost frame; without one, of the caller's beyond torch."""
    outside = ""
    while frame is not None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        if file.startswith(PACKAGE):
            return f"{file.removeprefix(PACKAGE)}:{line}"
        if not outside and not file.startswith(TORCH) and file not in OWN:
            outside = f"{Path(file).name}:{line}"
        frame = frame.f_back
    return outside


def _name(func: Any) -> str:
    name = func._schema.name.removeprefix("aten::")
    return "item" if name == "_local_scalar_dense" else name


def _is_gpu(device: torch.device | str | int) -> bool:
    return torch.device(device).type == "cuda"


def _is_dense(tensor: Tensor) -> bool:
    """Whether it fills its piece of memory, in any order of its axes."""
    return tensor.numel() == 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, SimulatedTensor) else x
