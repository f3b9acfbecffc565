"""What each of two processes runs for `test_two_processes.py`, which starts them once."""

import sys
from contextlib import suppress
from pathlib import Path

from diffperception.cli.main import main
from tests.training.tiny_detector import PowerCut


def train(config: str, output: Path, *options: str) -> int:
    return main(["train", config, "--output", str(output), *options])


def run(detector: str, generator: str, folder: Path) -> int:
    """A detector's whole run, one that is cut off and resumed, and one of a generator; returns the exit code."""
    codes = [train(detector, folder / "whole")]
    with suppress(PowerCut):
        train(
            detector,
            folder / "stopped",
            "--model",
            "tests.training.tiny_detector.UnpluggedDetector",
            "--model.die_at",
            "6",
        )
    codes.append(train(detector, folder / "stopped", "--resume"))
    codes.append(train(generator, folder / "generator", "--preview.num_samples", "3"))
    return max(codes)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
