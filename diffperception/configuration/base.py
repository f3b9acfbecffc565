"""Configuration files and what they build on, before they are parsed."""

import argparse
import os
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
        ValueError: files build on each other in a circle, or one is no configuration; `--base` is none.
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
        elif word.partition("=")[0] == "--base":
            raise ValueError("only a configuration file names its base: give --config, which may stand several times")
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
    bases = read_settings_file(path).get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{file}: base must be the name of a file or a list of names, not {bases}")
    before = [with_bases(str(path.parent / base), (*above, path.resolve())) for base in bases]
    return [*(name for names in before for name in names), file]


def read_settings_file(path: Path) -> dict[str, Any]:
    """What a YAML file says; nothing for one that is missing, of which the parser complains.

    Raises:
        ValueError: it is not YAML, or not options.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, also of a text that is too long for a name
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not YAML: " + str(error).replace('"<unicode string>", ', "")) from None
    if not isinstance(settings, dict | None):
        raise ValueError(f"{path} must hold options such as `seed: 3`, not a {type(settings).__name__}")
    return settings or {}


def given(arguments: Sequence[str], name: str) -> str | None:
    """What arguments say of an option before they are parsed: the last `--name`, else that of their last file.

    Raises:
        ArgumentError: an option has no value.
        ValueError: what the file says is no text.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}")
    parser.add_argument("--config", action="append", default=[], type=Path)
    known, _ = parser.parse_known_args([word for word in arguments if word != "--help"])
    if getattr(known, name) is not None:
        return str(getattr(known, name))
    found = [value for file in known.config if (value := read_settings_file(file).get(name)) is not None]
    if not found:
        return None
    if not isinstance(found[-1], str):
        raise ValueError(f"option {name}: expected a text, got {found[-1]}")
    return found[-1]
