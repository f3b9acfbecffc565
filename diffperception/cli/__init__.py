"""The commands: `diffperception NAME` and `tools/NAME.py` are the same function."""

import os
import sys

from tqdm import tqdm

PROCESS_NUMBERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID")

TASKS = {  # of the commands that do the same for several; the first is meant where none is named
    "train": ("detection", "generation", "classifier", "segmentation"),
    "evaluate": ("detection", "generation", "segmentation"),
    "convert": ("networks", "segmentation"),
}


def first_process() -> bool:
    """Whether this is the only process, or the one of several (torchrun's, or Lightning's) that prints and writes."""
    return all(int(os.environ.get(name, 0)) == 0 for name in PROCESS_NUMBERS)


def counted(number: int, thing: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def say(text: str) -> None:
    """Print `text` for the user, once for all processes. Commands print through this function only."""
    if first_process():
        tqdm.write(text)  # above a progress bar, if there is one
        sys.stdout.flush()
