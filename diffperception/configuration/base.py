"""Configuration files and what they build on, before they are parsed."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

SUFFIXES = (".yaml", ".yml")


def spread_files(arguments: Sequence[str]) -> list[str]:
    """Arguments with every configuration file named by `--config`, after those that it builds on.

    Files may also be named first, without `--config`. A file names what it builds on as `base: FILE` or a list of
    files, relative to its own folder.

    Raises:
        ValueError: files build on each other in a circle.
        FileNotFoundError: a base is missing.
    """
    words = list(arguments)
    first = next((i for i, word in enumerate(words) if word.startswith("-") or not word.endswith(SUFFIXES)), len(words))
    words = [part for file in words[:first] for part in ("--config", file)] + words[first:]
    spread: list[str] = []
    while words:
        word = words.pop(0)
        if word == "--config" and words:
            spread += [part for file in with_bases(words.pop(0)) for part in (word, file)]
        elif word.startswith("--config="):
            spread += [part for file in with_bases(word.partition("=")[2]) for part in ("--config", file)]
        else:
            spread.append(word)
    return spread


def with_bases(file: str, above: tuple[Path, ...] = ()) -> list[str]:
    """A configuration file after all that it builds on."""
    path = Path(file)
    if path.resolve() in above:
        raise ValueError(f"{file} builds on itself: base goes round in a circle over {', '.join(map(str, above))}")
    if above and not path.is_file():
        raise FileNotFoundError(f"there is no file {file}, which {above[-1]} names as its base")
    bases = read_settings_file(path).get("base") or []
    bases = [bases] if isinstance(bases, str) else bases
    before = [with_bases(str(path.parent / base), (*above, path.resolve())) for base in bases]
    return [*(name for names in before for name in names), file]


def read_settings_file(path: Path) -> dict[str, Any]:
    """What a YAML file says; nothing for one that cannot be read, of which the parser complains."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def given(arguments: Sequence[str], name: str) -> Any:
    """What arguments say of an option before they are parsed: the last `--name`, else that of their last file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    parser.add_argument("--config", action="append", default=[], type=Path)
    known, _ = parser.parse_known_args([word for word in arguments if word != "--help"])
    if getattr(known, name) is not None:
        return getattr(known, name)
    found = [value for file in known.config if (value := read_settings_file(file).get(name)) is not None]
    return found[-1] if found else None
