"""What all commands share on disk: reading text, writing beside and renaming, the folder of results."""

import codecs
import csv
import io
import json
import math
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

CHECKPOINT = "last.ckpt"  # that a training run goes on from
NAME_BYTES = 120  # of a name that is made of a text: file systems take 255, and endings and numbers come to it
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows, with any ending
RECORD = ".diffperception"  # in a folder of results: which files this program wrote, see OutputFolder
PART = ".diffperception-part-"  # how the names of files begin that are being written


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


def read_json(path: str | Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The content of a user's JSON file; ValueError naming it if it is none, else as :func:`read_text`.

    Args:
        object_hook: as `json.loads` takes it.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_hook=object_hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}): was it cut short?") from None


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


def existing(path: Path) -> Path:
    """A path as the disk spells it, where names are in another normal form of Unicode (ü as one letter or two)."""
    if str(path).isascii() or path.exists():
        return path
    for count in range(1, len(path.parts) + 1):  # of the last parts, as the folders may be in another form
        for form in ("NFC", "NFD"):
            end = (unicodedata.normalize(form, part) for part in path.parts[-count:])
            if (other := Path(*path.parts[:-count], *end)).exists():
                return other
    return path


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
    """A new empty file beside `path` to write to, which takes its place at the end, and is then on disk.

    An interruption or an error leaves what was at `path` before, and nothing beside it; a process that is killed leaves
    a hidden file of no use, which the next run in an :class:`OutputFolder` removes.
    """
    folder = _folders.get(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder is not None:
        folder.enter(path.parent)
    part = path.with_name(f"{PART}{uuid4().hex}")
    part.touch(exist_ok=False)
    try:
        yield part
        flush(part)
        if folder is not None:
            folder.note(path, part)  # before it is there, so that a file that is there has always been noted
        os.replace(part, path)
        flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk and would outlive a power cut."""
    if path.is_dir() and os.name != "posix":
        return  # other systems do not open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table so that there is never half of it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text(path, text.getvalue())


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


def digest(path: str | Path) -> str:
    """A number of a file's content, the same for no other content: BLAKE2b, of which a second takes about a GB."""
    number = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            number.update(block)
    return number.hexdigest()


class Stamp(NamedTuple):
    """What tells a file from others that have had its name: bytes, time of writing in ns, and digest."""

    bytes: int
    modified: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        about = path.stat()
        return cls(about.st_size, about.st_mtime_ns, digest(path))

    def fits(self, path: Path) -> bool:
        """Whether the file is still the stamped one, or a copy of it; its content is read only if its time differs."""
        about = path.stat()
        return about.st_size == self.bytes and (about.st_mtime_ns == self.modified or digest(path) == self.digest)


class OutputFolder:
    """A folder of results that knows which of its files this program wrote, and touches no others.

    A hidden file in it, RECORD, has a line of JSON for each file that was written: its name and its :class:`Stamp`. A
    file that is not there, or has become another one since, is not ours: it is neither removed nor replaced.

    >>> folder = OutputFolder(Path("out"), overwrite=True)  # refused if it is not empty and `overwrite` is False
    >>> folder.clear()  # once all options have proved sound: what earlier runs wrote goes
    >>> write_text(folder.file("masks/a.txt"), "...")  # stamped as it is written

    Args:
        path: the folder, which need not be there.
        overwrite: whether it may hold what earlier runs wrote, which `clear` removes.
        goes_on: name of a file; the folder may hold anything where a run wrote that, for it goes on with what is there.

    Raises:
        ValueError: it is a file, holds a training run, is not empty and not to be overwritten, or holds a file that was
            changed since a run wrote it.
    """

    def __init__(self, path: str | Path, overwrite: bool = False, goes_on: str | None = None) -> None:
        self.path, self.overwrite, self.goes_on = Path(path), overwrite, goes_on
        if (self.path.is_file() or self.path.is_symlink()) and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: name a folder for the results")
        self.require_place()

    def require_place(self) -> None:
        """ValueError if results may not go into the folder as it is."""
        if (self.path / CHECKPOINT).exists():
            raise ValueError(
                f"the folder {self.path} holds a training run, which would be lost: choose another --output"
            )
        if self.overwrite or (self.goes_on and self._is_ours(self.path / self.goes_on)):
            self.require_unchanged()
        elif self.path.is_dir() and not all(map(_is_trace, self.path.iterdir())):
            raise ValueError(
                f"the folder {self.path} is not empty: choose another --output, or give --overwrite, which removes what"
                " earlier runs wrote there and nothing else"
            )

    def file(self, name: str | Path) -> Path:
        """The path of a file in the folder that is going to be written, by :func:`written_beside`.

        Raises:
            ValueError: there is such a file already, which this program has not written, or the name leads, through a
                link, out of the folder.
        """
        path = self.path / name
        if _folders.get(path) is not self:
            if not is_in(path.parent, self.path):
                raise ValueError(f"{path} would be written outside of {self.path}: choose another --output")
            if _is_there(path) and not self._is_ours(path):
                raise ValueError(
                    f"{path} would be replaced, which no earlier run wrote: move it, or choose another --output"
                )
        _folders[path] = self
        return path

    def note(self, path: Path, written: Path | None = None) -> None:
        """Record that `path` in the folder is what lies there now, or in another file that will take its place."""
        stamp = Stamp.of(written or path)
        self.append({"file": path.relative_to(self.path).as_posix(), **stamp._asdict()})
        self._stamps.setdefault(path, []).append(stamp)

    def append(self, entry: Mapping[str, Any], lasting: bool = False) -> None:
        """Add a line to the record of this process, for several must not write to one file.

        Args:
            lasting: wait until it is on disk.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self._record, "ab") as record:
            # What comes first ends a line that a power cut left unfinished.
            record.write(f"\n{json.dumps(entry)}".encode())
        if lasting:
            flush(self._record)

    def entries(self) -> Iterator[dict[str, Any]]:
        """The lines of the records, as far as they can be read."""
        for record in sorted(self.path.glob(f"{RECORD}*")):
            if is_record(record):
                with open(record, encoding="utf-8", errors="replace") as lines:
                    yield from filter(None, map(_entry, lines))

    def written(self) -> list[Path]:
        """The files that were written by this and earlier runs, as far as they are still there and unchanged."""
        return [path for path in self._stamps if self._is_ours(path)]

    def require_unchanged(self) -> None:
        """ValueError if a file that a run wrote has become another one since."""
        changed = [path for path in self._stamps if _is_there(path) and not self._is_ours(path)]
        if changed:
            others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ValueError(
                f"{changed[0]} was changed since a run wrote it{others}: move it away, or choose another --output"
            )

    def clear(self) -> None:
        """Remove the files that earlier runs wrote, and the subfolders that are empty then.

        Raises:
            ValueError: one of them was changed since; nothing has been removed.
        """
        self.require_unchanged()
        self.remove_parts()
        self.remove(self._stamps)
        for folder in filter(Path.is_dir, self._entered):
            self._remove_empty(folder)
        for record in filter(is_record, self.path.glob(f"{RECORD}*")):
            record.unlink()
        self._stamps, self._entered = {}, {self.path}

    def remove(self, paths: Iterable[Path]) -> None:
        """Remove files, as far as they are ours, and the subfolders that are empty then."""
        for path in filter(self._is_ours, paths):
            path.unlink()
            self._remove_empty(path.parent)

    def remove_parts(self) -> None:
        """Remove what processes that were killed had begun to write."""
        for folder in self._entered:
            for part in folder.glob(f"{PART}*"):
                part.unlink()

    def enter(self, folder: Path) -> None:
        """Record that files are written in a folder within, before any is, for what a killed process leaves there."""
        if folder not in self._entered:
            self._entered.add(folder)
            self.append({"folder": folder.relative_to(self.path).as_posix()})

    @cached_property
    def _entered(self) -> set[Path]:
        names = [entry["folder"] for entry in self.entries() if isinstance(entry.get("folder"), str)]
        return {self.path, *(self.path / name for name in names if is_in(self.path / name, self.path))}

    @cached_property
    def _record(self) -> Path:
        number = int(os.environ.get("RANK", 0))  # torchrun's
        return self.path / (f"{RECORD}.{number}" if number else RECORD)

    @cached_property
    def _stamps(self) -> dict[Path, list[Stamp]]:
        """The stamps of each file, of which the last that was begun may not be the one that is there."""
        found: dict[Path, list[Stamp]] = {}
        for entry in self.entries():
            with suppress(KeyError, TypeError, ValueError):
                path, stamp = self.path / entry["file"], Stamp(entry["bytes"], entry["modified"], entry["digest"])
                # Names from a file must not lead out of the folder, nor must links in it.
                if is_in(path.parent, self.path):
                    found.setdefault(path, []).append(stamp)
        return found

    def _is_ours(self, path: Path) -> bool:
        regular = path.is_file() and not path.is_symlink()
        return regular and any(stamp.fits(path) for stamp in self._stamps.get(path, ()))

    def _remove_empty(self, folder: Path) -> None:
        while folder != self.path and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


_folders: dict[Path, OutputFolder] = {}  # of the files that are being written, which `written_beside` notes there


def _is_there(path: Path) -> bool:
    """Whether there is a file, or a link that leads nowhere; no file takes the place of a folder."""
    return os.path.lexists(path) and not path.is_dir()


def is_record(path: Path) -> bool:
    """Whether a file is the record of an output folder, or that of a further process."""
    return re.fullmatch(rf"{re.escape(RECORD)}(\.\d+)?", path.name) is not None and path.is_file()


def _is_trace(path: Path) -> bool:
    """Whether a file is one of those that hold nothing: a record, or what a killed process began."""
    return is_record(path) or (path.name.startswith(PART) and path.is_file())


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
