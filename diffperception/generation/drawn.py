"""Whether pictures of the shapes data set show what their captions say: colours, shapes, and their places.

Nothing is learned for it: what is of a colour that captions name is an object, and the shape whose outline fits it best
is its own. How often that is right on real pictures is to be said beside each figure.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from torchvision.transforms.v2.functional import resize

from diffperception.data.captions import read_captions
from diffperception.data.images import read_image, to_float
from diffperception.data.listing import list_images
from diffperception.data.shapes import CLASSES, COLORS, SHAPES
from diffperception.data.shapes_captions import CHINESE, RELATIONS
from diffperception.table import format_table

CHROMA, LIGHT = 0.3, 0.6  # of a colour, least difference of its channels; of white, its least channel
LEAST = 0.01  # of the image's area, for an object
FINE, ROOM = 32, 1.15  # side of the raster on which outlines are compared, in cells, and in lengths of a shape
BEYOND = (0.0, 0.2, 0.4, 0.6)  # of what is seen of it, how far a shape may go on beyond the image's border
EDGE = 3  # pixels, of an image so enlarged, that an outline may be blurred over
SHARP = 96  # pixels that an image's shorter side has at least when its colours are told apart
STRETCHES, ANGLES = (1.0, 0.8, 0.6), 16
WORDS = {word: word for word in (*COLORS, *CLASSES, *RELATIONS)}
WORDS |= {CHINESE[word]: word for word in (*COLORS, *CLASSES)} | {chinese: word for word, chinese in RELATIONS.items()}
WORD = re.compile("|".join(sorted(WORDS, key=len, reverse=True)))
# By relation: which coordinate, x or y, and whether the first thing's is smaller.
PLACES = {"left of": (0, True), "right of": (0, False), "above": (1, True), "below": (1, False)}


class Thing(NamedTuple):
    """An object that a picture shows."""

    color: str
    shape: str
    center: tuple[float, float]  # x, y in pixels of the image, enlarged if it was small


class Statement(NamedTuple):
    """What a caption says."""

    things: list[tuple[str, str]]  # colour and shape
    relation: str | None  # of the first thing to the second


@dataclass(frozen=True)
class DrawnScores:
    """Shares of pictures that show what their captions say.

    Args:
        images: how many pictures there are.
        related: how many have a caption that says what is beside or above what.
        colors: show the colours that are named, and no others.
        shapes: show the shapes that are named, and no others.
        things: each shape has its colour too.
        order: of those related, show both colours where they shall be.
    """

    images: int
    related: int
    colors: float
    shapes: float
    things: float
    order: float


def statement_of(caption: str) -> Statement:
    """What a caption of the shapes data set says, in English or Chinese; ValueError for another."""
    found = [WORDS[word] for word in WORD.findall(caption.casefold())]
    relations = [word for word in found if word in RELATIONS]
    things = [word for word in found if word not in RELATIONS]
    pairs = list(zip(things[::2], things[1::2], strict=False))
    if not pairs or len(things) % 2 or any(c not in COLORS or s not in CLASSES for c, s in pairs):
        raise ValueError(f"{caption!r} is no caption of the shapes data set, which names colours and their shapes")
    return Statement(pairs, relations[0] if relations and len(pairs) == 2 else None)


def things_in(image: np.ndarray) -> list[Thing]:
    """The objects of named colours in a picture (H, W, 3), 0..1."""
    factor = -(-SHARP // min(image.shape[:2]))
    if factor > 1:
        image = ndimage.zoom(image, (factor, factor, 1), order=3, grid_mode=True, mode="nearest")
    colors = _colors_of(image)
    found = []
    for index, name in enumerate(COLORS):
        parts, count = ndimage.label(colors == index, np.ones((3, 3)))
        for part in range(1, count + 1):
            mask = parts == part
            if mask.sum() >= LEAST * mask.size:
                y, x = ndimage.center_of_mass(mask)
                found.append(Thing(name, _shape_of(_outlined(image, mask)), (float(x), float(y))))
    return found


def is_drawn(image: np.ndarray, said: Statement) -> tuple[bool, bool, bool, bool | None]:
    """Whether a picture shows the colours, the shapes, the things and the order of a caption, if that says one."""
    seen = things_in(image)
    colors, shapes, things = (
        sorted(thing[part] for thing in seen) == sorted(thing[part] for thing in said.things)
        for part in (slice(0, 1), slice(1, 2), slice(0, 2))
    )
    if said.relation is None:
        return colors, shapes, things, None
    axis, smaller = PLACES[said.relation]
    first, second = ([thing.center[axis] for thing in seen if thing.color == color] for color, _ in said.things)
    if said.things[0][0] == said.things[1][0]:  # of one colour: told apart by shape
        first, second = ([t.center[axis] for t in seen if (t.color, t.shape) == pair] for pair in said.things)
    placed = len(first) == len(second) == 1 and (first[0] < second[0]) == smaller
    return colors, shapes, things, placed


def judge_drawn(images: str | Path, captions: str | Path, size: tuple[int, int] | None = None) -> DrawnScores:
    """Look through pictures of a folder, each by the first of its captions, which names all that it shall show.

    Args:
        images: the folder.
        captions: COCO file of captions of the shapes data set, in English or Chinese.
        size: height and width that pictures are resized to before they are looked at, as those of a generator are.

    Raises:
        FileNotFoundError, ValueError: there are no such files, or no captions of shapes.
    """
    said = read_captions(captions).of_paths(list_images(images, captions).paths, images)
    wanted = {path: statement_of(texts[0]) for path, texts in said.items()}
    rows = [is_drawn(_read(path, size), statement) for path, statement in wanted.items()]
    placed = [order for *_, order in rows if order is not None]
    colors, shapes, things = (float(np.mean([row[part] for row in rows])) for part in range(3))
    return DrawnScores(len(rows), len(placed), colors, shapes, things, float(np.mean(placed)) if placed else np.nan)


def drawn_table(columns: dict[str, DrawnScores]) -> str:
    """The scores of several folders beside one another, as lines of text."""
    names = {"colors": "colours, as a set", "shapes": "shapes, as a set", "things": "each shape in its colour"}
    rows = [(said, *(f"{getattr(s, name):.3f}" for s in columns.values())) for name, said in names.items()]
    orders = (f"{s.order:.3f} of {s.related}" if s.related else "none told" for s in columns.values())
    rows.append(("order of the colours", *orders))
    rows.append(("pictures", *(str(s.images) for s in columns.values())))
    return format_table(rows, ["drawn right", *columns])


def _read(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    image = to_float(read_image(path))
    image = image if size is None else resize(image, list(size), antialias=True)
    return image.permute(1, 2, 0).numpy()


def _colors_of(image: np.ndarray) -> np.ndarray:
    """(H, W) int64: which of COLORS each pixel has, -1 for none; shades of one have its direction from black."""
    palette = np.array(list(COLORS.values()))
    bright = image.max(2, keepdims=True)
    away = np.linalg.norm(
        image[:, :, None] / bright.clip(1e-3)[..., None] - palette / palette.max(1, keepdims=True), axis=3
    )
    strong = (image.max(2) - image.min(2) > CHROMA) | (image.min(2) > LIGHT)
    return np.where(strong, away.argmin(2), -1)


def _outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The object of a mask (H, W) bool up to where it is mixed half with what is around it."""
    around = ndimage.binary_dilation(mask, iterations=EDGE)
    ring = ndimage.binary_dilation(around, iterations=EDGE) & ~around
    core = ndimage.binary_erosion(mask, iterations=EDGE, border_value=1)
    if not ring.any():
        return mask
    inner, outer = (np.median(image[part], axis=0) for part in (core if core.any() else mask, ring))
    share = (image - outer) @ (inner - outer) / np.square(inner - outer).sum()
    return around & (share > 0.5)


def _shape_of(mask: np.ndarray) -> str:
    """The shape whose outline fits a mask (H, W) bool best, of all turns and stretches.

    Where the mask ends at the image's border, the shape may go on beyond it, where nothing is compared.
    """
    height, width = mask.shape
    y, x = np.nonzero(mask)
    ends = []  # of the shape, on the left, right, upper and lower side, as they may be
    for low, high, limit in ((x.min(), x.max() + 1, width), (y.min(), y.max() + 1, height)):
        for end, way, cut in ((low, -1, low == 0), (high, 1, high == limit)):
            ends.append([end + way * grown * (high - low) for grown in (BEYOND if cut else (0.0,))])
    outlines, labels = _templates()
    best = (-1.0, 0)
    for left, right, top, bottom in product(*ends):
        step = ROOM * max(right - left, bottom - top) * ((np.arange(FINE) + 0.5) / FINE - 0.5)
        columns, rows = (np.floor(middle + step).astype(int) for middle in ((left + right) / 2, (top + bottom) / 2))
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None]
        seen = mask[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)] & inside
        overlap = (outlines & seen).sum((1, 2)) / (outlines & inside | seen).sum((1, 2))
        best = max(best, (float(overlap.max()), int(labels[overlap.argmax()])))
    return CLASSES[best[1]]


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """(N, FINE, FINE) bool of all shapes, turned and stretched, each as large as it fits, and (N,) their labels."""
    found = [(_template(label, *way), label) for label in range(len(CLASSES)) for way in _ways()]
    return np.stack([outline for outline, _ in found]), np.array([label for _, label in found])


def _ways() -> Iterator[tuple[float, float]]:
    return ((stretch, 2 * np.pi * turn / ANGLES) for stretch in STRETCHES for turn in range(ANGLES))


def _template(label: int, stretch: float, angle: float) -> np.ndarray:
    """A shape whose bounds are as those of what :func:`_shape_of` looks at."""
    fine = np.linspace(-1.3, 1.3, 4 * FINE)
    inside = _inside(label, stretch, angle, *np.meshgrid(fine, fine))
    y, x = np.nonzero(inside)
    side = ROOM * max(np.ptp(fine[x]), np.ptp(fine[y]))
    middle = [(fine[each].min() + fine[each].max()) / 2 for each in (x, y)]
    steps = side * ((np.arange(FINE) + 0.5) / FINE - 0.5)
    return _inside(label, stretch, angle, *np.meshgrid(middle[0] + steps, middle[1] + steps))


def _inside(label: int, stretch: float, angle: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    outline, _ = SHAPES[CLASSES[label]]
    return outline(cos * x + sin * y, (cos * y - sin * x) / stretch) < 0
