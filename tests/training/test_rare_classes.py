"""What training knows of rare classes: how often they occur, and how often their images are repeated."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffperception.cli.main import main
from diffperception.data import CocoDetection
from diffperception.training.recipes.detection import DataOptions
from tests.helpers.runs import UNPLUGGED, assert_same_run, train
from tests.training.tiny_data import write_tiny_config, write_tiny_data
from tests.training.tiny_detector import PowerCut, TinyDetector


class Remembering(TinyDetector):
    """Saves the class frequencies that it was told in training."""

    def __init__(self, classes: list[str]):
        super().__init__(classes)
        self.register_buffer("told", torch.zeros(len(classes)))

    def loss(self, *arguments, **options) -> dict[str, Tensor]:
        self.told.copy_(self.class_frequencies)
        return super().loss(*arguments, **options)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_tiny_config(tmp_path)


def test_the_detector_is_told_in_how_many_images_each_class_is(config: Path, tmp_path: Path) -> None:
    model = f"{__name__}.Remembering"
    options = [
        "--model",
        model,
        "--trainer.max_steps",
        "1",
        "--optimizer.ema_decay",
        "null",
        "--evaluation.every",
        "null",
    ]
    assert train(config, tmp_path / "run", *options) == 0
    told = load_file(tmp_path / "run" / "model.safetensors")["told"]
    assert told.tolist() == [4, 3]  # of the seven images, in turn of one class and the other


def test_images_of_rare_classes_come_more_often(tmp_path: Path) -> None:
    annotations, images = write_tiny_data(tmp_path)
    dataset = CocoDetection(annotations, images)
    options = DataOptions(annotations, images, annotations, images, repeat_threshold=1.0)
    common, rare = (7 / 4) ** 0.5, (7 / 3) ** 0.5
    repeats = options.batches(dataset, 0).repeats
    np.testing.assert_allclose(repeats, [common, rare, common, rare, common, rare, common])
    assert DataOptions(annotations, images, annotations, images).batches(dataset, 0).repeats is None


def test_a_threshold_that_is_no_share_is_refused(config: Path, tmp_path: Path, capsys) -> None:
    arguments = ["train", "--config", str(config), "--output", str(tmp_path / "run")]
    assert main([*arguments, "--data.repeat_threshold", "10"]) == 2
    assert "repeat_threshold is 10" in capsys.readouterr().err


def test_a_run_with_repeats_resumes_bit_for_bit(config: Path, tmp_path: Path) -> None:
    options = ["--data.repeat_threshold", "1.0"]
    assert train(config, tmp_path / "whole", *options) == 0
    with pytest.raises(PowerCut):
        train(config, tmp_path / "stopped", *options, *UNPLUGGED, "--model.die_at", "6")
    assert train(config, tmp_path / "stopped", *options, "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
