"""The command runner: `diffperception NAME [--config FILE ...] [--option value ...]`.

A command is a function of the same name in the module of the same name here. Its signature and docstring are its
options and its help; nothing is registered. A module is imported only once its command is called, so that `predict`
does not wait for what only `train` needs.

Some commands do the same for several tasks: `--task generation`, or `task: generation` in a configuration, takes the
function from the module `NAME_generation`. Without it the task is detection.
"""

import difflib
import importlib
import os
import signal
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence

from diffperception.cli import TASKS

COMMANDS = {
    "shapes": "draw the shapes data set (images, COCO annotations, masks)",
    "check": "name every problem of a COCO data set",
    "train": "train a detector, a generator of images, the classifier that guides it, or a segmenter",
    "evaluate": "score a detector, a results file, generated images, or a segmenter",
    "benchmark": "measure speeds as ratios to a well-known unit",
    "predict": "detect objects in images: COCO results and pictures",
    "sample": "draw images from a generator",
    "segment": "masks of images, how uncertain they are, and which images to label next",
    "extract": "write feature maps of images to disk",
    "search": "rank timesteps and blocks of a generator by how well they tell classes apart",
    "distill": "label images, or samples of a generator, with a segmenter: a data set to train on",
    "compare": "what a generator's features are worth where few images are labelled",
    "convert": "turn a checkpoint of DiffusionDet, guided-diffusion or ddpm-segmentation into a model file",
}
USAGE = (
    "usage: diffperception COMMAND [--config FILE] [--option value] ...\n\n"
    + "\n".join(f"  {name:10}{summary}" for name, summary in COMMANDS.items())
    + "\n\n`diffperception COMMAND --help` explains the options of a command;\n"
    + "\n".join(f"`{name} --task ... --help` those of {', '.join(tasks)}" for name, tasks in TASKS.items())
    + ".\n"
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
    from diffperception.cli.parsing import call, chosen_task

    require_command(name)
    return call(find(name, chosen_task(arguments) if name in TASKS else None), arguments)


def require_command(name: str) -> None:
    """ValueError, naming the nearest, if there is no such command."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise ValueError(f"there is no such command; {hint}")


def find(name: str, task: str | None = None) -> Callable[..., int | None]:
    """The function of command `name` for a task, by default its first; ValueError if the command has no such task."""
    tasks = TASKS.get(name, (None,))
    task = task or tasks[0]
    if task not in tasks:
        raise ValueError(f"there is no task {task!r}: {name} knows {', '.join(map(str, tasks))}")
    module = name if task == tasks[0] else f"{name}_{task}"
    return getattr(importlib.import_module(f"diffperception.cli.{module}"), name)


if __name__ == "__main__":
    sys.exit(main())
