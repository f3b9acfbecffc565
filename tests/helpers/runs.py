"""Training runs: starting, copying and comparing them."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffperception.cli.main import main

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
UNPLUGGED = ["--model", "tests.training.tiny_detector.UnpluggedDetector"]


def train(config: Path, output: Path, *options: str) -> int:
    return main(["train", "--config", str(config), "--output", str(output), *options])


def fixtures_of(write: Callable[[Path], Path]) -> tuple[Any, Any]:
    """Fixtures of a test module: the configuration that `write` writes into a folder, and a finished run of it."""

    @pytest.fixture(scope="module")
    def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("tiny"))

    @pytest.fixture(scope="module")
    def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        run = tmp_path_factory.mktemp("runs") / "whole"
        assert train(config, run) == 0
        return run

    return config, whole


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffperception")]
    assert len(lines) == 1
    return lines[0]


def python(*arguments: str) -> int:
    """Run Python in a process of its own; returns its exit code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, timeout=300).returncode


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists by path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {name: value}
    return {path: leaf for key, part in items for path, leaf in flatten(part, f"{name}/{key}").items()}


def copy_run(run: Path, folder: Path) -> None:
    """What a resumed run needs of a run."""
    for name in ("last.ckpt", "config.yaml"):
        shutil.copy(run / name, folder / name)


def assert_not_resumed(
    config: Path, run: Path, folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of a run in a folder is not gone on with by these options, and stays as it is."""
    copy_run(run, folder)
    assert train(config, folder, "--resume", *options) == 2
    assert said.format(folder) in complaint(capsys)
    assert (folder / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, averages, optimiser state, exported model and logged numbers are the same to the last bit."""
    first, second = (flatten(torch.load(run / "last.ckpt", weights_only=True)) for run in (one, other))
    kinds = {name.split("/")[1] for name in first}
    assert {"current_model_state", "state_dict", "averaging_state", "optimizer_states", "lr_schedulers"} <= kinds
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, f"{name}: {value} and {second[name]}"
    weights, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert logged(one) == logged(other)


def logged(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what depends on the clock."""
    with open(run / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "train/waiting"} for row in csv.DictReader(file)]
