"""On what a command computes: the device, its arithmetic, and the other processes that torchrun started."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Precision = Literal["32", "bf16"]
PROCESS_NUMBERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID")

Item = TypeVar("Item")


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; for `auto` the accelerator (CUDA, MPS, XPU) if there is one, else the CPU.

    From then on an accelerator multiplies float32 matrices in TF32.
    Under torchrun, a name without a number means the process's own: cuda:1 for the second process of a machine.

    Raises:
        ValueError: there is no such device.
    """
    try:
        device = torch.device(_accelerator() if name == "auto" else name)
        if device.index is None and device.type not in ("cpu", "mps", "meta"):
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch asserts that it was built for the device
        raise ValueError(f"there is no device {name!r} here: use cpu or auto") from None
    if device.type == _accelerator() and device.index is not None:
        torch.accelerator.set_device_index(device)
    prefer_fast_products(device)
    return device


def prefer_fast_products(device: torch.device) -> None:
    """Let an accelerator multiply float32 matrices in TF32; a CPU's results stay as they are."""
    if device.type not in ("cpu", "meta"):
        torch.set_float32_matmul_precision("high")


def _accelerator() -> str:
    """The type of this machine's accelerator, `cpu` if it has none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else "cpu"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """A context in which convolutions and products are computed in bfloat16; in one of float32 nothing changes.

    So an evaluation during a training has that one's precision: `torch.autocast(enabled=False)` would end it.
    """
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a copy to a GPU from memory that is not pinned would wait for all the GPU's work."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def join_processes() -> Iterator[None]:
    """Connect to the other processes that torchrun started, if it did, until the end; pick the device before."""
    joins = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group()  # gloo for tensors on the CPU, and what goes with the accelerator for its own
    try:
        yield
    finally:
        if joins:
            dist.destroy_process_group()


def first_process() -> bool:
    """Whether this is the only process, or the one of several (torchrun's, or Lightning's) that prints and writes."""
    return all(int(os.environ.get(name, 0)) == 0 for name in PROCESS_NUMBERS)


def barrier() -> None:
    """Wait until all processes have come as far, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def first_does(action: Callable[[], object]) -> None:
    """What the first process does when all have come as far, before any goes on."""
    barrier()
    if first_process():
        action()
    barrier()


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Those of the items that this process takes, all if it is alone; `gather` is the inverse."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gather(items: Sequence[Item]) -> list[Item]:
    """What all processes have made of their shares, in the order of the items before they were shared."""
    if not dist.is_initialized():
        return list(items)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, list(items))
    whole: list[Any] = [None] * sum(map(len, shares))
    for rank, part in enumerate(shares):
        whole[rank :: len(shares)] = part
    return whole


def hide_bar() -> bool | None:
    """For tqdm's `disable`: the first of several processes has a bar, and that only in a terminal."""
    return None if first_process() else True
