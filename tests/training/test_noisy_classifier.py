import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from diffperception.cli.main import main
from diffperception.data.image_folder import ImageDataOptions, ImageFolder
from diffperception.diffusion import (
    DenoiserOutput,
    Schedule,
    classifier_guidance,
    linear_schedule,
    sample_ddim,
)
from diffperception.generation import DiffusionModel
from diffperception.models import NoisyClassifier, UNet
from diffperception.training.recipes.noisy_classifier import held_out_accuracy
from tests.helpers.runs import copy_run

SIDE, SPREAD = 8, 0.05
PATTERN = torch.cat([torch.full((SIDE // 2,), -0.5), torch.full((SIDE // 2,), 0.5)])  # dark to the left, bright
MODEL = {
    "image_size": SIDE,
    "channels": 32,
    "channel_mult": [1],
    "num_res_blocks": 1,
    "attention": [],
    "num_head_channels": 32,
}


def write_pictures(folder: Path, number: int, names: tuple[str, ...] = ("left", "right")) -> Path:
    """Noisy copies of the pattern mirrored, and of the pattern."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            signal = (2 * k - 1) * PATTERN[:, None].numpy() + SPREAD * rng.standard_normal((SIDE, SIDE, 3))
            pixels = ((signal.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def write_config(folder: Path, **changes: object) -> Path:
    config = {
        "task": "classifier",
        "model": {"class_path": "diffperception.models.NoisyClassifier", "init_args": MODEL},
        "data": {
            "images": str(folder / "train"),
            "val_images": str(folder / "val"),
            "horizontal_flip": 0.0,
            "batch_size": 16,
            "workers": 0,
        },
        "optimizer": {"lr": 3e-3, "base_batch_size": 16, "warmup_steps": 5, "ema_decay": 0.9},
        "trainer": {"max_steps": 60, "log_every": 5, "checkpoint_every": 60, "accelerator": "cpu"},
        "evaluation": {"every": 30, "num_images": 8, "num_ranges": 4},
        "output": str(folder / "run"),
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two classes that differ in which side is bright."""
    folder = tmp_path_factory.mktemp("classifier")
    write_pictures(folder / "train", 32)
    write_pictures(folder / "val", 8)
    assert main(["train", "--config", str(write_config(folder))]) == 0
    return folder / "run"


def test_training_lowers_the_loss_and_reports_accuracy_by_noise(run: Path) -> None:
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows]
    assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:2])
    assert [row["step"] for row in rows if row["val/accuracy"]] == ["30", "60"]
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    ranges = [metrics[f"accuracy_{name}"] for name in ("0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1")]
    assert ranges[0] == ranges[1] == 1
    assert ranges[3] < 1  # there is hardly any signal left
    assert metrics["accuracy"] == pytest.approx(np.mean(ranges))
    assert (run / "pictures" / "curves.png").is_file()


def test_a_resumed_run_must_have_the_same_path(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_run(run, tmp_path)
    command = ["train", "--config", str(run / "config.yaml"), "--output", str(tmp_path), "--resume"]
    assert main([*command, "--model.schedule", "cosine"]) == 2
    assert f"model.schedule is cosine, but the run in {tmp_path} was begun with linear: " in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()


def test_the_accuracy_is_the_same_in_every_call_and_batch(run: Path) -> None:
    classifier = NoisyClassifier.load(run / "model.safetensors")
    images = ImageFolder(ImageDataOptions(run.parent / "val", labelled=True, horizontal_flip=0.0), (SIDE, SIDE))
    first = held_out_accuracy(classifier, images, None, 16, 4)
    assert held_out_accuracy(classifier, images, None, 16, 4) == first
    assert first == pytest.approx(json.loads((run / "metrics.json").read_text())["metrics"], abs=1e-6)
    classifier.pool.out.bias.data += torch.tensor([100.0, 0.0])  # always the first class: half of them
    assert held_out_accuracy(classifier, images, 10, 4, 2)["accuracy"] == 0.5


def test_a_trained_classifier_guides_samples_to_the_class(run: Path) -> None:
    """The denoiser is that of both classes, in closed form; half of its samples are of either."""
    classifier, schedule = NoisyClassifier.load(run / "model.safetensors"), linear_schedule()
    grid, noise = linear_schedule().grid(25, "trailing"), torch.randn(40, 3, SIDE, SIDE)

    def denoiser(x: Tensor, t: Tensor) -> DenoiserOutput:
        return DenoiserOutput(both_classes(schedule, x, t))

    unguided = (sample_ddim(denoiser, schedule, noise, grid) * PATTERN).mean((1, 2, 3))
    assert torch.allclose(unguided.abs(), PATTERN.square().mean(), atol=0.05)
    assert 10 < (unguided > 0).sum() < 30
    labels = torch.tensor([0, 1]).repeat(20)
    guided = classifier_guidance(denoiser, classifier.log_probability(labels), schedule, 8.0)
    sides = (sample_ddim(guided, schedule, noise, grid) * PATTERN).mean((1, 2, 3))
    assert ((sides > 0) == (labels == 1)).float().mean() > 0.9


def both_classes(schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
    """The expected signal of an even mixture of two Gaussians, around the pattern mirrored and the pattern."""
    alpha, sigma = (value.float()[:, None, None, None] for value in (schedule.alpha(t), schedule.sigma(t)))
    variance = (alpha * SPREAD).square() + sigma.square()
    mean = torch.tanh((x * alpha * PATTERN / variance).sum((1, 2, 3), keepdim=True)) * PATTERN
    return mean + alpha * SPREAD**2 / variance * (x - alpha * mean)


@pytest.mark.parametrize(
    ("names", "val_names", "complaint"),
    [
        (("left",), ("left",), "needs two or more"),
        (("left", "right"), ("left", "middle"), "hold folders of different names"),
    ],
)
def test_folders_that_are_no_classes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple, val_names: tuple, complaint: str
) -> None:
    write_pictures(tmp_path / "train", 1, names)
    write_pictures(tmp_path / "val", 1, val_names)
    assert main(["train", "--config", str(write_config(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_command_guides_a_generator_and_refuses_another_path(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new generator predicts no noise, so that the classifier alone tells the samples of the classes apart."""
    unet = UNet(channels=32, channel_mult=(1,), num_res_blocks=1, attention=(), num_head_channels=32)
    for schedule in ("linear", "cosine"):
        DiffusionModel(None, unet, schedule=schedule, image_size=SIDE).save(tmp_path / f"{schedule}.safetensors")
    options = ["--classifier", str(run / "model.safetensors"), "--num_samples", "4", "--sampling.steps", "3"]
    for scale in ("0", "5"):
        command = ["sample", "--model", str(tmp_path / "linear.safetensors"), "--output", str(tmp_path / scale)]
        assert main([*command, *options, "--classifier-scale", scale, "--device", "cpu"]) == 0
    names = ["left/000000.png", "left/000002.png", "right/000001.png", "right/000003.png"]
    for folder in (tmp_path / "0" / "images", tmp_path / "5" / "images"):
        assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png")) == names
    free, guided = (
        [np.asarray(Image.open(tmp_path / scale / "images" / name)).astype(float) for name in names]
        for scale in ("0", "5")
    )
    shifts = [((g - f) * PATTERN[:, None].numpy()).mean() for f, g in zip(free, guided, strict=True)]
    assert np.mean(shifts[:2]) < np.mean(shifts[2:])

    command = ["sample", "--model", str(tmp_path / "cosine.safetensors"), "--output", str(tmp_path / "no")]
    assert main([*command, *options]) == 2
    assert "learned with schedule linear" in capsys.readouterr().err
