"""From the signatures of functions and classes to a parser of their options."""

import argparse
import difflib
import inspect
import json
import pydoc
import re
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import Annotated, Any, TypeVar, get_args, get_origin

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader, set_parsing_settings

from diffperception.configuration.as_written import load_as_written
from diffperception.configuration.inheritance import spread_files
from diffperception.configuration.messages import construct, sentence

T = TypeVar("T")
MODE, DUMPED = "yaml as written", "yaml as dumped"  # of parsers: how they read what people wrote, what they dumped
NO_FUNCTION = "Unable to serialize instance None"  # what jsonargparse writes for a function that is left out
HELP = {  # of options that several commands have, where a docstring says nothing of its own
    "model": "a file that training or `diffperception convert` wrote, model.safetensors.",
    "images": "an image, a folder (its subfolders count too), or a pattern in quotes such as 'photos/*.jpg'.",
    "output": "folder for the results.",
    "steps": "passes from noise to boxes; more are slower and a little better. By default the model's own number.",
    "num_boxes": "boxes to start from; more find more in crowded images. By default the model's own number.",
    "renewal_threshold": "between steps, boxes with no class above this probability are drawn anew; 0 turns it off. By"
    " default the model's own, 0.5 if it has none.",
    "ensemble": "whether the detections of all steps count, or the last step's alone.",
    "eta": "how much noise a step adds: 1 is the ancestral step, 0 the deterministic one.",
    "box_voting": "each box that is left becomes the mean, weighted by score, of all of its class whose IoU with it is"
    " above this, such as 0.75.",
    "nms_threshold": "of two boxes of a class whose IoU is above this, only the better counts; 1 turns it off.",
    "start": "a COCO results file, such as the predictions.json of another run, whose boxes are started from instead of"
    " noise alone, noised to `start_time`: of each image the best, `num_boxes` at most.",
    "spread": "whether the boxes of pure noise are spread evenly over places and sizes, which finds more in one step of"
    " few boxes, or drawn independently of each other.",
    "start_time": "the time of the schedule, from 0 to T - 1, that the boxes which are started from are noised to: the"
    " smaller, the more of them is kept. They are those of `start`, or else what the model's auxiliary head proposes;"
    " noise starts from none. By default the model's own.",
    "workers": "processes that read images.",
    "device": "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.",
    "precision": "bf16 computes the networks' products in bfloat16, faster on recent GPUs; 32 in float32.",
    "tile": "images larger than this are taken in windows of so many pixels a side; null takes them whole.",
    "overlap": "pixels that neighbouring windows share at least; best as large as most objects.",
    "overwrite": "write into a folder that is not empty, in place of what an earlier run wrote there.",
}


class OptionsOf:
    """Marks a parameter of a command: it is a function or class whose own parameters are options, without a prefix.

    With `detect: Annotated[partial[Found], OptionsOf(detect_folder, "detector")]` every parameter of `detect_folder` is
    an option of the command, with the default and the help that it has there; but for `detector`, which the command
    gives: it gets the function with all others filled in.

    Args:
        part: the function or class; by default the type of the parameter.
        given: what the command gives; a class of which it gives nothing is handed over as an object.
    """

    def __init__(self, part: Callable[..., Any] | None = None, *given: str) -> None:
        self.part: Any = part
        self.given = given


Flat = Annotated[T, OptionsOf()]  # of a parameter that is a dataclass: its fields are options without a prefix


class Options:
    """The options of a command: the parameters of functions or classes, with their docstrings as help.

    Args:
        name: of the command.
        parts: functions and classes, whose parameters have different names.
        description: what stands above the options in the help; by default what the first part's docstring says, or
            that of the function that it calls if it has none.
        task: of a command that does several, which its configurations name as `task`.
    """

    def __init__(self, name: str, *parts: Callable[..., Any], description: str | None = None, task: str | None = None):
        set_loader(MODE, _load, (yaml.YAMLError,))
        set_loader(DUMPED, yaml.safe_load, (yaml.YAMLError,))
        set_parsing_settings(unset_sentinel=True)  # without it null passes for a value of any type
        self.parts = parts
        own = [p for part in parts for p in inspect.signature(part).parameters.values()]
        marked = [(p.name, *get_args(p.annotation)) for p in own if get_origin(p.annotation) is Annotated]
        self.flat = {name: mark if mark.part else OptionsOf(kind) for name, kind, mark in marked}
        self.of_part = {part: _parameters(part, self.flat) for part in parts}
        self.of_part |= {mark.part: _parameters(mark.part, mark.given) for mark in self.flat.values()}
        self.parameters = [p for parameters in self.of_part.values() for p in parameters.values()]
        self.parser = ArgumentParser(
            prog=f"diffperception {name}",
            description=description or next(summary(part) for part in self.of_part if part.__doc__),
            exit_on_error=False,
            allow_abbrev=False,
            parser_mode=MODE,
        )
        self.parser.add_argument(
            "--config",
            action="config",
            help="YAML file with options; several may be given, each states only what it changes, and the later one"
            " wins. What a file names as its `base`, one or a list, is read before it",
        )
        self.parser.add_argument("--base", type=str | list[str] | None, help=argparse.SUPPRESS)  # of files; not dumped
        if task is not None:
            self.parser.add_argument("--task", default=task, help="what is trained; each task has options of its own")
        trust = "a Python package of your own whose classes model files may name"
        self.parser.add_argument("--trust", type=str | None, help=trust)
        weights = "where frozen weights lie that model files leave out, if they have moved: a file or folder"
        if not any(parameter.name == "weights" for parameter in self.parameters):  # as of scores of samples
            self.parser.add_argument("--weights", type=str | None, help=weights)
        debug = "on an error, show where in the program it arose"
        self.parser.add_argument("--debug", type=bool, default=False, nargs="?", const=True, help=debug)
        for part in self.of_part:
            self._add(part)
        types = {f"--{action.dest}": getattr(action, "_typehint", None) for action in self.parser._actions}
        self.lists = {name: count for name, kind in types.items() if (count := _values_of_a_list(kind))}
        self._spell_for_humans()

    def _add(self, part: Callable[..., Any]) -> None:
        positionals = {name for name, p in self.of_part[part].items() if p.kind is p.POSITIONAL_ONLY}
        for name in positionals:
            self.parser.add_argument(name, type=self.of_part[part][name].annotation)
        others = inspect.signature(part).parameters.keys() - self.of_part[part].keys()
        add = self.parser.add_class_arguments if inspect.isclass(part) else self.parser.add_function_arguments
        add(part, as_group=False, fail_untyped=True, skip={*positionals, *others})

    def _spell_for_humans(self) -> None:
        """Options without help of their own get that of another part, or of all commands."""
        docs = [docstring_parser.parse(inspect.getdoc(part) or "").params for part in self.of_part]
        explained = HELP | {p.arg_name: p.description for params in docs for p in params}
        switches = {p.name for p in self.parameters if p.annotation in (bool, bool | None)}
        for action in self.parser._actions:
            action.help = action.help or explained.get(action.dest)
            if action.dest in switches:
                action.nargs, action.const = "?", True  # `--overwrite` alone means `--overwrite true`
            elif f"--{action.dest}" in self.lists:  # not as jsonargparse's `--steps+ 1`, but as `spell_out` takes it
                action.option_strings = [f"--{action.dest}"]
                action.metavar = f"{action.dest.upper()} ..."

    def parse(self, arguments: Sequence[str]) -> Namespace:
        """What the arguments say.

        Raises:
            ArgumentError: an option is unknown, for which the nearest is named, or missing, or of a wrong type.
        """
        try:
            options = self.parser.parse_args(spell_out(spread_files(arguments), self.lists))
        except ArgumentError as error:
            said = sentence(error)
            said += _suggestion(self.parser, str(error)) + _suggested_class(self.parameters, said)
            raise ArgumentError(None, said) from None
        for parameter in self.parameters:
            value = options.get(parameter.name)
            if is_dataclass(parameter.annotation) and not isinstance(value, Namespace):
                raise ArgumentError(None, f"option {parameter.name}: expected a group of options, got {value}")
        return options

    def instantiate(self, options: Namespace) -> list[dict[str, Any]]:
        """The arguments of each part, by name. Networks among them are built with the seed, if there is one."""
        if "seed" in options:
            import torch

            torch.manual_seed(options.seed)
        values = vars(construct(self.parser.instantiate, options))
        for name, mark in self.flat.items():
            filled = partial(mark.part, **{option: values[option] for option in self.of_part[mark.part]})
            values[name] = filled() if inspect.isclass(mark.part) and not mark.given else filled
        names = [inspect.signature(part).parameters for part in self.parts]
        return [{name: values[name] for name in of_part if name in values} for of_part in names]

    def settings(self, options: Namespace) -> dict[str, Any]:
        """All options, as a configuration has them."""
        self.parser.parser_mode = DUMPED  # what the options of a class become passes through text and back
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", rf"\s*{NO_FUNCTION}")
                text = self.parser.dump(options, skip_unset=False, skip_validation=True)
            return yaml.safe_load(text.replace(NO_FUNCTION, "null"))
        finally:
            self.parser.parser_mode = MODE


def call(command: Callable[..., Any], arguments: Sequence[str], name: str | None = None) -> int:
    """Call `command` with the options that the arguments give it; returns its exit code, 0 for anything but a number.

    Its help calls it by `name`, by default the function's.

    Raises:
        ArgumentError: an option is unknown, missing or of a wrong type.
    """
    options = Options(name or command.__name__, command)
    (values,) = options.instantiate(options.parse(arguments))
    parameters = inspect.signature(command).parameters
    positional = [values.pop(name) for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    result = command(*positional, **values)
    return result if isinstance(result, int) else 0


def _parameters(part: Callable[..., Any], without: Container[str]) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(part).parameters.items() if name not in without}


def summary(part: Callable[..., Any]) -> str:
    """The docstring without its sections."""
    return re.split(r"\n\n(?:Args|Returns|Raises):", inspect.getdoc(part) or "")[0]


def _load(text: str) -> Any:
    """A list or the options of a group in YAML; any other text as it is, for no name of a file is to be read as YAML.

    Only the word null stands for nothing, which jsonargparse itself reads before it asks here; but one in a file it
    hands on to the options of a class as the text None.
    """
    if text == "None":
        return None
    settings = load_as_written(text)
    return settings if isinstance(settings, list | dict) else text


def spell_out(arguments: Sequence[str], lists: Mapping[str, int]) -> list[str]:
    """Arguments as the parser takes them: `--num-boxes 100 300` is `--num_boxes=[100, 300]`.

    Args:
        lists: the options that may have several values, and from how many on they are a list.
    """
    groups: list[list[str]] = [[]]  # an option with its values; the first has none
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            groups.append(["--" + name[2:].replace("-", "_") + equals + value])
        else:
            groups[-1].append(word)
    for group in groups:
        values = group[1:]
        if group and values and values[0].startswith("[") and values[-1].endswith("]"):
            group[1:] = [" ".join(values)]  # a list in YAML already, perhaps without quotes: [a, b]
        elif group and len(values) >= lists.get(group[0], len(group)) and values != ["null"]:
            group[:] = [f"{group[0]}={json.dumps(values, ensure_ascii=False)}"]
        elif len(values) == 1 and group[0].startswith("--") and values[0].startswith("-") and values[0] != "-h":
            group[:] = ["=".join(group)]  # a name that begins with a hyphen, not an option
    return [word for group in groups for word in group]


def _values_of_a_list(annotation: Any) -> int | None:
    """From how many values on an option is a list: from 1 for list[str], from 2 for int | list[int], never for int."""
    kinds = [annotation] if get_origin(annotation) is list else get_args(annotation)
    lists = [get_origin(kind) is list for kind in kinds if kind is not type(None)]
    if not any(lists):
        return None
    return 1 if all(lists) else 2


def _suggestion(parser: ArgumentParser, message: str) -> str:
    """The nearest to an unknown option: of all options, their last words, and parameters of the class spoken of."""
    unknown = re.search(r"[Oo]ption '([\w.]+)'|unrecognized arguments: --([\w.]+)", message)
    if not unknown:
        return ""
    names = list(parser.get_defaults().keys(branches=True))
    of_class = re.search(r"class_path[ =]'(\w[\w.]*)'", message)  # a class, or a method of one that makes it
    inside = inspect.signature(pydoc.locate(of_class[1])).parameters if of_class else {}  # type: ignore[arg-type]
    known = {name.rpartition(".")[2]: name for name in names} | {name: name for name in (*names, *inside)}
    near = difflib.get_close_matches(unknown[1] or unknown[2], known, n=1)
    return f"; did you mean {known[near[0]] if unknown[2] else near[0]}?" if near else ""


def _suggested_class(parameters: Iterable[inspect.Parameter], said: str) -> str:
    wrong = re.search(r"option (\S+): (\w+) is none of the classes that fit", said)
    if not wrong:
        return ""
    *above, last = wrong[1].split(".")
    for name in above:
        classes = [kind for p in parameters if p.name == name for kind in _classes(p.annotation)]
        parameters = [p for kind in classes for p in inspect.signature(kind).parameters.values()]
    fitting = {kind.__name__ for p in parameters if p.name == last for kind in _classes(p.annotation)}
    near = difflib.get_close_matches(wrong[2], sorted(fitting), n=1)
    return (
        f"; did you mean {near[0]}?" if near else f": give {', '.join(sorted(fitting))} or the import path of another"
    )


def _classes(annotation: Any) -> Iterator[type]:
    """The classes, without Python's own, of which an option of this type may be one."""
    for kind in get_args(annotation):
        yield from _classes(kind)
    if inspect.isclass(annotation) and annotation.__module__ != "builtins":
        if not inspect.isabstract(annotation):
            yield annotation
        for kind in annotation.__subclasses__():
            yield from _classes(kind)
