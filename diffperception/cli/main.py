"""The command runner: `diffperception NAME [FILE.yaml ...] [--option value ...]`.

A command is the function `command` in the module of its name, imported only once it is called. Its signature and
docstring are its options and its help; those of `train` are the recipe's that `task` names. Where a command works on
several kinds of things, the module has a dictionary BY_KIND of functions: one is chosen by what the file of `--model`
says that it is, or by an option of that name, such as `--results`.
"""

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType
from typing import NoReturn

from diffperception import __version__
from diffperception.cli.failures import Terminated, close_output, failure, spoken_plainly
from diffperception.memory import keep_freed_memory

COMMANDS = {
    "shapes": "draw the shapes data set (images, COCO annotations, masks)",
    "check": "name every problem of a data set: objects, masks, or pictures alone",
    "train": "train a detector, a generator, the classifier that guides it, a segmenter, or a UNet from scratch",
    "evaluate": "score a detector, a results file, tracks, generated images, or a segmenter",
    "benchmark": "measure speeds as ratios to a well-known unit",
    "predict": "objects in images, or the class of every pixel: results and pictures",
    "track": "follow objects through clips, and score their tracks",
    "sample": "draw images from a generator, or a picture, or a part of it, again",
    "augment": "draw the pictures of a detection data set again such that its boxes stay valid",
    "likelihood": "how likely images are under a generator, and which are foreign to it",
    "segment": "cut images into segments by a network's features, without any label",
    "correspond": "how well a network's features find the same point in another picture",
    "extract": "write feature maps of images to disk",
    "probe": "rank timesteps and blocks of a generator by how well they tell classes apart",
    "autolabel": "label images, or samples of a generator, with a segmenter: a data set to train on",
    "compare": "what a generator's features are worth where few images are labelled",
    "export": "write a detector as a graph of ONNX, or a program of torch.export",
    "convert-data": "annotations of other tools to COCO, or COCO to Pascal VOC or YOLO",
    "doctor": "say what this machine has, what is missing, and what installs it",
    "completion": "print what lets bash, zsh or tcsh complete commands and options",
    "convert": "checkpoints of DiffusionDet, guided-diffusion, diffusers, ... to model files; generators to diffusers",
}
NOBODY_READS = 141  # the exit code where the output is the pipe to a `head` that has ended: 128 + SIGPIPE
MODELS = ("detector", "segmenter", "generator", "classifier")  # the kinds of model files
USAGE = (
    "usage: diffperception COMMAND [FILE.yaml ...] [--option value] ...\n\n"
    + "\n".join(f"  {name:14}{summary}" for name, summary in COMMANDS.items())
    + "\n\n`diffperception COMMAND --help` explains the options of a command,"
    + " `train --task TASK --help` those of a task.\n"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments (default: those of the command line) name.

    Returns: the exit code: the command's own, 0 if it has none, 2 after what the user or the machine can mend, 1 after
        any other error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    if arguments is None:  # the process is ours, from its beginning to its end
        keep_freed_memory()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    with spoken_plainly():
        try:
            code = dispatch(name, arguments[1:])
            sys.stdout.flush()
            return code
        except SystemExit:
            close_output()
            raise
        except KeyboardInterrupt as end:
            number = signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT
            sys.stderr.write(f"diffperception {name}: {'interrupted' if number == signal.SIGINT else 'terminated'}\n")
            return 128 + number
        except BrokenPipeError:
            close_output()
            return NOBODY_READS
        except Exception as error:
            if {"--debug", "--debug=true"} & set(arguments):
                raise
            text, code = failure(error, name)
            sys.stderr.write(f"diffperception {name}: {text}\n")
            return code


def tool(name: str) -> NoReturn:
    """What tools/NAME.py does, but not where it is imported by processes that cannot be forked."""
    keep_freed_memory()
    sys.exit(main([name, *sys.argv[1:]]))


def dispatch(name: str, arguments: Sequence[str]) -> int:
    """Call command `name` with what the arguments say; ValueError, naming the nearest, if there is none."""
    if name in ("--help", "-h", "help"):
        sys.stdout.write(USAGE)
        return 0
    if name == "--version":
        sys.stdout.write(f"diffperception {__version__}\n")
        return 0
    sys.path.append(os.getcwd())  # a user's own model or transform is found by its import path
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise ValueError(f"there is no such command; {hint}")
    if name == "train":
        from diffperception.training.configured import train_by_arguments

        stopped = train_by_arguments(arguments, require_output=True).signal
        return 0 if stopped is None else 128 + stopped
    from diffperception.configuration.inheritance import given, spread_files
    from diffperception.configuration.parser import Options, call
    from diffperception.models.base import trusting, weights_lie_in

    spread = spread_files(arguments)
    by_kind = functions(name)
    kind = find_task(name, spread) or find_kind(spread, by_kind)
    if kind is not None:
        with trusting(given(spread, "trust")), weights_lie_in(given(spread, "weights")):
            return call(by_kind[kind], arguments, name)
    if not {"--help", "-h"} & set(arguments):
        models = [kind for kind in by_kind if kind in MODELS]
        ways = [f"--model, the file of a {' or '.join(models)}"] if models else []
        raise ValueError(f"give {', or '.join([*ways, *(f'--{kind}' for kind in by_kind if kind not in models)])}")
    for command in by_kind.values():
        Options(name, command).parser.print_help()
    return 0


def module_of(name: str) -> ModuleType:
    """The module of a command: that of convert-data is convert_data."""
    return importlib.import_module(f"diffperception.cli.{name.replace('-', '_')}")


def functions(name: str) -> Mapping[str, Callable[..., int | None]]:
    """The functions of a command by the kind of thing that they work on; a single one by the command's name."""
    module = module_of(name)
    return getattr(module, "BY_KIND", None) or {name: module.command}


def find_task(name: str, arguments: Sequence[str]) -> str | None:
    """The kind that the arguments name by their `task`, for a command that knows tasks."""
    tasks: Mapping[str, str] = getattr(module_of(name), "BY_TASK", {})
    from diffperception.configuration.inheritance import given

    task = given(arguments, "task") if tasks else None
    if task is None:
        return None
    if task not in tasks:
        raise ValueError(f"there is no task {task} to {name} for: the tasks are {', '.join(tasks)}")
    return tasks[task]


def find_kind(arguments: Sequence[str], kinds: Collection[str]) -> str | None:
    """Which of the kinds the arguments, with their files spread, speak of; None if they do not say.

    Raises:
        FileNotFoundError, ValueError: the model file is none, or of a kind that the command does not know.
    """
    if len(kinds) == 1:
        return next(iter(kinds))
    from diffperception.configuration.inheritance import given
    from diffperception.models.base import file_kind

    for kind in kinds:
        if given(arguments, kind) is not None:
            return kind
    file = given(arguments, "model")
    if file is None:
        return None
    kind = file_kind(file)
    if kind not in kinds:
        raise ValueError(f"{file} holds a {kind}: give the file of a {' or '.join(k for k in kinds if k in MODELS)}")
    return kind


if __name__ == "__main__":
    sys.exit(main())
