"""The commands: `diffperception NAME` and `tools/NAME.py` are the same function."""

import sys

from tqdm import tqdm

TASKS = {  # of the commands that do the same for several; the first is meant where none is named
    "train": ("detection", "generation", "classifier", "segmentation"),
    "evaluate": ("detection", "generation", "segmentation"),
    "convert": ("networks", "segmentation"),
}


def counted(number: int, thing: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def say(text: str) -> None:
    """Print `text` for the user, once for all processes. Commands print through this function only."""
    from diffperception.devices import first_process  # imports torch, which a list of the commands does not need

    if first_process():
        tqdm.write(text)  # above a progress bar, if there is one
        sys.stdout.flush()
