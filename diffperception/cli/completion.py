"""`diffperception completion`."""

import argparse
from typing import Literal, get_args, get_origin

import shtab

from diffperception.cli.main import COMMANDS, functions
from diffperception.configuration.parser import Options
from diffperception.echo import echo
from diffperception.training.configured import RECIPES, options_for


def command(shell: Literal["bash", "zsh", "tcsh"], /) -> None:
    """Print what lets a shell complete commands and options.

    `eval "$(diffperception completion bash)"` for this shell; or write it once where the shell looks, such as
    ~/.local/share/bash-completion/completions/diffperception.

    Args:
        shell: which one.
    """
    echo(shtab.complete(words(), shell))


def words() -> argparse.ArgumentParser:
    """A parser of argparse that knows every command with its options."""
    whole = argparse.ArgumentParser(prog="diffperception")
    commands = whole.add_subparsers()
    for name, summary in COMMANDS.items():
        parser = commands.add_parser(name, help=summary, add_help=False)
        parser.add_argument("files", nargs="*").complete = shtab.FILE  # type: ignore[attr-defined]
        known = {option: action for one in parsers(name) for action in one._actions for option in action.option_strings}
        for option, action in known.items():
            if action.help != argparse.SUPPRESS:
                kind = getattr(action, "_typehint", None)
                choices = [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else None
                added = parser.add_argument(option, choices=choices, help=name)
                if not choices:
                    added.complete = shtab.FILE  # type: ignore[attr-defined]  # most texts among options are paths
    return whole


def parsers(name: str) -> list[argparse.ArgumentParser]:
    """Those of a command: one for each task or kind of thing that it works on."""
    if name == "train":
        return [options_for(["--task", task]).parser for task in RECIPES]
    return [Options(name, function).parser for function in functions(name).values()]
