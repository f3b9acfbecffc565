"""Scenes of simple shapes drawn from a seed: a small data set with exact boxes and class masks."""

import colorsys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scipy import ndimage

MIN_VISIBLE = 0.6  # of an object's whole area, also where it leaves the image
MIN_SIDE = 10  # pixels of an object's visible box
MAX_ATTEMPTS = 30


@dataclass(frozen=True)
class ShapesSettings:
    """What the images are a function of.

    Args:
        train: images to train on.
        val: images to evaluate on; none is also in train.
        seed: another seed gives other images.
        min_side: smallest height and width of an image in pixels.
        max_side: largest height and width of an image in pixels.
        max_objects: most objects in an image; half as many are the least, where there is room. With 1, images lie
            in folders of their object's class.
        min_size: smallest length of a shape in pixels; the largest is 0.6 of the image's shorter side.
        captions: shapes have colours that words name, no two of an image are alike, and the images come with captions
            in English and Chinese.
        held_out: colours with shapes, such as "red star", that only images of a third part show, as many as `val`;
            with captions.
        clips: clips of moving shapes to track, which enter, cross and hide one another, and leave.
        frames: images of a clip.
    """

    train: int = 2000
    val: int = 200
    seed: int = 0
    min_side: int = 96
    max_side: int = 160
    max_objects: int = 8
    min_size: int = 22
    captions: bool = False
    held_out: list[str] = field(default_factory=list)
    clips: int = 0
    frames: int = 40

    def __post_init__(self) -> None:
        if min(self.train, self.val, self.clips, self.seed) < 0 or self.train + self.val + self.clips == 0:
            raise ValueError(
                "train, val, clips and seed must not be negative, and at least one image or clip must be asked for"
            )
        if self.frames < 1:
            raise ValueError(f"frames must be at least 1, not {self.frames}: a clip has an image")
        if self.max_objects < 1:
            raise ValueError(f"max_objects must be at least 1, not {self.max_objects}")
        if not 18 <= self.min_size <= 0.6 * self.min_side <= 0.6 * self.max_side:
            raise ValueError(
                f"shapes need 18 <= min_size <= 0.6 * min_side and min_side <= max_side, not min_size={self.min_size},"
                f" min_side={self.min_side}, max_side={self.max_side}"
            )
        if self.held_out and not self.captions:
            raise ValueError("held_out names colours, which only images with captions have: set captions to true")
        for name in self.held_out:
            if name not in PAIRS:
                raise ValueError(
                    f"held_out has {name!r}, which is no colour ({', '.join(COLORS)}) with a shape"
                    f' ({", ".join(CLASSES)}), such as "red star"'
                )
        if self.captions and len(PAIRS) - len({*self.held_out}) < self.max_objects:
            raise ValueError(
                f"{len({*self.held_out})} of {len(PAIRS)} colours with shapes are held_out, and an image of"
                f" max_objects={self.max_objects} needs as many others: hold out fewer"
            )

    @property
    def splits(self) -> dict[str, int]:
        """How many images each part has."""
        return {"train": self.train, "val": self.val} | ({"held_out": self.val} if self.held_out else {})


@dataclass(frozen=True)
class Scene:
    """An image and what is in it; object i has boxes[i], labels[i] and the pixels where `owner` is i."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    owner: np.ndarray  # (H, W) int64: the visible object at a pixel, -1 for background
    boxes: np.ndarray  # (n, 4) int64 x1 y1 x2 y2: bounds of the visible pixels, ends excluded
    labels: np.ndarray  # (n,) int64, index of CLASSES
    colors: tuple[str, ...] = ()  # names of the objects' colours, where they have such

    @property
    def class_mask(self) -> np.ndarray:
        """(H, W) uint8: 0 for background, label + 1 elsewhere."""
        return np.append(self.labels + 1, 0).astype(np.uint8)[self.owner]


def draw_scene(rng: np.random.Generator, settings: ShapesSettings, held_out: bool = False) -> Scene:
    """Draw one scene of max_objects / 2 to max_objects shapes, or fewer without room; later ones cover earlier ones.

    A shape that would leave an earlier one with less than MIN_VISIBLE of its area, or itself be cut so far by the
    border, is placed anew: every object in the image is thus annotated and can be recognised.

    Args:
        held_out: one of the shapes is of those that the settings hold out; else none is.
    """
    height, width = rng.integers(settings.min_side, settings.max_side + 1, size=2)
    image = draw_background(rng, height, width)
    if settings.captions:
        image *= DIMMED  # so that each of COLORS stands out
    scenery = image.mean(axis=(0, 1))
    owner = np.full((height, width), -1)
    shapes: list[Shape] = []
    colors: list[str] = []
    count = rng.integers((settings.max_objects + 1) // 2, settings.max_objects + 1)
    for label, name in _kinds(rng, int(count), settings, held_out):
        for _ in range(MAX_ATTEMPTS):
            shape = Shape.random(rng, label, height, width, settings.min_size)
            distance = shape.distance(height, width)
            covered = np.where(distance < 0, len(shapes), owner)
            if _all_visible(covered, [*shapes, shape]):
                owner = covered
                shapes.append(shape)
                colors += [name] if name else []
                around, coat = surroundings(distance), Coat.random(rng, scenery, height, width, name)
                assert around is not None
                coat.paint(image, distance, around, coat.pattern[around])
                break
    image += rng.normal(scale=rng.uniform(0, 0.04), size=image.shape)
    pixels = np.round(255 * image.clip(0, 1)).astype(np.uint8)
    labels = np.array([shape.label for shape in shapes], dtype=np.int64)
    return Scene(pixels, owner, bounds(owner, len(shapes)), labels, tuple(colors))


def _kinds(
    rng: np.random.Generator, count: int, settings: ShapesSettings, held_out: bool
) -> Iterator[tuple[int, str | None]]:
    """The label of each shape to draw, and its colour's name if it has one, drawn in turn."""
    if not settings.captions:
        for _ in range(count):
            yield int(rng.integers(len(CLASSES))), None
        return
    others = [pair for pair in PAIRS if pair not in settings.held_out]
    first = str(rng.choice(settings.held_out)) if held_out else str(rng.choice(others))
    rest = [pair for pair in (PAIRS if held_out else others) if pair != first]
    for pair in [first, *rng.permutation(rest)[: count - 1]]:
        color, shape = pair.split()
        yield CLASSES.index(shape), color


@dataclass(frozen=True)
class Shape:
    """A shape of CLASSES[label], turned and stretched; `radii` are its half axes in pixels."""

    label: int
    center: np.ndarray  # (2,) x y
    radii: np.ndarray  # (2,)
    angle: float

    @classmethod
    def random(cls, rng: np.random.Generator, label: int, height: int, width: int, min_size: int) -> "Shape":
        size = np.exp(rng.uniform(np.log(min_size), np.log(0.6 * min(height, width))))
        center = rng.uniform(size=2) * (width, height)
        radii = size / 2 * np.array([1, rng.uniform(0.6, 1)])
        return cls(label, center, radii, angle=rng.uniform(0, 2 * np.pi))

    def distance(self, height: int, width: int) -> np.ndarray:
        """(H, W) about the signed distance in pixels from the outline to pixel centers, negative inside."""
        x = np.arange(width) + 0.5 - self.center[0]
        y = np.arange(height)[:, None] + 0.5 - self.center[1]
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        u, v = (cos * x + sin * y) / self.radii[0], (cos * y - sin * x) / self.radii[1]
        outline, _ = SHAPES[CLASSES[self.label]]
        return outline(u, v) * self.radii.min()

    def area(self) -> float:
        """Area in pixels where nothing covers or cuts the shape."""
        return SHAPES[CLASSES[self.label]][1] * float(self.radii.prod())


def _star(u: np.ndarray, v: np.ndarray, points: int = 5, inner: float = 0.42) -> np.ndarray:
    """Folded to one half of a point, where the outline is the line from its valley (inner, 0) to its tip."""
    half = np.pi / points
    radius, angle = np.hypot(u, v), abs(np.arctan2(v, u) % (2 * half) - half)
    tip = np.array([np.cos(half), np.sin(half)])
    normal = np.array([tip[1], inner - tip[0]]) / np.hypot(tip[0] - inner, tip[1])
    return normal[0] * (radius * np.cos(angle) - inner) + normal[1] * radius * np.sin(angle)


def _cross(u: np.ndarray, v: np.ndarray, arm: float = 0.32) -> np.ndarray:
    u, v = abs(u), abs(v)
    return np.minimum(np.maximum(u - 0.95, v - arm), np.maximum(u - arm, v - 0.95))


# Of a shape of radius about 1 at the origin: the signed distance of points (u, v) from its outline, and its area.
SHAPES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], float]] = {
    "ellipse": (lambda u, v: np.hypot(u, v) - 1, np.pi),
    "rectangle": (lambda u, v: np.maximum(abs(u), abs(v)) - 0.85, 1.7**2),
    "triangle": (lambda u, v: np.maximum(np.sqrt(3) / 2 * abs(u) - v / 2, v) - 0.5, 3 * np.sqrt(3) / 4),
    "star": (_star, 5 * 0.42 * np.sin(np.pi / 5)),
    "cross": (_cross, 4 * (2 * 0.95 * 0.32 - 0.32**2)),
    "ring": (lambda u, v: abs(np.hypot(u, v) - 0.72) - 0.28, np.pi * (1 - 0.44**2)),
}
CLASSES = tuple(SHAPES)
COLORS = {  # RGB, 0..1, of the colours that captions name
    "red": (0.85, 0.1, 0.1),
    "yellow": (0.95, 0.85, 0.1),
    "green": (0.1, 0.7, 0.15),
    "blue": (0.15, 0.2, 0.9),
    "purple": (0.6, 0.15, 0.75),
    "white": (0.97, 0.97, 0.97),
}
PAIRS = tuple(f"{color} {shape}" for color in COLORS for shape in CLASSES)
DIMMED = 0.5  # of a background's brightness


def _all_visible(owner: np.ndarray, shapes: list[Shape]) -> bool:
    visible = np.bincount(owner.ravel() + 1, minlength=len(shapes) + 1)[1:]
    if (visible < MIN_VISIBLE * np.array([shape.area() for shape in shapes])).any():
        return False
    boxes = bounds(owner, len(shapes))
    return bool((boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all())


def bounds(owner: np.ndarray, count: int) -> np.ndarray:
    """(count, 4) x1 y1 x2 y2 of each object's pixels, ends excluded; zeros of one that has none."""
    nothing = (slice(0, 0), slice(0, 0))
    slices = (found or nothing for found in ndimage.find_objects(owner + 1, max_label=count))
    return np.array([(x.start, y.start, x.stop, y.stop) for y, x in slices], dtype=np.int64).reshape(count, 4)


@dataclass(frozen=True)
class Coat:
    """How a shape looks: from a color to a shade of it, pixel by pixel as a pattern says."""

    color: np.ndarray  # (3,)
    shade: np.ndarray  # (3,)
    pattern: np.ndarray  # (H, W) in 0..1
    outlined: bool

    @classmethod
    def random(
        cls, rng: np.random.Generator, scenery: np.ndarray, height: int, width: int, name: str | None = None
    ) -> "Coat":
        """In the colour of that name if there is one, else in one far from that of the scenery (3,)."""
        color = _color(rng, unlike=scenery) if name is None else (COLORS[name] + rng.normal(0, 0.04, 3)).clip(0, 1)
        strength = rng.uniform(0.3, 0.65) if name is None else rng.uniform(0, 0.3)
        shade = max(strength * color, 1 - strength * (1 - color), key=lambda tone: np.linalg.norm(tone - scenery))
        if name is not None:
            shade = (1 - strength) * color  # towards white it would be another colour
        pattern = _pattern(rng, height, width)
        return cls(color, shade, pattern, outlined=name is None and rng.uniform() < 0.3)

    def paint(self, image: np.ndarray, distance: np.ndarray, around: tuple[slice, slice], pattern: np.ndarray) -> None:
        """Blend a shape into the image in place, its edge smoothed over one pixel.

        Args:
            distance: (H, W) from its outline, see `Shape.distance`.
            around: where it changes the image at all, see `surroundings`.
            pattern: that of the pixels there.
        """
        fill = self.color + pattern[..., None] * (self.shade - self.color)
        distance = distance[around]
        if self.outlined:
            outline = (distance + 2.5).clip(0, 1)[..., None]
            fill += outline * (0.3 * self.color - fill)
        coverage = (0.5 - distance).clip(0, 1)[..., None]
        image[around] += coverage * (fill - image[around])


def surroundings(distance: np.ndarray) -> tuple[slice, slice] | None:
    """The rows and columns of an image that a shape at this distance changes; None if it lies outside."""
    found = ndimage.find_objects((distance < 0.5).astype(int))
    return found[0] if found else None


def _pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W) in 0..1: how far each pixel goes from the first color to the second."""
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.arange(width), np.arange(height)[:, None]
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    period = rng.uniform(5, 12)
    kind = rng.choice(["plain", "gradient", "stripes", "checks", "blotches"], p=[0.3, 0.25, 0.2, 0.1, 0.15])
    if kind == "plain":
        return np.zeros((height, width))
    if kind == "gradient":
        return (along - along.min()) / np.ptp(along)
    if kind == "blotches":
        return _blotches(rng, height, width, cell=6)
    wave = np.sin(2 * np.pi * along / period)
    if kind == "checks":
        wave = wave * np.sin(2 * np.pi * across / period)
    return (0.5 + 2 * wave).clip(0, 1)


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) a muted color that drifts into another, with soft blotches."""
    hue, value = rng.uniform(), rng.uniform(0.15, 0.9)
    first = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0, 0.4), value))
    second = (first + rng.uniform(-0.2, 0.2, size=3)).clip(0, 1)
    pattern = 0.5 * _pattern(rng, height, width) + 0.5 * _blotches(rng, height, width, cell=24)
    return first + pattern[..., None] * (second - first)


def _blotches(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    coarse = rng.uniform(size=(height // cell + 2, width // cell + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


def _color(rng: np.random.Generator, unlike: np.ndarray) -> np.ndarray:
    """A strong color at some distance from the given one."""
    while True:
        color = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.4, 1), rng.uniform(0.3, 1)))
        if np.linalg.norm(color - unlike) > 0.45:
            return color
