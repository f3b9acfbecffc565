"""From a complaint of a parser, or of a constructor, to one sentence."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

Made = TypeVar("Made")

KINDS = {
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number from 0 on",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number from 0 on",
    "ClosedUnitInterval": "a number from 0 to 1",
    "int": "a whole number",
    "float": "a number",
}
UNREAD_GROUP = r"Unable to load config '(.*)' - .*Unable to load config \"\1\""


def sentence(error: Exception) -> str:
    """What was wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" if error.filename is None else f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and re.match(r"Caught \w+ in (DataLoader worker process|pin memory thread)", lines[0]):
        starts = [n for n, line in enumerate(lines) if re.match(r"[\w.]+(: |$)", line)]
        return " ".join(lines[starts[-1] :]).partition(": ")[2] if starts else lines[-1]
    return _plain(" ".join(lines))


def construct(make: Callable[..., Made], *arguments: Any) -> Made:
    """What a constructor makes of users' options; ValueError, with what Python or torch says of them, if it fails."""
    try:
        return make(*arguments)
    except (RuntimeError, ArithmeticError, LookupError, TypeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"the model cannot be built with these options ({type(error).__name__}: {text})") from error


def _plain(message: str) -> str:
    """jsonargparse's nested complaint without its Python types: `option a.b: expected a number, got x`."""
    message = re.sub(UNREAD_GROUP, r"expected a group of options, got \1", message)
    keys = re.findall(r'Parser key "([^"]+)":', message)
    for pattern, plain in REWORDED:
        message = re.sub(pattern, plain, message)
    return f"option {'.'.join(keys)}: {message}" if keys else message


def _alternatives(complaint: re.Match[str]) -> str:
    """`expected int or list[int], got x` for a value that is none of several types; for a class, its complaint."""
    of_class = re.search(r" - (?:.* - )?(.*) Given value type: <class '(?:dict|jsonargparse\.\S*)'>", complaint[0])
    if of_class:
        return of_class[1]
    found = re.search(r"Subtypes: \[(.*?)\] Errors: .* Given value: (.*)", complaint[0])
    if not found:
        return complaint[0]
    kinds = re.sub(r"<class '([^']*)'>", r"\1", found[1]).replace(", NoneType", "")
    kinds = re.sub(r"(?:\w+\.)+(\w+)", r"\1", kinds)
    return f"expected {re.sub(r', (?![^[]*])', ' or ', kinds)}, got {found[2]}"


def _in_words(kinds: str) -> str:
    """`a whole number, or several` for `int or list[int]`, `one of a, b` for `Literal['a', 'b']`."""
    kinds = re.sub(r"^(.+) or list\[(?:Union\[)?\1\]+$", r"\1, or several", kinds)
    kinds = kinds.replace("dict[int, int]", "pairs of whole numbers such as {0: 0, 255: 1}")
    kinds = re.sub(r"Literal\['(\w+)'\]", r"\1", kinds)  # of a single word nothing is chosen
    kinds = re.sub(r"Literal\[(.*?)\]", lambda found: "one of " + found[1].replace("'", ""), kinds)
    return re.sub(r"\w+", lambda kind: KINDS.get(kind[0], kind[0]), kinds)


REWORDED: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [  # in this order
    (r'Parser key "[^"]+":\s*', ""),
    (r"Type \S.*? expects a function or a callable class: ", ""),
    (r"Expected an import path or a subclass spec, but got (.*)\. Got .*", r"expected a class, got \1"),
    (r"\.* Got value: Namespace\(.*", ""),
    (r"Expected a dot import path string: (.*)", r"\1 is none of the classes that fit"),
    (r" - Expected a <class 'NoneType'>", ""),
    (r"Problem with given class_path '([^']+)':\s*", r"\1: "),
    (r"Expected an? (?:<class '([\w.]+)'>|typing\.(\S.*?))\. Got value:", r"expected \1\2, got"),
    (r"Does not validate against any of the Union subtypes .*", _alternatives),
    (r"Not of type (\w+): (.*?) does not conform to restriction .*", r"expected \1, got \2"),
    (r"Not of type (\w+): (?:invalid|could not) [^:]*: '(.*)'", r"expected \1, got \2"),
    (r"invalid literal for (int)\(\) with base 10: '(.*)'", r"expected \1, got \2"),
    (r"Not of type (\w+): \w+\(\) argument must be .*, not '(\w+)'", r"expected \1, got \2"),
    (r"(?<=, got )None(?:Type)?$", "null"),
    (r"(?<=, got )\[.*\]$", lambda found: found[0].replace("'", "")),  # values of a list, as they were written
    (r"(?<=\bexpected )(.*?)(?=, got )", lambda found: _in_words(found[1])),
]
