"""Finding the image that an annotation speaks of, whatever it calls it."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from diffperception.data.formats.collected import MarkedImage, Remarks
from diffperception.data.listing import list_images

UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts before the names of uploaded files


class ImageIndex:
    """The images below a folder, by name.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no image folder {folder}")
        self.names = [path.relative_to(folder).as_posix() for path in list_images(folder).paths]
        self._known = set(self.names)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            last = PurePosixPath(_plain(name))
            self._by_name[last.name].append(name)
            self._by_stem[last.stem].append(name)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def find(self, name: str) -> str | None:
        """The image that is meant by a name, a path on any machine, or an address; None if there is none.

        Its last part must agree, but for capitals; of several such images it is that which shares most of the folders
        above it.

        Raises:
            ValueError: it may be several.
        """
        if name in self._known:
            return name
        path = _plain(name)
        last = path.rsplit("/", 1)[-1]
        return self._choose(path, self._by_name.get(last) or self._by_name.get(UPLOADED.sub("", last), []))

    def find_stem(self, name: str) -> str | None:
        """As `find`, of a name without ending."""
        path = _plain(name)
        last = path.rsplit("/", 1)[-1]
        return self._choose(path, self._by_stem.get(last) or self._by_stem.get(UPLOADED.sub("", last), []))

    def _choose(self, path: str, candidates: list[str]) -> str | None:
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        shared = [_shared_folders(path, _plain(candidate)) for candidate in candidates]
        best = [candidate for candidate, n in zip(candidates, shared, strict=True) if n == max(shared)]
        if len(best) > 1:
            raise ValueError(f"{path} may be {best[0]} or {best[1]} in {self.folder}: give the folder nearer to one")
        return best[0]


def count_unmarked(index: ImageIndex | None, marked: Iterable[MarkedImage], remarks: Remarks) -> None:
    """Count the images without a file of their own, of formats that have one for each image."""
    spoken_of = {image.file_name for image in marked}
    for name in index.names if index else ():
        if name not in spoken_of:
            remarks.add("images without an annotation file are left out", name)


def tidy(name: str) -> str:
    """A name with slashes: of a path on Windows, an address, or a file that Label Studio serves."""
    if "?d=" in name:
        name = unquote(name.split("?d=", 1)[1])
    elif "://" in name:
        name = unquote(name.split("://", 1)[1])
    return re.sub(r"^(\./)+", "", name.replace("\\", "/"))


def _plain(name: str) -> str:
    """A name as it is compared: without capitals, its accents composed (macOS takes them apart)."""
    return unicodedata.normalize("NFC", tidy(name)).casefold()


def _shared_folders(one: str, other: str) -> int:
    pairs = zip(reversed(one.split("/")[:-1]), reversed(other.split("/")[:-1]), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(one.count("/"), other.count("/")))


def find_images(images: Path | None, candidates: Iterable[Path]) -> ImageIndex | None:
    """The images of a folder that is given; else of the first candidate that has any, None if no one has.

    Raises:
        FileNotFoundError: the folder that is given is not there, or has no image.
    """
    if images is not None:
        return ImageIndex(images)
    for candidate in dict.fromkeys(candidates):
        try:
            return ImageIndex(candidate)
        except FileNotFoundError:
            continue
    return None
