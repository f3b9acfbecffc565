"""`diffperception evaluate --task generation` from its options."""

import json
import shutil
from argparse import ArgumentError
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

from diffperception.cli.evaluate_generation import evaluate, training_crops
from diffperception.configuration.messages import sentence
from diffperception.configuration.parser import call

FEATURES = ["--features", "random:resnet18", "--size", "32", "--workers", "0"]


def write_images(folder: Path, count: int, seed: int, brightness: int = 0, side: int = 24) -> Path:
    """Smooth random pictures, every second one a JPEG in a folder below."""
    generator = torch.Generator().manual_seed(seed)
    (folder / "more").mkdir(parents=True)
    for i in range(count):
        coarse = torch.randint(0, 120, (1, 3, 4, 4), generator=generator).float()
        image = (brightness + torch.nn.functional.interpolate(coarse, side, mode="bicubic")[0]).clamp(0, 255).byte()
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.save(folder / "more" / f"{i}.jpg" if i % 2 else folder / f"{i}.png", quality=95)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "real", 30, seed=0)
    write_images(root / "good", 24, seed=1)
    write_images(root / "bright", 24, seed=1, brightness=120)
    return root


def score(folders: Path, samples: str, output: Path, *options: str) -> dict:
    arguments = ["--samples", str(folders / samples), "--reference", str(folders / "real"), "--output", str(output)]
    assert call(evaluate, [*arguments, *FEATURES, *options]) == 0
    return json.loads((output / "metrics.json").read_text())


def test_samples_of_another_brightness_score_worse(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = score(folders, "good", tmp_path / "good")
    said = capsys.readouterr().out
    bright = score(folders, "bright", tmp_path / "bright")
    assert good["metrics"].keys() == {"fid", "kid", "kid_std", "precision", "recall"}
    assert good["metrics"]["fid"] < 0.5 * bright["metrics"]["fid"]
    assert good["metrics"]["kid"] < 0.5 * bright["metrics"]["kid"]
    assert good["metrics"]["recall"] > bright["metrics"]["recall"]
    assert good["images"] == {"samples": 24, "reference": 30}
    assert good["settings"]["subset_size"] == 12
    assert all(
        part in said for part in ("FID", "KID", "+-", "precision", "recall", "24 samples, 30 real images", "512")
    )


def test_scores_depend_neither_on_batches_nor_on_workers(folders: Path, tmp_path: Path) -> None:
    one = score(folders, "good", tmp_path / "one", "--batch_size", "5")
    other = score(folders, "good", tmp_path / "other", "--batch_size", "24", "--workers", "1")
    assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-3, abs=1e-6)


def test_what_makes_figures_doubtful_is_said(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "large", 6, seed=2, side=40)
    Image.new("RGB", (10, 20)).save(tmp_path / "large" / "grid.png")
    content = score(folders, str(tmp_path / "large"), tmp_path / "scores")
    sizes, rank = content["notes"]
    assert "samples: 6 of 40 x 40, 1 of 10 x 20; reference: 30 of 24 x 24" in sizes
    assert "7 images cannot fill a covariance of 512 features" in rank
    said = capsys.readouterr().out
    assert f"note: {sizes}" in said
    assert f"note: {rank}" in said


def test_a_file_of_weights(folders: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model("resnet18").state_dict()}, tmp_path / "weights.pth")
    content = score(
        folders, "good", tmp_path, "--features", "resnet18", "--weights", str(tmp_path / "weights.pth"), "--size", "32"
    )
    assert content["settings"]["weights"] == str(tmp_path / "weights.pth")
    assert content["metrics"]["fid"] > 0


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_is_named(folders: Path, tmp_path: Path, workers: str) -> None:
    write_images(tmp_path / "samples", 40, seed=0)
    (tmp_path / "samples" / "more" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"more/broken\.png cannot be read") as error:
        score(folders, str(tmp_path / "samples"), tmp_path / "scores", "--workers", workers)
    assert sentence(error.value).startswith("the image ")
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("count", "options", "part"),
    [
        (0, [], "no image in"),
        (3, [], "need 4 images or more, and there are 3 in the folder of samples"),
        (8, ["--subset_size", "9"], "9 images or more, and there are 8"),
        (8, ["--subset_size", "1"], "option subset_size: KID compares 2 images"),
        (4, ["--features", "resnet19"], "no feature network resnet19"),
        (4, ["--size", "9", "--features", "random:test_vit"], "9 x 9 pixels"),
        (4, ["--weights", "absent.pth"], "no checkpoint absent.pth"),
        (4, ["--samples", "absent"], "no folder absent"),
    ],
)
def test_a_mistake_is_one_sentence(folders: Path, tmp_path: Path, count: int, options: list[str], part: str) -> None:
    write_images(tmp_path / "samples", count, seed=0)
    with pytest.raises((ValueError, OSError), match=part) as error:
        score(folders, str(tmp_path / "samples"), tmp_path / "scores", *options)
    assert "\n" not in sentence(error.value)


def test_samples_that_are_some_of_the_real_images_are_precise_but_lack_variety(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for picture in sorted((folders / "real").glob("*.png"))[:8]:
        shutil.copy(picture, tmp_path / "samples")
    metrics = score(folders, str(tmp_path / "samples"), tmp_path, "--neighbours", "1")["metrics"]
    assert metrics["precision"] == 1
    assert metrics["recall"] < 0.9


def write_config(folders: Path, path: Path, side: int) -> Path:
    """As by hand, stating only what differs from the defaults."""
    unet = {"channels": 32, "channel_mult": [1], "attention": [], "num_res_blocks": 1}
    data = {"images": str(folders / "real"), "horizontal_flip": 0.0, "short_side": 24}
    model = {
        "class_path": "diffperception.generation.DiffusionModel",
        "init_args": {"image_size": side, "unet": unet},
    }
    path.write_text(yaml.safe_dump({"task": "generation", "model": model, "data": data}))
    return path


def test_the_reference_may_be_the_pictures_of_a_training(folders: Path, tmp_path: Path) -> None:
    """Its crops are those of the training; of pictures as large as a crop they are the pictures."""
    config = write_config(folders, tmp_path / "config.yaml", side=24)
    arguments = ["--samples", str(folders / "real"), "--reference", str(config), *FEATURES]
    assert call(evaluate, [*arguments, "--output", str(tmp_path / "same")]) == 0
    metrics = json.loads((tmp_path / "same" / "metrics.json").read_text())["metrics"]
    assert metrics["fid"] == pytest.approx(0, abs=1e-6)
    assert metrics["precision"] == metrics["recall"] == 1
    config.write_text("task: detection\n")
    with pytest.raises(ValueError, match="not the config"):
        call(evaluate, arguments)
    config.write_text("task: generation\ndata: {imags: x}\n")
    with pytest.raises(ArgumentError, match="imags"):
        call(evaluate, arguments)


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
        assert call(evaluate, [*arguments, "--output", str(tmp_path / seed)]) == 0
        distances.append(json.loads((tmp_path / seed / "metrics.json").read_text())["metrics"]["fid"])
    assert distances[0] != pytest.approx(distances[1], rel=1e-3)
