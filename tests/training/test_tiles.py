"""Training on windows of large pictures."""

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from diffperception.data.batches import SeededSamples
from diffperception.training import train
from diffperception.training.recipes.detection import DataOptions, DetectionRecipe, EvaluationOptions
from tests.training.tiny_data import write_tiny_config, write_tiny_data
from tests.training.tiny_detector import TinyDetector


def options(folder: Path, **changes) -> DataOptions:
    annotations, images = write_tiny_data(folder)  # 7 pictures, 32 wide and 24 to 30 high
    return DataOptions(annotations, images, annotations, images, lambda *sample: sample, workers=0, **changes)


def test_an_epoch_shows_as_many_windows_of_a_picture_as_cover_it(tmp_path: Path) -> None:
    data = options(tmp_path, tile=16)
    train, val = data.open()
    assert data.batches(train, 0).repeats.tolist() == [4] * 7
    assert train[0][0].shape == (3, 16, 16)
    assert val[0][0].shape == (3, 24, 32)
    data.tile = 24
    assert data.batches(train, 0).repeats.tolist() == [2, *[4] * 6]


def test_rare_classes_and_windows_multiply(tmp_path: Path) -> None:
    data = options(tmp_path, tile=16, repeat_threshold=1.0)
    train, _ = data.open()
    data.tile = None
    plain = data.batches(train, 0).repeats
    data.tile = 16
    np.testing.assert_allclose(data.batches(train, 0).repeats, 4 * plain)


def test_windows_are_a_function_of_the_samples_seed(tmp_path: Path) -> None:
    samples = SeededSamples(options(tmp_path, tile=16).open()[0])
    first, again, other = samples[0, 5], samples[0, 5], [samples[0, seed] for seed in range(6, 12)]
    assert torch.equal(first[0], again[0])
    assert any(not torch.equal(first[0], image) for image, _ in other)


def test_training_is_scored_in_windows_of_the_size_it_learns_from(tmp_path: Path) -> None:
    data = options(tmp_path, tile=16)
    for evaluation, expected in ((EvaluationOptions(overlap=4), 16), (EvaluationOptions(tile=20, overlap=4), 20)):
        parts = DetectionRecipe(TinyDetector, data, evaluation=evaluation).prepare(0)
        assert parts.evaluator.options.tile == expected


def test_a_tile_as_large_as_every_picture_changes_no_number(tmp_path: Path) -> None:
    config = write_tiny_config(tmp_path)
    runs = {}
    for name, changes in (("whole", {}), ("tile", {"data.tile": 40, "evaluation.overlap": 8})):
        train(config, output=tmp_path / name, **changes)
        runs[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    assert runs["whole"] == runs["tile"]
    whole, tile = (load_file(tmp_path / name / "model.safetensors") for name in runs)
    assert all(torch.equal(whole[name], tile[name]) for name in whole)


def test_windows_train_to_the_end(tmp_path: Path) -> None:
    config = write_tiny_config(tmp_path)
    train(config, output=tmp_path / "run", **{"data.tile": 16, "evaluation.overlap": 4})
    said = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert said["data"]["tile"] == 16
    assert (tmp_path / "run" / "metrics.json").is_file()
