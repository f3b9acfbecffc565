"""Clips of shapes that move, enter, cross and hide one another, and leave: with a box and a number in every frame."""

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from diffperception.data.shapes import (
    CLASSES,
    MIN_SIDE,
    Coat,
    Shape,
    ShapesSettings,
    bounds,
    draw_background,
    surroundings,
)

LEAST_VISIBLE = 0.4  # of an object's whole area, for it to be annotated in a frame
MEETING = 0.7  # the share of objects that cross the centre of an earlier one, which they hide
TWIN = 0.4  # of those, the share of the same class, size and look
SPEEDS = 0.3, 3.0  # pixels a frame
MOST_TURN, MOST_SPIN = 0.08, 0.05  # radians a frame, of an object's heading and of the object itself


@dataclass(frozen=True)
class ClipFrame:
    """An image of a clip, and the n objects of which enough is visible in it."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    tracks: np.ndarray  # (n,) int64: which object of the clip each is, the same in all frames
    boxes: np.ndarray  # (n, 4) int64 x1 y1 x2 y2: bounds of the visible pixels, ends excluded
    labels: np.ndarray  # (n,) int64, index of CLASSES
    areas: np.ndarray  # (n,) int64: visible pixels
    visibility: np.ndarray  # (n,) float64: the share of the whole object that they are


def draw_clip(rng: np.random.Generator, settings: ShapesSettings) -> list[ClipFrame]:
    """Draw one clip of max_objects / 2 to max_objects shapes on a background that stands; later ones hide earlier ones.

    Each moves along an arc of a circle at a constant speed and turns about itself. Most meet an earlier object at some
    frame, centre on centre, and some of these are its twins: only their motion tells which is which.
    """
    height, width = rng.integers(settings.min_side, settings.max_side + 1, size=2)
    background = draw_background(rng, height, width)
    movers: list[_Mover] = []
    for _ in range(rng.integers((settings.max_objects + 1) // 2, settings.max_objects + 1)):
        movers.append(_Mover.random(rng, movers, background, settings))
    noise = rng.uniform(0, 0.04)
    frames = []
    for number in range(settings.frames):
        image, owner = background.copy(), np.full((height, width), -1)
        for index, mover in enumerate(movers):
            mover.paint(image, owner, index, number)
        image += rng.normal(scale=noise, size=image.shape)
        frames.append(_annotated(np.round(255 * image.clip(0, 1)).astype(np.uint8), owner, movers))
    return frames


def _annotated(image: np.ndarray, owner: np.ndarray, movers: "list[_Mover]") -> ClipFrame:
    areas = np.bincount(owner.ravel() + 1, minlength=len(movers) + 1)[1:]
    visibility = (areas / [mover.shape.area() for mover in movers]).clip(max=1)
    boxes = bounds(owner, len(movers))
    sides = (boxes[:, 2:] - boxes[:, :2]).min(axis=1)
    seen = np.flatnonzero((visibility >= LEAST_VISIBLE) & (sides >= MIN_SIDE))
    labels = np.array([mover.shape.label for mover in movers], dtype=np.int64)
    return ClipFrame(image, seen, boxes[seen], labels[seen], areas[seen], visibility[seen])


@dataclass(frozen=True)
class _Mover:
    """A shape as it is at frame `time`, and how it moves before and after."""

    shape: Shape
    coat: Coat
    time: float
    speed: float  # pixels a frame
    heading: float  # radians, at `time`
    turn: float  # radians a frame, of the heading
    spin: float  # radians a frame, of the shape

    @classmethod
    def random(
        cls, rng: np.random.Generator, others: "list[_Mover]", background: np.ndarray, settings: ShapesSettings
    ) -> "_Mover":
        """One that meets one of the others, if there are any and chance has it so."""
        height, width = background.shape[:2]
        shape = Shape.random(rng, int(rng.integers(len(CLASSES))), height, width, settings.min_size)
        coat = Coat.random(rng, background.mean(axis=(0, 1)), height, width)
        time = rng.uniform(0.2, 0.8) * settings.frames
        meets, is_twin = rng.uniform(size=2) < (MEETING, TWIN)
        other = others[rng.integers(len(others))] if others and meets else None
        met = None if other is None else other.at(time)
        if other is not None and met is not None and (met.center > 0).all() and (met.center < (width, height)).all():
            shape, coat = (met, other.coat) if is_twin else (replace(shape, center=met.center), coat)
        heading, turn, spin = rng.uniform((0, -MOST_TURN, -MOST_SPIN), (2 * np.pi, MOST_TURN, MOST_SPIN))
        return cls(shape, coat, time, rng.uniform(*SPEEDS), heading, turn, spin)

    def at(self, frame: float) -> Shape:
        """The shape at a frame: the chord of the arc since `time` halves the angle between the headings."""
        since = frame - self.time
        half = self.turn * since / 2
        chord = self.speed * since * np.sinc(half / np.pi)
        direction = np.array([np.cos(self.heading + half), np.sin(self.heading + half)])
        angle = self.shape.angle + self.spin * since
        return replace(self.shape, center=self.shape.center + chord * direction, angle=angle)

    def paint(self, image: np.ndarray, owner: np.ndarray, index: int, frame: int) -> None:
        """Draw it as object `index` into the image (H, W, 3) and the map of who is visible where (H, W), in place."""
        shape = self.at(frame)
        distance = shape.distance(*owner.shape)
        owner[distance < 0] = index
        around = surroundings(distance)
        if around is not None:
            self.coat.paint(image, distance, around, self._pattern(shape, around))

    def _pattern(self, shape: Shape, around: tuple[slice, slice]) -> np.ndarray:
        """That of the pixels around the shape, which it takes along: its middle lies on the shape's centre."""
        rows, columns = around
        y = np.arange(rows.start, rows.stop)[:, None] + 0.5 - shape.center[1]
        x = np.arange(columns.start, columns.stop) + 0.5 - shape.center[0]
        cos, sin = np.cos(shape.angle), np.sin(shape.angle)
        height, width = self.coat.pattern.shape
        places = np.stack([height / 2 + cos * y - sin * x, width / 2 + cos * x + sin * y])
        return ndimage.map_coordinates(self.coat.pattern, places, order=1, mode="mirror")
