"""Where a test computes, so that it is written once for every device."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Device:
    """A device that is there.

    Args:
        name: of the device, as torch names it.
    """

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)

    @property
    def waits(self) -> list[Any]:
        """What made the host wait; a simulated device alone knows it."""
        return []

    @property
    def mixes(self) -> list[Any]:
        """Operations on tensors of two devices; one that is there raises an error instead."""
        return []

    def report(self) -> str:
        """What was recorded, to be read."""
        return ""

    def move(self, value: Any) -> Any:
        """A module, in place, or the tensors of nested lists, tuples and dicts, on the device."""
        return tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor | nn.Module) else x, value)

    def host(self, value: Any) -> Any:
        """Copies of the tensors of nested lists, tuples and dicts on the CPU, without their graph."""
        return tree_map(lambda x: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x, value)
