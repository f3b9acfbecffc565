"""`diffperception evaluate --samples` from its options."""

import json
from argparse import ArgumentError
from pathlib import Path

import pytest
import torch
import yaml

from diffperception.cli.evaluate import evaluate_sample_folder
from diffperception.cli.main import main
from diffperception.configuration.parser import call
from diffperception.generation.evaluator import ScoringOptions, evaluate_samples
from diffperception.training.recipes.generation import training_crops
from tests.helpers.images import write_images

FEATURES = ["--features", "random:resnet18", "--size", "32", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "real", 30, seed=0)
    write_images(root / "good", 24, seed=1)
    return root


def test_the_command_writes_what_the_library_finds(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--samples", str(folders / "good"), "--reference", str(folders / "real"), "--output", str(tmp_path)]
    assert call(evaluate_sample_folder, [*arguments, *FEATURES]) == 0
    content = json.loads((tmp_path / "metrics.json").read_text())
    options = ScoringOptions("random:resnet18", size=32, workers=0, device="cpu")
    report = evaluate_samples(folders / "good", folders / "real", options)
    assert content["metrics"] == vars(report.metrics)
    assert content["settings"] == report.settings
    said = capsys.readouterr().out
    assert report.table() in said
    assert "24 samples, 30 real images; 512 features" in said
    assert f"note: {report.notes[0]}" in said
    with pytest.raises(ValueError, match="--overwrite"):
        call(evaluate_sample_folder, [*arguments, *FEATURES])
    assert call(evaluate_sample_folder, [*arguments, *FEATURES, "--overwrite"]) == 0


def write_config(folders: Path, path: Path, side: int) -> Path:
    """As by hand, stating only what differs from the defaults."""
    unet = {"channels": 32, "channel_mult": [1], "attention": [], "num_res_blocks": 1}
    data = {"images": str(folders / "real"), "horizontal_flip": 0.0, "short_side": 24}
    model = {
        "class_path": "diffperception.generation.DiffusionModel",
        "init_args": {"image_size": side, "network": unet},
    }
    path.write_text(yaml.safe_dump({"task": "generation", "model": model, "data": data}))
    return path


def test_the_reference_may_be_the_pictures_of_a_training(folders: Path, tmp_path: Path) -> None:
    """Its crops are those of the training; of pictures as large as a crop they are the pictures."""
    config = write_config(folders, tmp_path / "config.yaml", side=24)
    arguments = ["--samples", str(folders / "real"), "--reference", str(config), *FEATURES]
    assert call(evaluate_sample_folder, [*arguments, "--output", str(tmp_path / "same")]) == 0
    metrics = json.loads((tmp_path / "same" / "metrics.json").read_text())["metrics"]
    assert metrics["fid"] == pytest.approx(0, abs=1e-6)
    assert metrics["precision"] == metrics["recall"] == 1
    config.write_text("task: detection\n")
    with pytest.raises(ValueError, match="not the config"):
        call(evaluate_sample_folder, arguments)
    config.write_text("task: generation\ndata: {imags: x}\n")
    with pytest.raises(ArgumentError, match="imags"):
        call(evaluate_sample_folder, arguments)


def test_the_crops_are_a_function_of_the_seed(folders: Path, tmp_path: Path) -> None:
    config = write_config(folders, tmp_path / "config.yaml", side=16)
    crops = [training_crops(config, 6, seed) for seed in (0, 0, 1)]
    images = [torch.stack([each[i] for i in range(len(each))]) for each in crops]
    assert images[0].shape == (6, 3, 16, 16)
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    distances = []
    for seed in "01":
        arguments = ["--samples", str(folders / "good"), "--reference", str(config), *FEATURES, "--seed", seed]
        assert call(evaluate_sample_folder, [*arguments, "--output", str(tmp_path / seed)]) == 0
        distances.append(json.loads((tmp_path / seed / "metrics.json").read_text())["metrics"]["fid"])
    assert distances[0] != pytest.approx(distances[1], rel=1e-3)


def test_the_samples_say_what_is_evaluated(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--samples", str(folders / "good"), "--reference", str(folders / "real"), *FEATURES]
    assert main(["evaluate", *arguments]) == 0
    assert "24 samples, 30 real images" in capsys.readouterr().out
    assert main(["evaluate", *arguments, "--subset_size", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
