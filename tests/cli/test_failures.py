"""Whatever ends a command is one sentence: no traceback, a sensible exit code, and what to change."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from diffperception.cli import main as runner
from diffperception.cli.failures import FAULT, MISTAKE, SAVINGS, failure
from diffperception.cli.main import COMMANDS, functions, main
from diffperception.configuration.parser import Options
from diffperception.training.configured import RECIPES, options_for

WORKER = "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n{0}: {1}"


@pytest.mark.parametrize(
    ("error", "parts", "code"),
    [
        (ValueError("a box is empty"), ["a box is empty"], MISTAKE),
        (FileNotFoundError(2, "No such file", "a.png"), ["a.png: No such file"], MISTAKE),
        (OSError(28, "No space left on device"), ["No space left on device"], MISTAKE),
        (MemoryError(), ["memory of this machine", "--num_boxes"], MISTAKE),
        (OSError(12, "Cannot allocate memory"), ["memory of this machine"], MISTAKE),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ["memory of this machine"], MISTAKE),
        (RuntimeError("std::bad_alloc"), ["memory of this machine"], MISTAKE),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), ["memory of the accelerator", "--device cpu"], MISTAKE),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), ["memory of the accelerator"], MISTAKE),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), ["was killed", "workers"], MISTAKE),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), ["was killed", "workers"], MISTAKE),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It"), ["/dev/shm"], MISTAKE),
        (MemoryError(WORKER.format("MemoryError", "")), ["memory of this machine"], MISTAKE),
        (RuntimeError(WORKER.format("KeyError", "'bbox'")), ["unexpected error: KeyError: 'bbox';", "--debug"], FAULT),
        (ModuleNotFoundError("No module", name="wandb"), ["wandb", "not installed"], MISTAKE),
        (KeyError("bbox"), ["unexpected error: KeyError: 'bbox'; run again with --debug"], FAULT),
        (IndexError("list index\nout of range"), ["unexpected error: IndexError: list index;"], FAULT),
        (AssertionError(), ["unexpected error: AssertionError: no message"], FAULT),
        (RecursionError("maximum depth"), ["unexpected error: RecursionError: maximum depth"], FAULT),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ["unexpected error: UnicodeDecodeError"], FAULT),
    ],
)
def test_an_error_is_one_sentence_and_an_exit_code(error: Exception, parts: list[str], code: int) -> None:
    text, found = failure(error, "predict")
    assert found == code
    assert "\n" not in text
    assert "Traceback" not in text
    assert all(part in text for part in parts), text
    assert ("--device cpu" in text) == ("accelerator" in text), "the CPU is no way out of its own lack of memory"


def test_what_another_process_broke_is_not_reported_as_a_fault_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    assert "unexpected error" in failure(error, "train")[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert failure(error, "train") == ("another of the processes ended; what it said tells why", FAULT)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name in SAVINGS and name != "train"])
def test_what_saves_memory_is_an_option_of_the_command(name: str) -> None:
    options = [Options(name, command) for command in functions(name).values()]
    known = {string for each in options for action in each.parser._actions for string in action.option_strings}
    assert set(re.findall(r"--[\w.]+", SAVINGS[name])) <= known


def test_what_saves_memory_is_an_option_of_training() -> None:
    parsers = [options_for(["--task", task]).parser for task in RECIPES]
    known = {action.dest for parser in parsers for action in parser._actions}
    assert set(re.findall(r"\w+\.\w+", SAVINGS["train"])) <= known


def broken(name: str, arguments: list[str]) -> int:
    raise {"key": KeyError("x"), "memory": MemoryError(), "pipe": BrokenPipeError(32, "x")}[arguments[0]]


def test_no_traceback_unless_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner, "dispatch", broken)
    assert main(["check", "key"]) == 1
    assert main(["check", "memory"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    with pytest.raises(KeyError):
        main(["check", "key", "--debug=true"])


def test_warnings_are_one_line_without_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(name: str, arguments: list[str]) -> int:
        warnings.warn("mind\n  the gap", UserWarning, stacklevel=1)
        warnings.warn("in the next version", FutureWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(runner, "dispatch", warn)
    assert main(["check"]) == 0
    assert capsys.readouterr().err == "note: mind the gap\n"


def test_an_output_that_lacks_a_letter_spells_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(runner, "dispatch", lambda *_: print("螺栓 é"))
    main(["check"])
    assert out.buffer.getvalue() == "\\u87ba\\u6813 é\n".encode("cp1252")  # type: ignore[attr-defined]


def test_an_output_that_is_closed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--help"]) == 0


def test_sigterm_ends_a_command_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wait(name: str, arguments: list[str]) -> int:
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
        try:
            time.sleep(20)
        finally:
            (tmp_path / "tidy").touch()
        return 0

    monkeypatch.setattr(runner, "dispatch", wait)
    assert main(["check"]) == 143
    assert (tmp_path / "tidy").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_pipe_that_nobody_reads_any_more_ends_in_silence() -> None:
    command = [sys.executable, "-m", "diffperception", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    said = process.communicate()[1]
    assert (process.returncode, said) == (141, b"")
