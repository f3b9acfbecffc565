"""What a user is told when a command fails: one sentence that says what to change, and an exit code."""

import os
import re
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from diffperception.configuration.messages import sentence

MISTAKE, FAULT = 2, 1  # exit codes: the user or the machine can mend it; the program could not go on

# What takes memory in each command, most of it first.
SAVINGS = {
    "train": "a smaller data.batch_size or fit.batch_size, fewer data.workers, smaller images or a smaller model, such"
    " as fewer num_boxes of a detector",
    "evaluate": "a smaller --batch_size, fewer --workers or, of a detector, --num_boxes",
    "predict": "a smaller --batch_size, fewer --workers or, of a detector, --num_boxes",
    "track": "fewer --workers or --num_boxes",
    "sample": "a smaller --batch_size or a smaller --image_size",
    "augment": "smaller pictures",
    "likelihood": "a smaller --batch_size",
    "segment": "a smaller --short_side or fewer --cut.cells",
    "correspond": "a smaller --short_side, fewer --max_images or fewer --warp.points",
    "extract": "a smaller --short_side or fewer --workers",
    "autolabel": "a smaller --batch_size or fewer --workers",
    "probe": "a smaller --data.short_side or fewer --pixels",
    "compare": "a smaller --data.short_side or a smaller --fit.batch_size",
}
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cannot allocate memory|bad_alloc|bad allocation"
    r"|unable to allocate|ALLOC_FAILED",
    re.IGNORECASE,
)
_NO_SHARED_MEMORY = re.compile(r"bus error|shared memory|unable to write to file </torch|\bshm", re.IGNORECASE)
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)")
_WORKERS_ERROR = re.compile(r"Caught (\w+) in (DataLoader worker process|pin memory thread)")
_LOST_PEER = re.compile(
    r"connection (closed|reset|refused|was likely closed)|closed by peer|gloo|nccl|broken pipe|timed out",
    re.IGNORECASE,
)


def failure(error: Exception, command: str) -> tuple[str, int]:
    """What to say of an error that ended a command, in one line, and the exit code."""
    kind, text = type(error).__name__, str(error)
    if found := _WORKERS_ERROR.match(text):
        kind, text = found[1], sentence(RuntimeError(text))
    if _is_lost_peer(kind, text):
        return "another of the processes ended; what it said tells why", FAULT
    if _NO_SHARED_MEMORY.search(text) and ("DataLoader" in text or "/torch" in text):
        return "the shared memory (/dev/shm) is full: take fewer workers, 0 for none, or give it more", MISTAKE
    if _DEAD_WORKER.search(text):
        return (
            "a process that read images was killed, as systems do when they run out of memory: take fewer workers, or 0"
            " for none, or a smaller batch",
            MISTAKE,
        )
    if kind in ("MemoryError", "OutOfMemoryError") or _NO_MEMORY.search(text):
        savings = SAVINGS.get(command, "smaller files, or a machine with more of it")
        if _is_of_accelerator(kind, text):
            device = "" if command == "train" else ", or --device cpu"
            return f"the memory of the accelerator does not suffice: take {savings}{device}", MISTAKE
        return f"the memory of this machine does not suffice: take {savings}", MISTAKE
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != __package__.partition(".")[0]:
        said = f"the package {error.name} is needed for this and not installed: pip install it"
        return text if "which is not installed" in text else said, MISTAKE
    if isinstance(error, ArgumentError | ValueError | OSError) and not isinstance(error, UnicodeError):
        return sentence(error) or f"{kind} without a message", MISTAKE
    first = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    advice = "run again with --debug for the traceback and report it"
    return f"unexpected error: {kind}: {first[:300]}; {advice}", FAULT


def _is_lost_peer(kind: str, text: str) -> bool:
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return together and (kind.startswith("Dist") or (kind == "RuntimeError" and bool(_LOST_PEER.search(text))))


def _is_of_accelerator(kind: str, text: str) -> bool:
    return kind == "OutOfMemoryError" or bool(re.search(r"CUDA|CUDNN|CUBLAS|MPS|HIP|XPU", text))


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: files in the making are removed."""


@contextmanager
def spoken_plainly() -> Iterator[None]:
    """Within it, what cannot be encoded is spelled out, warnings are one line, and SIGTERM raises `Terminated`."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    handles = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and current_thread() is main_thread()
    if handles:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # for programmers
            warnings.showwarning = _note
            yield
    finally:
        if handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    if parent_process() is None:
        raise Terminated
    signal.signal(number, signal.SIG_DFL)  # a worker has inherited this
    os.kill(os.getpid(), number)


def _note(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A warning as one line, without the place in the program."""
    sys.stderr.write(f"note: {' '.join(str(message).split())}\n")


def close_output() -> None:
    """Let nothing more be written to an output that nobody reads, such as the pipe to a `head` that has ended."""
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                os.dup2(nowhere.fileno(), stream.fileno())
