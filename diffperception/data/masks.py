"""Images with a mask of labels each: what pixel classifiers learn from."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from diffperception.data.images import (
    BrokenImageError,
    LazyMap,
    open_image,
    read_image,
    read_size,
    resize_short_side,
    to_float,
)
from diffperception.data.listing import list_images
from diffperception.data.pairing import Pairing, find_pairs, require_pairs
from diffperception.data.split import part_of

IGNORE_INDEX = 255  # the label of pixels that have none
COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
LONGEST_NAME = 200  # letters of a class's name


@dataclass
class MaskDataOptions:
    """Which images and masks there are.

    Args:
        images: folder with images.
        masks: folder with their masks, of the same names: PNG or another lossless picture of one channel, or NPY, in
            each pixel its class's number.
        classes: names of the classes 0, 1, ...
        annotations: only the images are used that this COCO JSON file lists, or this text file with a name per line.
        max_images: use only so many of the images, chosen by the seed; null for all.
        unlabelled: what to do at an image without a mask: stop, naming it, or leave it out.
        val_images: folder with images to measure on; null for none.
        val_masks: folder with the masks of `val_images`.
        val_annotations: only those of `val_images` are used that this COCO JSON or text file lists.
        val_share: instead of `val_images`, this share of the images is held out to measure on, such as 0.1.
        split_seed: chooses them, with their names: images that are added move few others.
        ignore: the value in masks of pixels without a label; null for none.
        mask_values: class numbers of the values in masks where they differ, such as {0: 0, 255: 1}; or, where masks are
            painted, of their colours, such as {"#000000": 0, "#ff0000": 1}.
        mask_suffix: what the names of masks have after those of their images, such as _mask in a_mask.png for a.jpg.
        image_suffix: what the names of images have that those of their masks have not.
        short_side: work on images resized to this short side, best that which the generator learned from; scores
            are always measured at the masks' own size. null for no resizing.
    """

    images: Path
    masks: Path
    classes: list[str]
    annotations: Path | None = None
    max_images: PositiveInt | None = None
    unlabelled: Literal["stop", "skip"] = "stop"
    val_images: Path | None = None
    val_masks: Path | None = None
    val_annotations: Path | None = None
    val_share: float | None = None
    split_seed: NonNegativeInt = 0
    ignore: int | None = IGNORE_INDEX
    mask_values: dict[int, int] | dict[str, int] | None = None
    mask_suffix: str = ""
    image_suffix: str = ""
    short_side: PositiveInt | None = None

    def open(self, seed: int = 0) -> "MaskFolder":
        """The images to learn from, resized."""
        return MaskFolder(self, seed, learn=True)

    def resized(self, image: Tensor) -> Tensor:
        """An image (3, H, W) as it is worked on."""
        return resize_short_side(image, self.short_side)

    def open_val(self) -> "MaskFolder | None":
        """The images to measure on, at their own size."""
        if self.val_share is not None:
            if self.val_images is not None or self.val_masks is not None:
                raise ValueError("give either data.val_images or data.val_share, which holds images out of data.images")
            return MaskFolder(replace(self, max_images=None, short_side=None), held_out=True)
        if self.val_images is None or self.val_masks is None:
            if self.val_images is not self.val_masks:
                raise ValueError("give both data.val_images and data.val_masks, or neither")
            return None
        val = replace(self, images=self.val_images, masks=self.val_masks, annotations=self.val_annotations)
        return MaskFolder(replace(val, max_images=None, short_side=None))


class MaskFolder(Dataset[tuple[Tensor, Tensor]]):
    """The images of one folder with the masks of another, paired by their names, see :func:`find_pairs`.

    Sample i is (image, mask): float32 (3, h, w), RGB, 0..1, and int64 (h, w), 0..K-1 or 255. All masks are looked
    through at the beginning, and read again when they are asked for. An image and a mask are each turned as its own
    EXIF orientation says.

    Args:
        options: what there is, without `val_images`; an image resized to `short_side` is antialiased, its mask is not.
        seed: chooses `max_images` of the images; a larger number chooses the same and others.
        learn: whether it is to be learned from, which takes two classes.
        held_out: where `val_share` splits the images, whether these are the ones held out or the others.

    Attributes:
        names: the images' paths below their folder.
        images, masks: those of the samples, each read when it is asked for.
        notes: sentences that say what is passed over, and which classes no mask has.

    Raises:
        FileNotFoundError: there is no such folder, no image in it, or one that is listed is missing.
        ValueError: names of classes are not fit or there are over 255, an image has no mask or a wrong one, no pixel
            has a label, or there is nothing to tell apart.
    """

    def __init__(self, options: MaskDataOptions, seed: int = 0, learn: bool = False, held_out: bool = False) -> None:
        self.short_side = options.short_side
        self.values = MaskValues.of(options)
        pairing = open_pairs(options)
        pairs, subject = pairing.pairs, f"the masks in {options.masks}"
        if options.val_share is not None:
            images = [image for image, _ in pairs]
            chosen = set(part_of(images, pairing.root, options.val_share, options.split_seed, held_out))
            pairs = [pair for pair in pairs if pair[0] in chosen]
            subject += " that are held out" if held_out else " that are not held out"
        if options.max_images is not None:
            order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
            pairs = [pairs[i] for i in order.tolist()]
        pairs, others = pairs[: options.max_images], pairs[options.max_images or len(pairs) :]
        self.names = [str(image.relative_to(pairing.root)) for image, _ in pairs]
        counts: Counter[int] = Counter()
        for pair in pairs:
            counts += self.values.count(*pair)
        problem = self.values.problem(counts, learn)
        if problem and others and self.values.present(counts):  # other masks may show that it is the choice alone
            problem = self.values.problem(counts + self.values.seen(mask for _, mask in others), learn)
        if problem:
            raise ValueError(f"{subject} {problem}")
        absent = self.values.absent(counts)
        doubtful = "" if self.values.painted else differing_palettes(mask for _, mask in pairs)
        remarks = [f"{subject} {text}" for text in (absent, doubtful) if text]
        self.notes = [*pairing.remarks(), *remarks]
        self.images = LazyMap(self._image, [image for image, _ in pairs])
        self.masks = LazyMap(self._mask, [mask for _, mask in pairs])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.masks[index]

    def _image(self, path: Path) -> Tensor:
        return resize_short_side(to_float(read_image(path)), self.short_side)

    def _mask(self, path: Path) -> Tensor:
        labels = torch.from_numpy(self.values.labels(path))
        return resize_short_side(labels[None], self.short_side, nearest=True)[0]


def open_pairs(options: MaskDataOptions) -> Pairing:
    """The images of a folder, or those of them that a file lists, with their masks; errors: see :class:`MaskFolder`."""
    masks = Path(options.masks)
    root, paths, remark = list_images(options.images, options.annotations)
    found = find_pairs(paths, root, masks, options.image_suffix, options.mask_suffix)
    require_pairs(found, root, masks, options.unlabelled)
    # Where only some of the images are listed, the masks of the others are of no concern.
    unused = found.unused if options.annotations is None else []
    return replace(found, unused=unused, notes=[remark] if remark else [])


class MaskError(ValueError):
    """A mask that does not go with its image or has a value that is no class; `kind` is a short name of the fault."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class MaskValues:
    """What the values in masks mean: numbers, or colours as 0xRRGGBB.

    Args:
        classes: names of 0..K-1.
        label_of: the label, 0..K-1 or 255, of each value that may occur.
        ignored: the value that stands for no label without being named in `mask_values`.
        painted: whether values are colours.
    """

    classes: list[str]
    label_of: dict[int, int]
    ignored: int | None
    painted: bool

    @classmethod
    def of(cls, options: MaskDataOptions) -> "MaskValues":
        """ValueError for unfit names of classes, too many, or `mask_values` that lead to another than a class."""
        classes, values = check_names(options.classes), options.mask_values
        if len(classes) > IGNORE_INDEX:
            raise ValueError(
                f"there are {len(classes)} classes, but masks of labels hold at most {IGNORE_INDEX}: join some"
            )
        meant = None if values is None else {_value(value): label for value, label in values.items()}
        painted = values is not None and any(COLOUR.fullmatch(str(value)) for value in values)
        if painted and not all(COLOUR.fullmatch(str(value)) for value in values or ()):
            raise ValueError("`mask_values` has both colours and numbers: name all values in one way")
        if outside := sorted({*(meant or {}).values()} - {*range(len(classes)), IGNORE_INDEX}):
            raise ValueError(f"`mask_values` leads to {_some(outside)}, but the classes are 0 to {len(classes) - 1}")
        meant = {k: k for k in range(len(classes))} if meant is None else meant
        ignored = None if painted or options.ignore in (meant if values is not None else ()) else options.ignore
        return cls(classes, meant | ({} if ignored is None else {ignored: IGNORE_INDEX}), ignored, painted)

    def labels(self, path: Path) -> np.ndarray:
        """The labels in a mask's file, (H, W) int64; MaskError for unknown values."""
        mask = read_mask(path, self.painted)
        labels = np.full(mask.shape, -1, dtype=np.int64)
        for value, label in self.label_of.items():
            labels[mask == value] = label
        if (labels == -1).any():
            self._require_known(path, np.unique(mask).tolist())
        return labels

    def count(self, image: Path, path: Path) -> Counter[int]:
        """How many pixels of each value a mask has; MaskError or BrokenImageError if it does not go with its image."""
        mask, (height, width) = read_mask(path, self.painted), read_size(image)
        if mask.shape != (height, width):
            turned = orientation(image) > 4 and mask.shape == (width, height)
            why = "; EXIF turns the image, and a mask is drawn on what is seen" if turned else ""
            raise MaskError(
                "mask size",
                f"the mask {path} has {mask.shape[0]} x {mask.shape[1]} pixels, but its image {image} has"
                f" {height} x {width}: they must be alike{why}",
            )
        counts = _counts(mask)
        self._require_known(path, sorted(counts))
        return counts

    def _require_known(self, path: Path, values: Sequence[int]) -> None:
        if unknown := [value for value in values if value not in self.label_of]:
            raise MaskError(
                "unknown value",
                f"the mask {path} has the unknown value{'s' * (len(unknown) > 1)} {self._some(unknown)}; known are"
                f" {self._some(sorted(self.label_of))}: name all classes, or say with `mask_values` and `ignore` what"
                f" else the masks hold{self._advice(values)}",
            )

    def seen(self, masks: Iterable[Path]) -> Counter[int]:
        """The values in masks, of which none need be sound, until there are two classes among them."""
        counts: Counter[int] = Counter()
        for path in masks:
            with suppress(ValueError):
                counts += _counts(read_mask(path, self.painted))
            if len(self.present(counts)) > 1:
                break
        return counts

    def present(self, counts: Mapping[int, int]) -> set[int]:
        """The classes that have pixels."""
        return {self.label_of.get(value, IGNORE_INDEX) for value in counts} - {IGNORE_INDEX}

    def problem(self, counts: Mapping[int, int], learn: bool) -> str:
        """Why masks of so many pixels of each value will not do, to be read after `the masks`; empty if they do.

        Args:
            learn: whether they are to be learned from, not only measured on.
        """
        present, held = self.present(counts), f"they hold {self.describe(counts)}"
        swallowed = self.ignored == 255 and set(counts) == {0, 255} and len(self.classes) == 2
        if not present:
            return f"have no pixel of a class, all are ignored: label some, for {held}"
        if swallowed or (learn and len(present) < 2):
            missing = _some([name for k, name in enumerate(self.classes) if k not in present])
            what = f"no pixel of class {missing}" if missing else f"pixels of {self.classes[0]} alone"
            return f"have {what}: {held}{self._advice(list(counts))}"
        return ""

    def absent(self, counts: Mapping[int, int]) -> str:
        """Which classes no mask has, to be read after `the masks`; empty if there is none."""
        present = self.present(counts)
        missing = [name for k, name in enumerate(self.classes) if k not in present]
        if not missing:
            return ""
        alone = f"of {self.classes[min(present)]} alone, none" if len(present) == 1 else "none"
        return (
            f"have pixels {alone} of {_some(missing)}, of which nothing is learned or measured from them: they hold"
            f" {self.describe(counts)}"
        )

    def describe(self, counts: Mapping[int, int]) -> str:
        """`0 (3072 pixels) and 255 (1024 pixels, ignored)`."""
        parts = []
        for value, count in sorted(counts.items()):
            ignored = ", ignored" if self.label_of.get(value) == IGNORE_INDEX else ""
            parts.append(f"{self._some([value])} ({count} pixel{'s' * (count != 1)}{ignored})")
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)

    def per_class(self, counts: Mapping[int, int]) -> list[int]:
        """Pixels of each class."""
        totals = Counter[int]()
        for value, count in counts.items():
            totals[self.label_of.get(value, IGNORE_INDEX)] += count
        return [totals[label] for label in range(len(self.classes))]

    def _advice(self, values: Sequence[int]) -> str:
        """How masks with as many values as there are classes might be meant."""
        if len(values) != max(2, len(self.classes)) or sorted(values) == [*range(len(values))] or len(values) > 8:
            return ""
        colour = '"' * self.painted
        pairs = ", ".join(f"{colour}{self._some([v])}{colour}: {k}" for k, v in enumerate(sorted(values)))
        return f"; if these are the classes in turn, say mask_values '{{{pairs}}}'"

    def _some(self, values: Sequence[int]) -> str:
        return _some([f"#{value:06x}" if self.painted else value for value in values])


def _value(value: int | str) -> int:
    """The number that a key of `mask_values` names: 7, "7" or, of a colour, "#ff0000"."""
    try:
        return int(str(value)[1:], 16) if COLOUR.fullmatch(str(value)) else int(value)
    except ValueError:
        raise ValueError(f'`mask_values` names {value!r}, which is no number or colour such as "#ff0000"') from None


def check_names(classes: Sequence[str]) -> list[str]:
    """The names of classes; ValueError if two are alike, for scores are told by name, or one is no name."""
    for number, name in enumerate(classes):
        if not name.strip():
            raise ValueError(f"class {number} has an empty name: give it one")
        if name != name.strip() or any(unicodedata.category(letter) == "Cc" for letter in name):
            raise ValueError(
                f"the name of class {number}, {name!r}, has blanks around it or ends of lines: leave them out"
            )
        if len(name) > LONGEST_NAME:
            raise ValueError(f"the class {name[:40]}... has a name of {len(name)} letters: {LONGEST_NAME} are the most")
    if doubled := [name for i, name in enumerate(classes) if name in classes[:i]]:
        raise ValueError(f"two classes are named {doubled[0]}: give every class a name of its own")
    return list(classes)


def read_mask(path: Path, painted: bool = False) -> np.ndarray:
    """The numbers in a mask's file, (H, W), of a picture with a palette the places in it; ValueError for no mask.

    A picture is turned as its EXIF orientation says; grey that is written as equal channels is one.

    Args:
        painted: the numbers are the colours, 0xRRGGBB.
    """
    try:
        if path.suffix.lower() == ".npy":
            mask = np.load(path, allow_pickle=False)
        else:
            with open_image(path, "mask") as picture:
                mask = _pixels(ImageOps.exif_transpose(picture), painted)
    except BrokenImageError as error:
        raise MaskError("broken mask", str(error)) from None
    except Exception as error:  # Pillow and numpy raise many kinds on bad bytes
        raise MaskError("broken mask", f"the mask {path} cannot be read: {error}") from None
    mask = mask[..., 0] if mask.ndim == 3 and (mask.shape[2] == 1 or _is_grey(mask)) else mask
    if mask.ndim == 3 and path.suffix.lower() != ".npy":
        colours = np.unique(mask[..., :3].reshape(-1, 3), axis=0)
        first = ", ".join(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in colours[:3].tolist())
        raise MaskError(
            "painted mask",
            f"the mask {path} has colours ({first}{', ...' * (len(colours) > 3)}): say with `mask_values` which class"
            f' each is, such as {{"#000000": 0, "#ff0000": 1}}',
        )
    if mask.ndim != 2 or mask.dtype.kind not in "buif":
        raise MaskError(
            "no mask",
            f"the mask {path} has numbers of shape {mask.shape}: a mask has one channel, a class's number a pixel",
        )
    if mask.dtype.kind == "f" and not (np.isfinite(mask) & (mask == np.round(mask))).all():
        raise MaskError(
            "no mask", f"the mask {path} has numbers that are not whole: a mask holds the numbers of classes"
        )
    return mask


def differing_palettes(masks: Iterable[Path]) -> str:
    """What to say, after `the masks`, if a number is one colour in a file and another in the next; else empty.

    Programs that write few colours number them file by file, and then the numbers are no classes. Pixels are read only
    where the headers have several palettes.
    """
    palettes = {mask: _palette(mask) for mask in masks}
    if len({*palettes.values()} - {None}) < 2:
        return ""
    seen: dict[int, tuple[list[int], Path]] = {}
    for path in (mask for mask, palette in palettes.items() if palette):
        with suppress(BrokenImageError, OSError), open_image(path, "mask") as picture:
            palette = picture.getpalette() or []
            for number in np.unique(np.asarray(picture)).tolist():
                colour = palette[3 * number : 3 * number + 3]
                first, where = seen.setdefault(number, (colour, path))
                if colour != first:
                    names = ["#" + bytes(c).hex() for c in (first, colour)]
                    return (
                        f"have palettes that differ: {number} is {names[0]} in {where} and {names[1]} in {path};"
                        " classes are taken by number, so if the colours are meant, name them in `mask_values`"
                    )
    return ""


def _palette(mask: Path) -> bytes | None:
    """The colours in the header of a mask that is a picture with a palette."""
    if mask.suffix.lower() != ".npy":
        with suppress(BrokenImageError, OSError), open_image(mask, "mask") as picture:
            if picture.mode == "P" and picture.palette is not None:
                return bytes(picture.palette.palette)
    return None


def _pixels(picture: Image.Image, painted: bool) -> np.ndarray:
    """(H, W) numbers or, `painted`, colours; (H, W, channels) of several channels."""
    if not painted:
        return np.asarray(picture)
    red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB"), dtype=np.int64), -1, 0)
    return (red << 16) + (green << 8) + blue


def _is_grey(mask: np.ndarray) -> bool:
    """Whether the channels (H, W, channels) are one grey, but for an alpha that is everywhere the same."""
    alpha = mask[..., -1:] if mask.shape[2] in (2, 4) else mask[:1, :1, :1]
    colours = mask[..., : 1 if mask.shape[2] == 2 else 3]
    return mask.shape[2] in (2, 3, 4) and bool((colours == colours[..., :1]).all() and (alpha == alpha[:1, :1]).all())


def orientation(image: Path) -> int:
    """The EXIF orientation of an image, 1 if it is stored as it is seen, above 4 if it is turned by a quarter."""
    with open_image(image) as picture:
        return int(Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1))


def _counts(mask: np.ndarray) -> Counter[int]:
    values, counts = np.unique(mask, return_counts=True)
    return Counter(dict(zip(values.astype(int).tolist(), counts.tolist(), strict=True)))


def _some(things: Sequence[object]) -> str:
    return ", ".join(map(str, things[:8])) + (", ..." if len(things) > 8 else "")
