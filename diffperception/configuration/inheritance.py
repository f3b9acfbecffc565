"""Configuration files and what they build on, before they are parsed."""

import argparse
import os
from collections.abc import Callable, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import yaml

from diffperception.configuration.as_written import load_as_written

SUFFIXES = (".yaml", ".yml")


def spread_files(arguments: Sequence[str]) -> list[str]:
    """Arguments with every configuration file named by `--config`, after those that it builds on.

    Files may also be named first, without `--config`. A file names what it builds on as `base: FILE` or a list of
    files, relative to its own folder.

    Raises:
        ValueError: files build on each other in a circle, or one is no configuration; `--base` is none.
        FileNotFoundError: a base is missing.
    """
    files = list(takewhile(lambda word: not word.startswith("-") and word.endswith(SUFFIXES), arguments))
    words = [*(f"--config={file}" for file in files), *arguments[len(files) :]]
    spread: list[str] = []
    while words:
        word = words.pop(0)
        name, equals, file = word.partition("=")
        if name == "--base":
            raise ValueError("only a configuration file names its base: give --config, which may stand several times")
        if name == "--config" and (equals or words):
            spread += [part for each in with_bases(file or words.pop(0)) for part in ("--config", each)]
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
    settings = read_settings_file(file, load_as_written)
    bases = settings.get("base") or []
    if bases and not os.path.isfile(file):
        raise ValueError(f"only a configuration file names its base, not the text {file}: give --config several times")
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{file}: base must be the name of a file or a list of names, not {bases}")
    before = [with_bases(str(path.parent / base), (*above, path.resolve())) for base in bases]
    own = [file] if settings or not path.is_file() else []  # none of a file of comments alone
    return [*chain.from_iterable(before), *own]


def read_settings_file(file: str | Path, load: Callable[[str], Any] = yaml.safe_load) -> dict[str, Any]:
    """What a YAML file, or a text in its place, says; nothing for one that is missing, of which the parser complains.

    Args:
        load: reads the text.

    Raises:
        ValueError: the file is not YAML, or not options.
    """
    is_file = os.path.isfile(file)  # unlike Path.is_file, False too of a text that is too long for a name
    try:
        settings = load(Path(file).read_text(encoding="utf-8") if is_file else str(file))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        if not is_file:
            return {}
        raise ValueError(f"{file} is not YAML: " + str(error).replace('"<unicode string>", ', "")) from None
    if is_file and not isinstance(settings, dict | None):
        raise ValueError(f"{file} must hold options such as `seed: 3`, not a {type(settings).__name__}")
    return settings if isinstance(settings, dict) else {}


def given(arguments: Sequence[str], name: str) -> str | None:
    """What arguments say of an option before they are parsed: the last `--name`, else that of their last file.

    Raises:
        ArgumentError: an option has no value.
        ValueError: what the file says is no text.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}")
    parser.add_argument("--config", action="append", default=[])
    known, _ = parser.parse_known_args([word for word in arguments if word != "--help"])
    if getattr(known, name) is not None:
        return str(getattr(known, name))
    found = [
        value for file in known.config if (value := read_settings_file(file, load_as_written).get(name)) is not None
    ]
    if not found:
        return None
    if not isinstance(found[-1], str):
        raise ValueError(f"option {name}: expected a text, got {found[-1]}")
    return found[-1]
