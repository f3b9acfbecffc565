"""Training in two processes, which are started once for all tests: they resume, share the work and agree."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffperception.files import OutputFolder
from diffperception.generation import SamplingOptions
from diffperception.models import DiffusionModel
from diffperception.training.recipes.generation import GenerationEvaluator, PreviewOptions
from tests.helpers.runs import TORCHRUN, assert_same_run, logged, python
from tests.training.tiny_data import write_tiny_config
from tests.training.tiny_detector import UnpluggedDiffusionDet
from tests.training.tiny_generator import write_tiny_generator


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that `two_processes` leaves."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("detector", "generator_config"):
        (folder / name).mkdir()
    UnpluggedDiffusionDet(["disc", "square"]).save(folder / "teacher.safetensors")
    detector, generator = write_tiny_config(folder / "detector"), write_tiny_generator(folder / "generator_config")
    assert python(*TORCHRUN, "-m", "tests.training.two_processes", str(detector), str(generator), str(folder)) == 0
    return folder


def test_a_run_that_is_cut_off_and_resumed_ends_like_the_uninterrupted_one(runs: Path) -> None:
    assert_same_run(runs / "whole", runs / "stopped")


def test_both_learn_from_a_teacher(runs: Path) -> None:
    assert all(float(row["train/loss_distillation"]) > 0 for row in logged(runs / "taught") if row["train/loss"])
    assert (runs / "taught/model.safetensors").is_file()


def test_times_are_learned_from_the_losses_of_both(runs: Path) -> None:
    state = torch.load(runs / "generator" / "last.ckpt", weights_only=True)["state_dict"]
    assert int(state["times.seen"].sum()) == 12 * 2 * 4  # steps, processes, images


def test_samples_are_those_of_a_single_process(runs: Path, tmp_path: Path) -> None:
    model = DiffusionModel.load(runs / "generator" / "model.safetensors", allow=("tests",))
    options = PreviewOptions(num_samples=3, sampling=SamplingOptions(steps=2))
    GenerationEvaluator(model, None, options, seed=0).draw(model, OutputFolder(tmp_path), "alone.png")
    alone, shared = (
        np.asarray(Image.open(path)).astype(int)
        for path in (tmp_path / "alone.png", runs / "generator" / "pictures" / "samples_0000012_averaged.png")
    )
    assert np.abs(alone - shared).max() <= 1  # rounding may depend on how many are drawn at once
