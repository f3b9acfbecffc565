"""What all commands share on disk: reading text, writing beside and renaming, the folder of results."""

import codecs
import json
import math
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

CHECKPOINT = "last.ckpt"  # that a training run goes on from
NAME_BYTES = 120  # of a name that is made of a text: file systems take 255, and endings and numbers come to it
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows, with any ending
RECORD = ".diffperception"  # in a folder of results: the names of the files that this program wrote, a line each


def is_in(folder: Path, other: Path) -> bool:
    """Whether a folder is another or lies below it, links followed."""
    return folder.resolve().is_relative_to(other.resolve())


# The longest first: that of UTF-32 begins as that of UTF-16 does.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def read_text(path: str | Path) -> str:
    """The text of a user's file, its lines ended by a line feed: UTF-8, or what its byte order mark says (UTF-16, 32).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder or in no such encoding.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: name a file") from None
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f" (line {line})" if encoding.startswith("utf-8") else ""
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"{path} is not text in {name}{where}: save it as UTF-8") from None
    if "\0" in text:  # as UTF-16 without its mark has after every letter
        raise ValueError(f"{path} is not text in UTF-8, as it has bytes of zero: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path) -> list[str]:
    """The lines of a user's text file (see `read_text`), without blanks around them and without empty ones."""
    return [line for line in map(str.strip, read_text(path).split("\n")) if line]


def safe_name(text: str) -> str:
    """A text, such as the name of a class, as one component of a path: it names no other folder, on any system.

    Usual names stay as they are. Separators, characters that Windows does not take, control characters and dots at the
    beginning become `_`, dots and spaces at the end go, and the names of devices get a `_` before them. Of a long text
    the end becomes a number that tells it from others. Two texts may give one name, see :func:`safe_names`.
    """
    name = unicodedata.normalize("NFC", text.encode(errors="replace").decode())
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "_", name).strip().rstrip(". ")
    name = re.sub(r"^\.+", "_", name) or "_"
    name = f"_{name}" if RESERVED.fullmatch(name) else name
    if len(name.encode()) > NAME_BYTES:
        number = blake2b(text.encode(errors="replace"), digest_size=4).hexdigest()
        name = f"{name.encode()[: NAME_BYTES - 9].decode(errors='ignore')}-{number}"
    return name


def safe_names(texts: Iterable[str]) -> dict[str, str]:
    """:func:`safe_name` of each text, with a number at its end where another one has that name, in whatever case."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for text in dict.fromkeys(texts):
        name, number = safe_name(text), 2
        while name.casefold() in taken:
            name, number = f"{safe_name(text)}-{number}", number + 1
        taken.add(name.casefold())
        names[text] = name
    return names


def safe_path(name: str) -> Path:
    """A file's name from somebody else's list, folders included, as a path that stays below where it is joined to.

    `a/b.jpg` stays that; `../b.jpg`, `/a/b.jpg` and `a\\b.jpg` give `b.jpg`, `a/b.jpg` and `a/b.jpg`.
    """
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
    return Path(*(safe_name(part) for part in parts or ["_"]))


def png_names(names: Iterable[Path]) -> dict[Path, Path]:
    """A PNG's name for each image, no two alike in any case: a/b.jpg gives a/b.png, or a/b.jpg.png beside an a/b.png.

    Where that is another image's too, a number comes before the ending.
    """
    names = list(dict.fromkeys(names))
    number = Counter(_folded(name.with_suffix(".png")) for name in names)
    pngs: dict[Path, Path] = {}
    taken = {plain for plain, count in number.items() if count == 1}  # theirs, whoever comes first
    for name in names:
        png = name.with_suffix(".png")
        if number[_folded(png)] > 1:
            png, again = name.with_name(f"{name.name}.png"), 2
            while _folded(png) in taken:
                png, again = name.with_name(f"{name.name}-{again}.png"), again + 1
            taken.add(_folded(png))
        pngs[name] = png
    return pngs


def _folded(path: Path) -> str:
    return path.as_posix().casefold()


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A new empty file beside `path` to write to, which takes its place at the end.

    An interruption or an error leaves what was at `path` before, and nothing beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.touch()
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to fill, which takes its place at the end; `path` may be an empty folder or nothing.

    An interruption or an error leaves what was there before, and nothing beside it.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=path.parent) as room:
        part = Path(room, path.name)
        part.mkdir()  # with the permissions of any new folder; the one around it is its owner's alone
        yield part
        if path.exists():
            path.rmdir()
        os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Write a file so that there is never half of it."""
    with written_beside(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file so that there is never half of it; numbers that are not finite become null."""
    try:
        text = json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(content), indent=indent)
    write_text(path, text + "\n" if indent else text)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def require_file_name(path: Path) -> None:
    """ValueError if `path` is a folder."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file, {path / 'model.safetensors'} for example")


class OutputFolder:
    """A folder of results that knows which of its files this program wrote, and touches no others.

    >>> folder = OutputFolder(Path("out"), overwrite=True)  # refused if it is not empty and `overwrite` is False
    >>> folder.clear()  # once all options have proved sound: what earlier runs wrote goes
    >>> write_text(folder.file("masks/a.txt"), "...")  # the name is recorded before the file is written

    Raises:
        ValueError: it is a file, holds a training run, or is not empty and not to be overwritten.
    """

    may_hold_run = False

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        path = Path(path)
        if path.is_file():
            raise ValueError(f"{path} is a file: name a folder for the results")
        if not self.may_hold_run and (path / CHECKPOINT).exists():
            raise ValueError(f"the folder {path} holds a training run, which would be lost: choose another --output")
        if path.is_dir() and not overwrite and any(child.name != RECORD for child in path.iterdir()):
            raise ValueError(
                f"the folder {path} is not empty: choose another, or allow to overwrite it with --overwrite"
            )
        self.path = path

    def file(self, name: str | Path) -> Path:
        """The path of a file in the folder that is going to be written.

        Raises:
            ValueError: there is such a file already, which this program has not written.
        """
        path = self.path / name
        if path not in self._known and path.exists():
            raise ValueError(f"{path} would be replaced, which no earlier run wrote: move it, or choose another folder")
        self.record([name])
        return path

    def record(self, names: Iterable[str | Path]) -> None:
        """Count files as written by this program, whatever is there under their names."""
        new = [path for path in dict.fromkeys(self.path / name for name in names) if path not in self._known]
        if new:
            self.path.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(path.relative_to(self.path).as_posix()) + "\n" for path in new]
            with open(self.path / RECORD, "a", encoding="utf-8") as record:  # appended whole, also by several processes
                record.write("".join(lines))
            self._known.update(new)

    def written(self) -> list[Path]:
        """The files that were written by this and earlier runs, as far as they are still there."""
        record = self.path / RECORD
        lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
        paths = [self.path / json.loads(line) for line in dict.fromkeys(lines)]
        # Names from a file must not lead out of the folder, nor must links in it.
        return [path for path in paths if is_in(path.parent, self.path) and path.is_file()]

    def clear(self, keep: Iterable[str] = ()) -> None:
        """Remove the files that earlier runs wrote, and the subfolders that are empty then.

        Args:
            keep: names of files, or of subfolders with all in them, that stay.
        """
        kept = [self.path / name for name in keep]
        written = self.written()
        stay = [path for path in written if any(path.is_relative_to(name) for name in kept)]
        for path in set(written) - set(stay):
            path.unlink()
            self._remove_empty(path.parent)
        (self.path / RECORD).unlink(missing_ok=True)
        self._known = set()
        self.record(path.relative_to(self.path) for path in stay)

    @cached_property
    def _known(self) -> set[Path]:
        return set(self.written())

    def _remove_empty(self, folder: Path) -> None:
        while folder != self.path and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
