"""Commands in processes that are killed at some moment. Run as a program, it starts them by forking."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Ending(NamedTuple):
    """How a command ended: its exit code, negative where a signal killed it; after how many seconds; its errors."""

    code: int
    seconds: float
    said: str


class Starter:
    """A process that has imported everything and starts commands; it ends with the context."""

    def __enter__(self) -> "Starter":
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.helpers.killing"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        return self

    def run(self, arguments: list[str], kill_after: float | None = None, file_bytes: int | None = None) -> Ending:
        """Run a command of ours to its end, or kill it, as `kill -9`, after some seconds.

        Args:
            file_bytes: no file can become larger, as on a disk that is full.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([arguments, kill_after, file_bytes]) + "\n")
        self.process.stdin.flush()
        return Ending(*json.loads(self.process.stdout.readline()))

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def serve() -> None:
    """Do what each line on the input says, and answer with a line."""
    import diffperception.cli.autolabel
    import diffperception.cli.predict
    import diffperception.cli.sample
    import diffperception.segmentation.feature_folder
    import diffperception.training.configured
    import diffperception.training.recipes.detection  # noqa: F401

    answers, errors = os.dup(1), tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors.fileno(), 2)
    for line in sys.stdin:
        arguments, kill_after, file_bytes = json.loads(line)
        began, start = time.monotonic(), errors.seek(0, os.SEEK_END)
        child = os.fork()
        if child == 0:
            work(arguments, file_bytes)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(start)
        answer = [code, time.monotonic() - began, errors.read().decode()]
        os.write(answers, (json.dumps(answer) + "\n").encode())


def work(arguments: list[str], file_bytes: int | None) -> None:
    """What a started process does; it does not return."""
    import resource

    from diffperception.cli.main import main

    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    code = 1
    try:
        code = main(arguments)
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
