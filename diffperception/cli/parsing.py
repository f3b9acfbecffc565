"""From a command's signature to a parser, and from a parser's complaint to one sentence."""

import argparse
import difflib
import inspect
import pydoc
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

from diffperception.cli import TASKS

Command = Callable[..., int | None]
MODE = "yaml with None"  # of parsers
KINDS = {
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number from 0 on",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number from 0 on",
    "ClosedUnitInterval": "a number from 0 to 1",
    "int": "a whole number",
    "float": "a number",
}


def call(command: Command, arguments: Sequence[str]) -> int:
    """Call `command` with the options that the arguments give it; returns its exit code, 0 for None.

    A command with a parameter `resolved` is given all its options there as YAML, fit to be a `--config` again.

    Raises:
        ArgumentError: an option is unknown, missing or of a wrong type.
    """
    parser = build_parser(command)
    options = parse(parser, command, arguments)
    names = inspect.signature(command).parameters
    if "seed" in names:
        _seed_weights(options.seed)
    values = {name: value for name, value in vars(parser.instantiate(options)).items() if name in names}
    if "resolved" in names:
        values["resolved"] = parser.dump(options, skip_unset=False)
    positional = [values.pop(name) for name, p in names.items() if p.kind is p.POSITIONAL_ONLY]
    return command(*positional, **values) or 0


def _seed_weights(seed: int) -> None:
    """Networks among the options are built with them, so their random weights are drawn before the command runs."""
    import torch

    torch.manual_seed(seed)


def chosen_task(arguments: Sequence[str]) -> str | None:
    """The task that arguments name: the last `--task`, else the last `task:` of their configuration files, if any."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    parser.add_argument("--config", action="append", default=[], type=Path)
    named, _ = parser.parse_known_args(arguments)
    if named.task is None:
        for file in filter(Path.is_file, named.config):
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
            named.task = settings.get("task", named.task) if isinstance(settings, dict) else named.task
    return named.task


def build_parser(command: Command) -> ArgumentParser:
    """The parser whose options are the parameters of `command` and whose help is its docstring."""
    set_loader(MODE, _load, (yaml.YAMLError,))
    set_parsing_settings(unset_sentinel=True)  # without it null passes for a value of any type
    parser = ArgumentParser(
        prog=f"diffperception {command.__name__}",
        description=re.split(r"\n\n(?:Args|Returns|Raises):", inspect.getdoc(command) or "")[0],
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=MODE,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with options; several may be given, each states only what it changes, and the later one wins",
    )
    if command.__name__ in TASKS:
        tasks = TASKS[command.__name__]
        parser.add_argument("--task", default=tasks[0], help=f"{', '.join(tasks)}; each has options of its own")
    parser.add_argument("--debug", action="store_true", help="on an error, show where in the program it arose")
    parameters = inspect.signature(command).parameters.values()
    positionals = {p.name: p.annotation for p in parameters if p.kind is p.POSITIONAL_ONLY}
    explained = {p.arg_name: p.description for p in docstring_parser.parse(inspect.getdoc(command) or "").params}
    for name, kind in positionals.items():
        parser.add_argument(name, type=kind, help=explained.get(name))
    parser.add_function_arguments(command, as_group=False, fail_untyped=True, skip={"resolved", *positionals})
    switches = {p.name for p in parameters if p.annotation is bool}
    lists = {p.name for p in parameters if _takes_list(p.annotation)}
    for action in parser._actions:
        if action.dest in switches:
            action.nargs, action.const = "?", True  # `--overwrite` alone means `--overwrite true`
        elif action.dest in lists:  # the help shows what `spell_out` makes of it, not jsonargparse's `--steps+ 1`
            action.option_strings = [f"--{action.dest}"]
            action.metavar = f"{action.dest.upper()} ..."
    return parser


def _load(text: str) -> Any:
    """YAML; jsonargparse hands a null on to the options of a class as the text None."""
    return None if text == "None" else get_loader("yaml")(text)


def parse(parser: ArgumentParser, command: Command, arguments: Sequence[str]) -> Namespace:
    """The options that the arguments give; ArgumentError, naming the nearest option there is, for an unknown one."""
    parameters = inspect.signature(command).parameters.values()
    lists = {
        f"--{p.name}": 1 if _takes_only_lists(p.annotation) else 2 for p in parameters if _takes_list(p.annotation)
    }
    try:
        options = parser.parse_args(spell_out(arguments, lists))
    except ArgumentError as error:
        raise ArgumentError(None, sentence(error) + _suggestion(parser, str(error))) from None
    for parameter in parameters:
        value = options.get(parameter.name)
        if is_dataclass(parameter.annotation) and not isinstance(value, Namespace):
            raise ArgumentError(None, f"option {parameter.name}: expected a group of options, got {value}")
    return options


def spell_out(arguments: Sequence[str], lists: Mapping[str, int]) -> list[str]:
    """Arguments as the parser takes them: `--num-boxes 100 300` is `--num_boxes=[100, 300]`.

    Args:
        lists: the options, spelled with underscores, that may have several values, and from how many on they are a
            list.
    """
    groups: list[list[str]] = [[]]  # an option with its values; the first has none
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            groups.append(["--" + name[2:].replace("-", "_") + equals + value])
        else:
            groups[-1].append(word)
    for group in groups:
        if group and len(group) > lists.get(group[0], len(group)) and not _is_whole(group[1:]):
            group[:] = [f"{group[0]}=[{', '.join(group[1:])}]"]
    return [word for group in groups for word in group]


def _is_whole(values: list[str]) -> bool:
    """Whether they are written as a list, or as none, already."""
    return values[0].startswith("[") or values == ["null"]


def _takes_list(annotation: Any) -> bool:
    """Whether values of this type may be lists: list[int], or int | list[int]."""
    return any(get_origin(kind) is list for kind in (annotation, *get_args(annotation)))


def _takes_only_lists(annotation: Any) -> bool:
    """Whether one value of this type must be a list too: list[str], or list[str] | None, but not int | list[int]."""
    kinds = [annotation] if get_origin(annotation) is list else get_args(annotation)
    return all(get_origin(kind) is list or kind is type(None) for kind in kinds)


def sentence(error: Exception) -> str:
    """What was wrong, in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and re.match(r"Caught \w+ in DataLoader worker process", lines[0]):
        return lines[-1].partition(": ")[2]
    return _plain(" ".join(lines))


def _plain(message: str) -> str:
    """jsonargparse's nested complaint without its Python types: `option a.b: expected a number, got x`."""
    keys = re.findall(r'Parser key "([^"]+)":', message)
    message = re.sub(r'Parser key "[^"]+":\s*', "", message)
    message = re.sub(r"Type \S.*? expects a function or a callable class: ", "", message)
    message = re.sub(r"\.* Got value: Namespace\(.*", "", message)
    message = message.replace(" - Expected a <class 'NoneType'>", "")
    message = re.sub(r"Problem with given class_path '([^']+)':\s*", r"\1: ", message)
    message = re.sub(
        r"Expected an? (?:<class '([\w.]+)'>|typing\.(\S.*?))\. Got value:", r"expected \1\2, got", message
    )
    message = re.sub(r"Does not validate against any of the Union subtypes .*", _alternatives, message)
    message = re.sub(r"Not of type (\w+): (.*?) does not conform to restriction .*", r"expected \1, got \2", message)
    message = re.sub(r"Not of type (\w+): (?:invalid|could not) [^:]*: '(.*)'", r"expected \1, got \2", message)
    message = re.sub(r"Not of type (\w+): \w+\(\) argument must be .*, not '(\w+)'", r"expected \1, got \2", message)
    message = re.sub(r"(?<=, got )None(?:Type)?$", "null", message)
    message = re.sub(r"(?<=\bexpected )(.*?)(?=, got )", lambda found: _in_words(found[1]), message)
    return f"option {'.'.join(keys)}: {message}" if keys else message


def _alternatives(complaint: re.Match[str]) -> str:
    """`expected int or list[int], got x` for a value that is none of several types; for a class, its complaint."""
    of_class = re.search(r" - (?:.* - )?(.*) Given value type: <class '(?:dict|jsonargparse\.\S*)'>", complaint[0])
    if of_class:
        return of_class[1]
    found = re.search(r"Subtypes: \[(.*)\] Errors: .* Given value: (.*)", complaint[0])
    if not found:
        return complaint[0]
    kinds = re.sub(r"<class '([^']*)'>", r"\1", found[1]).replace(", NoneType", "")
    kinds = re.sub(r"(?:\w+\.)+(\w+)", r"\1", kinds)
    return f"expected {re.sub(r', (?![^[]*])', ' or ', kinds)}, got {found[2]}"


def _in_words(kinds: str) -> str:
    """`a whole number, or several` for `int or list[int]`, `one of a, b` for `Literal['a', 'b']`."""
    kinds = re.sub(r"^(.+) or list\[\1\]$", r"\1, or several", kinds)
    kinds = re.sub(r"Literal\[(.*?)\]", lambda found: "one of " + found[1].replace("'", ""), kinds)
    return re.sub(r"\w+", lambda kind: KINDS.get(kind[0], kind[0]), kinds)


def _suggestion(parser: ArgumentParser, message: str) -> str:
    unknown = re.search(r"[Oo]ption '([\w.]+)'|unrecognized arguments: --([\w.]+)", message)
    if not unknown:
        return ""
    known = dict(_known(parser, message))
    near = difflib.get_close_matches(unknown[1] or unknown[2], known, n=1)
    return f"; did you mean {known[near[0]] if unknown[2] else near[0]}?" if near else ""


def _known(parser: ArgumentParser, message: str) -> Iterator[tuple[str, str]]:
    """What may be meant, with its full name: options, their last words, and parameters of the class spoken of."""
    names = list(parser.get_defaults().keys(branches=True))
    yield from ((name.rpartition(".")[2], name) for name in names)
    yield from ((name, name) for name in names)
    found = re.search(r"class_path[ =]'(\w[\w.]*)'", message)
    if found:  # a class, or a method of one that makes it
        parameters = inspect.signature(pydoc.locate(found[1])).parameters  # type: ignore[arg-type]
        yield from ((name, name) for name in parameters)
