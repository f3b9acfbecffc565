"""What all commands share on disk: writing beside and renaming."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A new empty file beside `path` to write to, which takes its place at the end.

    An interruption or an error leaves what was at `path` before, and nothing beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.touch()
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that there is never half of it."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def require_file_name(path: Path) -> None:
    """ValueError if `path` is a folder."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file, {path / 'model.safetensors'} for example")
