"""A run that is interrupted at any step and resumed equals the uninterrupted run bit for bit."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffperception.cli.main import main
from tests.training.tiny_data import write_tiny_config
from tests.training.tiny_detector import PowerCut

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
UNPLUGGED = ["--model", "tests.training.tiny_detector.UnpluggedDetector"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_config(tmp_path_factory.mktemp("tiny"))


def train(config: Path, output: Path, *options: str) -> int:
    return main(["train", "--config", str(config), "--output", str(output), *options])


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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_stopped_at_any_step_ends_like_the_uninterrupted_one(
    config: Path, tmp_path: Path, accumulate: int
) -> None:
    options = ["--trainer.accumulate", str(accumulate)]
    assert train(config, tmp_path / "whole", *options) == 0
    # Step 1 comes before the first checkpoint, 4 right after it, 5 after the evaluation at 4, 9 is the last.
    for step in (1, 4, 5, 9):
        run = tmp_path / f"stopped_{step}"
        call = accumulate * step  # inside an accumulation, where there is one
        with pytest.raises(PowerCut):
            train(config, run, *options, *UNPLUGGED, "--model.die_at", str(call))
        assert (run / "last.ckpt").exists() == (step > 3)
        assert train(config, run, *options, "--resume") == 0
        assert_same_run(tmp_path / "whole", run)


def test_a_checkpoint_is_read_once(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(config, tmp_path, "--trainer.max_steps", "3") == 0
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, *args, **options: read.append(file) or load(file, *args, **options))
    assert train(config, tmp_path, "--trainer.max_steps", "4", "--resume") == 0
    assert read == [tmp_path / "last.ckpt"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_real_detector_resumes_bit_for_bit(config: Path, tmp_path: Path, precision: str) -> None:
    options = ["--model", "tests.training.tiny_detector.UnpluggedDiffusionDet", "--trainer.precision", precision]
    options += ["--trainer.max_steps", "6", "--evaluation.every", "2", "--evaluation.num_pictures", "0"]
    assert train(config, tmp_path / "whole", *options) == 0
    with pytest.raises(PowerCut):
        train(config, tmp_path / "stopped", *options, "--model.die_at", "5")
    assert train(config, tmp_path / "stopped", *options, "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_killed_without_a_word_and_resumed(config: Path, tmp_path: Path) -> None:
    command = ["-m", "diffperception", "train", "--config", str(config), "--output", str(tmp_path / "killed")]
    assert python(*command, "--model.die_at", "6", "--data.workers", "1") == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert train(config, tmp_path / "killed", "--resume") == 0
    assert train(config, tmp_path / "whole") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_killed_and_resumed(config: Path, tmp_path: Path) -> None:
    command = [*TORCHRUN, "-m", "diffperception", "train", "--config", str(config), "--output"]
    assert python(*command, str(tmp_path / "killed"), "--model.die_at", "6") != 0
    assert (tmp_path / "killed" / "last.ckpt").exists()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert python(*command, str(tmp_path / "killed"), "--resume") == 0
    assert python(*command, str(tmp_path / "whole")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
