"""Listing images: those of a folder, a pattern or a list, always in the same order; and what was left out."""

import glob
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from diffperception.data.annotations import read_coco
from diffperception.files import is_in, read_lines

# Files with these endings Pillow knows, but does not read without the programs of others, or at all.
UNREADABLE = {".bufr", ".emf", ".eps", ".grib", ".h5", ".hdf", ".iim", ".mpeg", ".mpg", ".ps", ".wmf"}
HEIF = {".heic", ".heics", ".heif", ".heifs", ".hif"}  # `read_image` reads these with pillow-heif
AVIF = {".avif", ".avifs"}  # that a Pillow built without its reader does not name
MPO = {".mpo"}  # two JPEGs in one, of stereo cameras, which Pillow's reader of JPEG reads
HIDDEN = {"__MACOSX", "@eaDir"}  # the companions of macOS in archives; thumbnails of Synology's disks
SHOWN = 4  # names of hidden files, and endings, in a remark


class Listing(NamedTuple):
    """The folder above all images; the images, sorted by their names; and in a line what was left out, if anything."""

    root: Path
    paths: list[Path]
    remark: str = ""


@cache
def image_endings() -> frozenset[str]:
    """The endings, in lower case, of the files that count as images: those that Pillow reads, HEIF and AVIF."""
    known = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
    return frozenset(known | HEIF | AVIF | MPO) - UNREADABLE


def list_images(source: str | Path, names: str | Path | None = None, leave_out: Path | None = None) -> Listing:
    """The image files that a source names.

    In a folder and its subfolders these are the files with the `image_endings`, in any case, but for hidden ones. Links
    are followed: a linked file counts under each of its names, a linked folder once, so links may lead in circles.

    Args:
        source: an image, a folder, a pattern such as 'photos/*.jpg', or a list, see `names`, in its images' folder.
        names: only images of the folder `source` that are listed in this COCO file (.json), or this text file with a
            name, below the folder and with or without its ending, in each line.
        leave_out: a folder whose files do not count, such as a command's own output.

    Raises:
        FileNotFoundError: there is nothing of that name, no image in it, or one that is listed is missing.
        ValueError: all is in the folder `leave_out`, or a list names nothing, or one name fits several images.
    """
    path, left = Path(source), _LeftOut(leave_out)
    if names is not None:
        if not path.is_dir():
            raise FileNotFoundError(f"there is no folder {path} with the images that {names} lists")
        root, found = path, _listed(path, Path(names), left)
    elif path.is_dir():
        root, found = path, list(_below(path, left))
    elif path.suffix.lower() in (".json", ".txt") and path.is_file():
        root, found = path.parent, _listed(path.parent, path, left)
    else:
        found = [path] if path.is_file() else list(_matching(str(source), left))
        root = Path(os.path.commonpath([match.parent for match in found])) if found else path
    found = sorted(left.without_output(found), key=_order)
    left.require_some(found, source)
    if not all(each.is_relative_to(root) for each in found):  # a list may name other folders
        root = Path(os.path.commonpath([each.absolute().parent for each in found]))
        found = [each.absolute() for each in found]
    return Listing(root, found, left.remark(source))


def files_below(folder: Path, endings: Set[str], leave_out: Path | None = None) -> list[Path]:
    """The files of other endings, in lower case, in a folder and its subfolders, found and sorted as images are."""
    left = _LeftOut(leave_out, endings)
    return sorted(left.without_output(_below(folder, left)), key=_order)


def _order(path: Path) -> tuple[list[str], Path]:
    """By the letters' numbers, alike on all systems: some spell ü as one letter and some as two."""
    return [unicodedata.normalize("NFC", part) for part in path.parts], path


def _below(folder: Path, left: "_LeftOut") -> Iterator[Path]:
    starts, seen = [folder], set()
    for start in starts:  # grows by the links that are met, so that a folder's own place comes before links to it
        for here, folders, files in os.walk(start, onerror=left.no_permission):
            real = os.path.realpath(here)
            if real in seen:
                left.linked += 1
                folders.clear()
                continue
            seen.add(real)
            # Of a command's own output only the images are counted.
            counts = _LeftOut(None) if left.output is not None and is_in(Path(real), left.output) else left
            folders[:] = sorted(counts.without_hidden(folders))
            starts += [Path(here, name) for name in folders if Path(here, name).is_symlink()]
            yield from counts.images(Path(here, name) for name in counts.without_hidden(files))


def _matching(pattern: str, left: "_LeftOut") -> Iterator[Path]:
    matches = [Path(name) for name in glob.glob(pattern, recursive=True)]
    if not matches:
        hint = ", nor does it match as a pattern" if glob.has_magic(pattern) else ""
        raise FileNotFoundError(f"there is no image or folder {pattern}{hint}")
    return left.images(match for match in matches if match.is_file())


def _listed(folder: Path, listing: Path, left: "_LeftOut") -> list[Path]:
    names = _names_in(listing)
    if not names:
        raise ValueError(f"{listing} lists no image: it must have a file name per line, or be a COCO file")
    found = {name: Path(os.path.normpath(folder / name.replace("\\", "/"))) for name in names}
    if missing := [name for name, path in found.items() if not path.is_file()]:
        others = _by_spelling(folder)
        for name in missing:
            if len(candidates := others.get(spelling(name), [])) > 1:
                raise ValueError(f"{listing} lists {name}, which may be any of {_some(candidates)}: give the ending")
            found[name] = candidates[0] if candidates else found[name]
        if missing := [str(path) for path in found.values() if not path.is_file()]:
            raise FileNotFoundError(f"{listing} lists {missing[0]}, which is missing, among {len(missing)} in all")
    paths = set(found.values())
    left.twice += len(names) - len(paths)
    return list(paths)


def _names_in(listing: Path) -> list[str]:
    if not listing.is_file():
        raise FileNotFoundError(f"there is no file {listing}")
    if listing.suffix.lower() != ".json":
        return read_lines(listing)
    try:
        return [str(image["file_name"]) for image in read_coco(listing, lists=["images"])["images"]]
    except (KeyError, TypeError):
        raise ValueError(f"{listing} has an image without a file_name") from None


def _by_spelling(folder: Path) -> dict[str, list[Path]]:
    """The images below a folder by their names in one normal form of Unicode, with and without endings."""
    found: dict[str, list[Path]] = {}
    for path in _below(folder, _LeftOut(None)):
        name = path.relative_to(folder)
        for each in (name, name.with_suffix("")):
            found.setdefault(spelling(each.as_posix()), []).append(path)
    return found


def spelling(name: str) -> str:
    """A file's name in one normal form of Unicode, with slashes, so that names of one file are alike."""
    return unicodedata.normalize("NFC", os.path.normpath(name.replace("\\", "/")))


class _LeftOut:
    """Counts what a listing passes over."""

    def __init__(self, output: Path | None, endings: Set[str] | None = None) -> None:
        self.output, self.wanted = output, image_endings() if endings is None else endings
        self.hidden: list[str] = []
        self.endings: Counter[str] = Counter()
        self.in_output = self.linked = self.twice = self.closed = 0

    def no_permission(self, error: OSError) -> None:
        self.closed += 1

    def without_hidden(self, names: Iterable[str]) -> list[str]:
        kept: list[str] = []
        for name in names:
            (self.hidden if name.startswith(".") or name in HIDDEN else kept).append(name)
        return kept

    def images(self, paths: Iterable[Path]) -> Iterator[Path]:
        for path in paths:
            if (ending := path.suffix.lower()) in self.wanted:
                yield path
            else:
                self.endings[ending] += 1

    def without_output(self, paths: Iterable[Path]) -> list[Path]:
        if self.output is None:
            return list(paths)
        inside: dict[Path, bool] = {}
        kept = []
        for path in paths:
            if path.parent not in inside:
                inside[path.parent] = is_in(path.parent, self.output)
            if inside[path.parent]:
                self.in_output += 1
            else:
                kept.append(path)
        return kept

    def require_some(self, found: list[Path], source: str | Path) -> None:
        if found:
            return
        if self.in_output:
            raise ValueError(
                f"the images of {source} are in the output folder {self.output}, whose files are never read: choose an"
                " --output that does not hold them"
            )
        where = f"in the folder {source}" if Path(source).is_dir() else f"that {source} names"
        raise FileNotFoundError(f"there is no image {where}{f', but {others}' if (others := self._kinds()) else ''}")

    def remark(self, source: str | Path) -> str:
        return f"left out of {source}: {kinds}" if (kinds := self._kinds()) else ""

    def _kinds(self) -> str:
        others = sum(self.endings.values())
        endings = [ending or "no ending" for _, ending in sorted((-n, ending) for ending, n in self.endings.items())]
        parts = {
            f"{others} of other kinds ({_some(endings)})": others,
            f"{len(self.hidden)} hidden ({_some(sorted(set(self.hidden)))})": self.hidden,
            f"{self.in_output} in the output folder {self.output}": self.in_output,
            f"{self.linked} linked a second time": self.linked,
            f"{self.twice} listed a second time": self.twice,
            f"{self.closed} without permission to read": self.closed,
        }
        return ", ".join(text for text, number in parts.items() if number)


def _some(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
