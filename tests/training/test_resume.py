"""A run that is interrupted at any step and resumed equals the uninterrupted run bit for bit."""

import signal
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import TORCHRUN, UNPLUGGED, assert_same_run, fixtures_of, python, train
from tests.training.tiny_data import write_tiny_config
from tests.training.tiny_detector import PowerCut

config, _ = fixtures_of(write_tiny_config)


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


def test_a_broken_configuration_of_the_run_is_named(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path, "--trainer.max_steps", "1") == 0
    (tmp_path / "config.yaml").write_text("model: [")
    assert train(config, tmp_path, "--trainer.max_steps", "2", "--resume") == 2
    assert f"{tmp_path / 'config.yaml'} is not YAML" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_real_detector_resumes_bit_for_bit(config: Path, tmp_path: Path, precision: str) -> None:
    options = ["--model", "tests.training.tiny_detector.UnpluggedDiffusionDet", "--trainer.precision", precision]
    options += ["--trainer.max_steps", "6", "--evaluation.every", "2", "--evaluation.num_pictures", "0"]
    assert train(config, tmp_path / "whole", *options) == 0
    with pytest.raises(PowerCut):
        train(config, tmp_path / "stopped", *options, "--model.die_at", "5")
    assert train(config, tmp_path / "stopped", *options, "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    (state,) = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=False)["optimizer_states"]
    # One pass over the weights; under autocast Lightning would clip no gradients of such an optimizer.
    assert all(bool(group["fused"]) == (precision == "32-true") for group in state["param_groups"])


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
