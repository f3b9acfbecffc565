"""Large pictures in parts: the windows that prediction cuts them into, and the random ones that training sees."""

from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

OVERLAP = 64  # pixels that neighbouring windows share, unless asked for otherwise or windows are small
MIN_SEEN = 0.4  # the share of its area with which an object that a training crop cuts is still one


class Window(NamedTuple):
    """A part of a picture, in pixels; right and bottom are excluded."""

    left: int
    top: int
    right: int
    bottom: int

    def cut(self, image: Tensor) -> Tensor:
        """The part (..., h, w) of a picture (..., H, W), a view of it."""
        return image[..., self.top : self.bottom, self.left : self.right]

    def within(self, other: "Window") -> "Window":
        """The same part in pixels of another window, which contains it."""
        left, top = other.left, other.top
        return Window(self.left - left, self.top - top, self.right - left, self.bottom - top)

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Top, left, height and width, as torchvision's `crop` takes them."""
        return self.top, self.left, self.bottom - self.top, self.right - self.left


@dataclass(frozen=True)
class Tiling:
    """How large pictures are cut into windows.

    Args:
        tile: side of a window in pixels; None takes pictures whole.
        overlap: pixels that neighbouring windows share at least; None for 64, or half of a smaller window.

    Raises:
        ValueError: the overlap is not smaller than the window, or there are no windows that could overlap.
    """

    tile: int | None = None
    overlap: int | None = None

    def __post_init__(self) -> None:
        if self.tile is None and self.overlap is not None:
            raise ValueError(f"overlap is {self.overlap}, but pictures are taken whole: give tile too, or neither")
        if self.tile is not None and not 0 <= self._overlap(self.tile) < self.tile:
            raise ValueError(f"overlap is {self.overlap}: it must be from 0 to below tile, which is {self.tile}")

    def windows(self, height: int, width: int) -> list[Window]:
        """Windows, row by row, that cover a picture and nothing beyond it, evenly spaced and all of one size.

        A side of the picture that is not longer than a window is not cut.
        """
        rows, columns = self._along(height), self._along(width)
        return [Window(left, top, right, bottom) for (top, bottom), (left, right) in product(rows, columns)]

    def shares(self, height: int, width: int) -> list[Window]:
        """The part of the picture that is each window's alone: neighbours meet in the middle of their overlap."""
        rows, columns = (_halved(self._along(length)) for length in (height, width))
        return [Window(left, top, right, bottom) for (top, bottom), (left, right) in product(rows, columns)]

    def _overlap(self, tile: int) -> int:
        return min(OVERLAP, tile // 2) if self.overlap is None else self.overlap

    def _along(self, length: int) -> list[tuple[int, int]]:
        if self.tile is None or length <= self.tile:
            return [(0, length)]
        gaps = -(-(length - self.tile) // (self.tile - self._overlap(self.tile)))
        starts = [i * (length - self.tile) // gaps for i in range(gaps + 1)]
        return [(start, start + self.tile) for start in starts]


def _halved(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches that overlap, each ended halfway through what it shares with the next."""
    middles = [(after[0] + before[1]) // 2 for before, after in pairwise(stretches)]
    return list(pairwise([stretches[0][0], *middles, stretches[-1][1]]))


@dataclass(frozen=True)
class RandomTile:
    """A random window of a training picture that is larger than it; smaller sides are not cut.

    Args:
        side: of the window in pixels.
        with_object: probability that it is drawn around an object of the picture, any of them; else it may lie
            anywhere.
    """

    side: int
    with_object: float

    def draw(self, boxes: np.ndarray, height: int, width: int) -> Window:
        """A window of a picture whose objects have these boxes (n, 4) xyxy; drawn from torch's global generator."""
        if max(height, width) <= self.side:
            return Window(0, 0, width, height)
        around = np.array([0, 0, width, height], dtype=np.float64)  # of the object that must be seen
        low, high = np.zeros(2), np.array([width, height]) - self.side
        if len(boxes) and float(torch.rand(())) < self.with_object:
            around = boxes[int(torch.randint(len(boxes), ()))].astype(np.float64)
            # All of the object is seen; of one that is larger than the window, as much as fits.
            bounds = np.sort([around[2:] - self.side, around[:2]], axis=0)
            low, high = np.ceil(bounds[0]).clip(0, high), np.floor(bounds[1]).clip(0, high)
        left, top = (self._start(*limits) for limits in zip(low, high, strict=True))
        return Window(left, top, min(left + self.side, width), min(top + self.side, height))

    def _start(self, low: float, high: float) -> int:
        first, last = max(int(low), 0), max(int(high), 0)
        return first if last <= first else int(torch.randint(first, last + 1, ()))


def seen_share(boxes: np.ndarray, window: Window) -> np.ndarray:
    """(n,) the shares of the areas of boxes (n, 4; xyxy, with an area) that a window shows."""
    low, high = np.maximum(boxes[:, :2], window[:2]), np.minimum(boxes[:, 2:], window[2:])
    return (high - low).clip(min=0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
