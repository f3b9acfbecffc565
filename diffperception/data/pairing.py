"""Which mask belongs to which image: by their paths below two folders."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffperception.data.listing import files_below

LOSSLESS = (".bmp", ".gif", ".npy", ".pgm", ".png", ".tif", ".tiff")  # endings of masks
LOSSY = (".jpeg", ".jpg", ".jp2", ".webp")  # of files that give other numbers than were put in


@dataclass(frozen=True)
class Pairing:
    """Images with their masks, in the images' order; and the files that are left over."""

    root: Path  # the folder above all images
    pairs: list[tuple[Path, Path]]
    unlabelled: list[Path]  # images without a mask
    unused: list[Path]  # masks without an image
    notes: list[str] = field(default_factory=list)  # on what was not listed

    def remarks(self) -> list[str]:
        """What is passed over, a line each."""
        counted = {"images without a mask": self.unlabelled, "masks without an image": self.unused}
        named = {kind: f"{paths[0]}{', ...' * (len(paths) > 1)}" for kind, paths in counted.items() if paths}
        return [*self.notes, *(f"left out: {len(counted[kind])} {kind} ({names})" for kind, names in named.items())]


@dataclass(frozen=True)
class _Names:
    """The names that a file goes by when its partner is looked for."""

    path: Path
    names: tuple[str, ...]

    def folded(self) -> set[str]:
        return {name.casefold() for name in self.names}


def find_pairs(
    images: Sequence[Path],
    root: Path,
    masks: Path,
    image_suffix: str = "",
    mask_suffix: str = "",
) -> Pairing:
    """Pair the images below `root` with the masks below `masks`.

    The mask of a/b.jpg is a/b.png or a/b.npy or of another lossless format, or a/b.jpg.png; names may differ in case.
    With suffixes such as _photo and _mask that of a/b_photo.jpg is a/b_mask.png. Where both lie in one folder, what is
    the mask of another file is no image.

    Raises:
        FileNotFoundError: there is no folder of masks.
        ValueError: an image has two masks, two images share one, or a mask is of a lossy format.
    """
    if not masks.is_dir():
        raise FileNotFoundError(f"there is no folder of masks {masks}")
    place, place_of_masks = root.resolve(), masks.resolve()
    same = place == place_of_masks
    if not same and place_of_masks.is_relative_to(place):
        folders = {path.parent: path.parent.resolve() for path in images}
        images = [path for path in images if not folders[path.parent].is_relative_to(place_of_masks)]
    beside = root if not same and place.is_relative_to(place_of_masks) else None
    listed = files_below(masks, {*LOSSLESS, *LOSSY}, beside)
    files = [file for path in listed if (file := _names(path, masks, mask_suffix)).names]
    found = [file for file in files if file.path.suffix.lower() in LOSSLESS]
    wanted = [_names(path, root, image_suffix, whole=True) for path in images]
    chosen = _choose(wanted, found, same)
    taken = set(chosen.values())
    unused = [mask.path for mask in found if mask.path not in taken and (mask_suffix or not same)]
    if same:
        wanted = [image for image in wanted if image.path not in taken and image.path not in unused]
    without = [image for image in wanted if image.path not in chosen]
    if not same:
        _refuse_lossy(without, [file for file in files if file.path.suffix.lower() in LOSSY])
    pairs = [(image.path, chosen[image.path]) for image in wanted if image.path in chosen]
    return Pairing(root, pairs, [image.path for image in without], unused)


def require_pairs(
    pairing: Pairing, root: Path, masks: Path, unlabelled: Literal["stop", "skip"] = "stop", whole: bool = True
) -> None:
    """ValueError if no image has a mask, or one has none though `unlabelled` is stop.

    Args:
        whole: all images of the folder were looked at, so that masks without an image may be meant for others.
    """
    left = pairing.unlabelled
    hint = _hint(left, pairing.unused, root, masks) if left and pairing.unused and whole else ""
    if not pairing.pairs:
        raise ValueError(
            f"no image in {root} has a mask in {masks}{hint}: a mask has its image's path and name, but ends in"
            f" {', '.join(LOSSLESS[:-1])} or {LOSSLESS[-1]}; what more their names have, say with `mask_suffix` and"
            " `image_suffix`"
        )
    if left and unlabelled == "stop":
        others = f", nor have {len(left) - 1} others" if len(left) > 1 else ""
        raise ValueError(
            f"the image {left[0]} has no mask in {masks}{others}{hint}: add masks, list the images that have one in a"
            " file for `annotations`, or set `unlabelled` to skip"
        )


def _names(path: Path, root: Path, suffix: str, whole: bool = False) -> _Names:
    """The path below its folder without ending and suffix; and, `whole`, with its ending. None without the suffix."""
    relative = path.relative_to(root)
    stem = unicodedata.normalize("NFC", relative.with_suffix("").as_posix())
    if not stem.casefold().endswith(suffix.casefold()):
        return _Names(path, ())
    stem = stem[: len(stem) - len(suffix)]
    return _Names(path, (stem, unicodedata.normalize("NFC", relative.as_posix())) if whole else (stem,))


def _choose(images: Sequence[_Names], masks: Sequence[_Names], same: bool) -> dict[Path, Path]:
    """The mask of each image that has one: of the same letters, or else of the same but for their case."""
    exact, folded = defaultdict(list), defaultdict(list)
    for mask in masks:
        exact[mask.names[0]].append(mask.path)
        folded[mask.names[0].casefold()].append(mask.path)
    chosen: dict[Path, Path] = {}
    for image in images:
        own = {image.path} if same else set()
        for known, names in ((exact, image.names), (folded, sorted(image.folded()))):
            fitting = [mask for name in names for mask in known.get(name, []) if mask not in own]
            if len(fitting) > 1:
                raise ValueError(f"the image {image.path} has two masks, {fitting[0]} and {fitting[1]}: keep one")
            if fitting:
                chosen[image.path] = fitting[0]
                break
    _refuse_shared(chosen)
    taken = set(chosen.values())
    for image in images:
        others = [mask for name in image.folded() for mask in folded.get(name, []) if mask not in taken]
        others = [mask for mask in others if mask != image.path]
        if image.path in chosen and others:
            raise ValueError(f"the image {image.path} has two masks, {chosen[image.path]} and {others[0]}: keep one")
    return chosen


def _refuse_shared(chosen: dict[Path, Path]) -> None:
    owners: dict[Path, Path] = {}
    for image, mask in chosen.items():
        if mask in owners:
            raise ValueError(
                f"the images {owners[mask]} and {image} have one mask, {mask}: remove one, or name masks after their"
                f" whole names, such as {image.name}{mask.suffix}"
            )
        owners[mask] = image


def _refuse_lossy(images: Iterable[_Names], lossy: Iterable[_Names]) -> None:
    known = {mask.names[0].casefold(): mask.path for mask in lossy}
    for image in images:
        if mask := next((known[name] for name in image.folded() if name in known), None):
            raise ValueError(
                f"the mask {mask} is of a lossy format, which changes the numbers of classes: save masks as PNG anew"
            )


def _hint(images: Sequence[Path], masks: Sequence[Path], root: Path, folder: Path) -> str:
    """Examples of names on both sides, and the suffix that masks have where it is plain."""
    image, mask = images[0].relative_to(root), masks[0].relative_to(folder)
    said = f" (images are named such as {image}, masks such as {mask}"
    stems = {path.relative_to(root).with_suffix("").as_posix() for path in images}
    rest = Counter[str]()
    for path in masks:
        name = path.relative_to(folder).with_suffix("").as_posix()
        rest.update(name[cut:] for cut in range(1, len(name)) if name[:cut] in stems)
    suffix, count = rest.most_common(1)[0] if rest else ("", 0)
    return said + (f"; {count} would fit with `mask_suffix` {suffix})" if count else ")")
