"""What is said to the user."""

import sys
from collections.abc import Sequence

from tqdm import tqdm

from diffperception.devices import first_process


def plural(number: int, thing: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def echo(text: str) -> None:
    """Print `text` for the user, in the first of several processes only."""
    if first_process():
        tqdm.write(text)  # above a progress bar, if there is one
        sys.stdout.flush()


def echo_remark(remark: str) -> None:
    """Print a remark for the user, if there is one."""
    if remark:
        echo(remark)


def echo_notes(notes: Sequence[str]) -> None:
    """Print remarks for the user, a line each."""
    for note in notes:
        echo(f"note: {note}")


def echo_left_out(problems: Sequence[str]) -> None:
    """Name the images that cannot be read, if there are any."""
    if problems:
        echo("\n  ".join([f"{plural(len(problems), 'image')} left out:", *problems]))
