"""Scores of a folder of samples against a folder of real images."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from diffperception.generation.evaluator import SampleReport, ScoringOptions, evaluate_samples
from tests.helpers.images import write_images


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "real", 30, seed=0)
    write_images(root / "good", 24, seed=1)
    write_images(root / "bright", 24, seed=1, brightness=120)
    return root


def score(folders: Path, samples: str, **options: Any) -> SampleReport:
    settings: dict[str, Any] = {"features": "random:resnet18", "size": 32, "workers": 0, "device": "cpu"}
    return evaluate_samples(folders / samples, folders / "real", ScoringOptions(**settings | options))


def test_samples_of_another_brightness_score_worse(folders: Path) -> None:
    good, bright = score(folders, "good"), score(folders, "bright")
    assert good.metrics.fid < 0.5 * bright.metrics.fid
    assert good.metrics.kid < 0.5 * bright.metrics.kid
    assert good.metrics.recall > bright.metrics.recall
    assert good.images == {"samples": 24, "reference": 30}
    assert good.settings["subset_size"] == 12
    assert all(part in good.table() for part in ("FID", "KID", "+-", "precision", "recall", "3 neighbours"))


def test_scores_depend_neither_on_batches_nor_on_workers(folders: Path) -> None:
    one = score(folders, "good", batch_size=5).metrics
    other = score(folders, "good", batch_size=24, workers=1).metrics
    assert vars(one) == pytest.approx(vars(other), rel=1e-3, abs=1e-6)


def test_what_makes_figures_doubtful_is_said(folders: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "large", 6, seed=2, side=40)
    Image.new("RGB", (10, 20)).save(tmp_path / "large" / "grid.png")
    sizes, rank = score(folders, str(tmp_path / "large")).notes
    assert "samples: 6 of 40 x 40, 1 of 10 x 20; reference: 30 of 24 x 24" in sizes
    assert "7 images cannot fill a covariance of 512 features" in rank


def test_a_file_of_weights(folders: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model("resnet18").state_dict()}, tmp_path / "weights.pth")
    report = score(folders, "good", features="resnet18", weights=tmp_path / "weights.pth")
    assert report.settings["weights"] == str(tmp_path / "weights.pth")
    assert report.metrics.fid > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(folders: Path, tmp_path: Path, workers: int) -> None:
    write_images(tmp_path / "samples", 40, seed=0)
    (tmp_path / "samples" / "more" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"more/broken\.png cannot be read"):
        score(folders, str(tmp_path / "samples"), workers=workers)


@pytest.mark.parametrize(
    ("count", "options", "part"),
    [
        (0, {}, "no image in"),
        (3, {}, "need 4 images or more, and there are 3 in the folder of samples"),
        (8, {"subset_size": 9}, "9 images or more, and there are 8"),
        (8, {"subset_size": 1}, "option subset_size: KID compares 2 images"),
        (4, {"features": "resnet19"}, "no feature network resnet19"),
        (4, {"size": 9, "features": "random:test_vit"}, "9 x 9 pixels"),
        (4, {"weights": "absent.pth"}, "no checkpoint absent.pth"),
    ],
)
def test_a_mistake_is_told(folders: Path, tmp_path: Path, count: int, options: dict, part: str) -> None:
    write_images(tmp_path / "samples", count, seed=0)
    with pytest.raises((ValueError, OSError), match=part):
        score(folders, str(tmp_path / "samples"), **options)


def test_samples_that_are_some_of_the_real_images_are_precise_but_lack_variety(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for image in sorted((folders / "real").glob("*.png"))[:8]:
        shutil.copy(image, tmp_path / "samples")
    metrics = score(folders, str(tmp_path / "samples"), neighbours=1).metrics
    assert metrics.precision == 1
    assert metrics.recall < 0.9


def test_half_precision_stays_close(folders: Path) -> None:
    exact, rounded = (score(folders, "good", precision=precision).metrics for precision in ("32", "bf16"))
    assert rounded.fid == pytest.approx(exact.fid, rel=0.1)
