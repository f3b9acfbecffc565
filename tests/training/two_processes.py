"""What each of two processes runs for `test_two_processes.py`, which starts them once."""

import sys
from contextlib import suppress
from pathlib import Path

from tests.helpers.runs import UNPLUGGED, train
from tests.training.tiny_detector import PowerCut


def run(detector: Path, generator: Path, folder: Path) -> int:
    """A detector's whole run, one cut off and resumed, one with a teacher, and one of a generator: the exit code."""
    codes = [train(detector, folder / "whole")]
    with suppress(PowerCut):
        train(detector, folder / "stopped", *UNPLUGGED, "--model.die_at", "6")
    codes.append(train(detector, folder / "stopped", "--resume"))
    teacher = ["--module", "DistillationModule", "--module.teacher", str(folder / "teacher.safetensors")]
    student = ["--model", "tests.training.tiny_detector.UnpluggedDiffusionDet", "--trainer.max_steps", "2"]
    codes.append(train(detector, folder / "taught", *student, *teacher, "--trust", "tests"))
    codes.append(train(generator, folder / "generator", "--preview.num_samples", "3"))
    return max(codes)


if __name__ == "__main__":
    sys.exit(run(*map(Path, sys.argv[1:])))
