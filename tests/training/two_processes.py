"""What each of two processes runs in `test_resume.py`: a whole run, and one that is cut off and resumed."""

import sys
from contextlib import suppress
from pathlib import Path

from diffperception.cli.main import main
from tests.training.tiny_detector import PowerCut

config, folder = map(Path, sys.argv[1:])


def train(name: str, *options: str) -> int:
    return main(["train", "--config", str(config), "--output", str(folder / name), *options])


code = train("whole")
with suppress(PowerCut):
    train("stopped", "--model", "tests.training.tiny_detector.UnpluggedDetector", "--model.die_at", "6")
sys.exit(code or train("stopped", "--resume"))
