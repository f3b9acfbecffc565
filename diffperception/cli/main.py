"""The command runner: `diffperception NAME [--config FILE ...] [--option value ...]`.

A command is a function of the same name in the module of the same name here. Its signature and docstring are its
options and its help; nothing is registered. A module is imported only once its command is called, so that `predict`
does not wait for what only `train` needs.
"""

import difflib
import importlib
import os
import signal
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence

COMMANDS = {
    "shapes": "draw the shapes data set (images, COCO annotations, masks)",
    "check": "name every problem of a COCO data set",
    "train": "train a detector",
    "evaluate": "score a detector, or a results file, on a COCO data set",
    "benchmark": "measure speeds as ratios to a well-known unit",
    "predict": "detect objects in images: COCO results and pictures",
    "convert": "turn a checkpoint of the reference DiffusionDet into a model file",
}
USAGE = (
    "usage: diffperception COMMAND [--config FILE] [--option value] ...\n\n"
    + "\n".join(f"  {name:10}{summary}" for name, summary in COMMANDS.items())
    + "\n\n`diffperception COMMAND --help` explains the options of a command.\n"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments (default: those of the command line) name.

    Returns: the exit code: the command's own, 0 if it has none, 2 after a mistake of the user, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h", "help"):
        sys.stdout.write(USAGE)
        return 0
    sys.path.append(os.getcwd())  # a user's own model or transform is found by its import path
    try:
        return run(name, arguments[1:])
    except KeyboardInterrupt:
        sys.stderr.write(f"diffperception {name}: interrupted\n")
        return 128 + signal.SIGINT
    except (ArgumentError, ValueError, OSError) as error:
        from diffperception.cli.parsing import sentence

        if "--debug" in arguments:
            raise
        sys.stderr.write(f"diffperception {name}: {sentence(error)}\n")
        return 2


def run(name: str, arguments: Sequence[str]) -> int:
    """Call command `name` with what the arguments say."""
    from diffperception.cli.parsing import call

    return call(find(name), arguments)


def find(name: str) -> Callable[..., int | None]:
    """The function of command `name`; ValueError if there is no such command."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise ValueError(f"there is no such command; {hint}")
    return getattr(importlib.import_module(f"diffperception.cli.{name}"), name)


if __name__ == "__main__":
    sys.exit(main())
