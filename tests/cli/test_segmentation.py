"""From images and masks to a segmenter, its scores, masks of other images, and the order in which to label them."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffperception.cli.main import main
from diffperception.data.masks import MaskDataOptions
from diffperception.generation import DiffusionModel
from diffperception.models import UNet
from diffperception.segmentation import DiffusionFeatures, MeanIoU, PixelEnsemble, PixelSegmenter
from diffperception.segmentation.inference import FolderScores, ImageScore
from tests.helpers.pixel_classifiers import Classifier, write_classifier

COLOURS = np.array([[60, 60, 60], [220, 40, 40], [40, 60, 220]], np.uint8)
CLASSES = ["ground", "red", "blue"]


def draw(folder: Path, split: str, number: int) -> None:
    """Two rectangles on grey ground with much noise; class 2 lies over class 1."""
    rng = np.random.default_rng(len(split))
    for i in range(number):
        mask = np.zeros((24, 32), np.uint8)
        for label in (1, 2):
            top, left = rng.integers(0, 12, 2)
            mask[top : top + 11, left : left + 15] = label
        pixels = (COLOURS[mask] + rng.normal(0, 50, (24, 32, 3))).clip(0, 255).astype(np.uint8)
        for kind, array in (("images", pixels), ("masks", mask)):
            path = folder / kind / split / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images to learn from and four to measure on, with masks, and a generator that has learned nothing."""
    path = tmp_path_factory.mktemp("cells")
    draw(path, "train", 6)
    draw(path, "val", 4)
    torch.manual_seed(0)
    unet = UNet(channels=32, channel_mult=(1, 1), num_res_blocks=1, attention=(), num_head_channels=32)
    DiffusionModel(None, unet, image_size=16).save(path / "generator.safetensors")
    grey = UNet(**unet.arguments | {"in_channels": 1, "out_channels": 1})
    DiffusionModel(None, grey, image_size=16).save(path / "grey.safetensors")
    return path


def options(folder: Path) -> list[str]:
    data = {"images": "images/train", "masks": "masks/train", "val_images": "images/val", "val_masks": "masks/val"}
    return [
        *(f"--data.{name}={folder / path}" for name, path in data.items()),
        f"--data.classes=[{', '.join(CLASSES)}]",
        *("--members", "3", "--fit.max_minibatches", "150", "--trainer.accelerator", "cpu", "--num_pictures", "2"),
    ]


GENERATOR = "diffperception.segmentation.DiffusionFeatures"
RGB = ("--features", "diffperception.segmentation.RGBFeatures")


def train(folder: Path, output: Path, *more: str) -> int:
    return main(["train", "--task", "segmentation", *options(folder), "--output", str(output), *more])


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The folder of a training on colours."""
    assert train(folder, folder / "run", *RGB) == 0
    return folder / "run"


def evaluate(run: Path, folder: Path, *more: str) -> int:
    where = ["--images", str(folder / "images/val"), "--masks", str(folder / "masks/val")]
    return main(["evaluate", "--device", "cpu", "--model", str(run / "model.safetensors"), *where, *more])


def segment(run: Path, images: Path | str, output: Path, *more: str) -> int:
    where = ["--images", str(images), "--output", str(output), "--device", "cpu"]
    return main(["predict", "--model", str(run / "model.safetensors"), *where, *more])


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_colours_are_learned_and_everything_is_written(run: Path, folder: Path) -> None:
    content = json.loads((run / "metrics.json").read_text())
    assert 0.8 < content["metrics"]["miou"] < 1
    assert list(content["metrics"]["iou"]) == CLASSES
    assert len(content["images"]) == 6
    written = {"config.yaml", "last.ckpt", "metrics.csv", "metrics.json", "model.safetensors", "pictures"}
    assert {path.name for path in run.iterdir()} >= written
    assert {path.name for path in (run / "pictures").iterdir()} == {"0.png", "2.png", "curves.png"}
    assert PixelSegmenter.load(run / "model.safetensors").classes == CLASSES


def test_the_written_options_repeat_the_run(run: Path, tmp_path: Path) -> None:
    assert yaml.safe_load((run / "config.yaml").read_text())["task"] == "segmentation"
    again = ["train", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    old, new = (load_file(path / "model.safetensors") for path in (run, tmp_path / "again"))
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_generators_features_and_a_scale_are_kept_with_the_classifier(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--features",
        GENERATOR,
        f"--features.generator={folder / 'generator.safetensors'}",
        "--features.blocks=[0, 2]",
    ]
    more += ["--features.timesteps=[10]", "--data.short_side=16", "--data.max_images=2", "--seed=1"]
    assert train(folder, tmp_path / "run", *more) == 0
    assert "from 672 pixels of 2 images; 64 features per pixel" in capsys.readouterr().out  # 16 x 21 each
    model = PixelSegmenter.load(tmp_path / "run" / "model.safetensors")
    assert isinstance(model.features, DiffusionFeatures)
    assert (model.features.reader.blocks, model.features.reader.timesteps, model.features.window) == ([0, 2], [10], 16)
    assert model.segment(torch.rand(3, 24, 32)).labels.shape == (24, 32)
    used = json.loads((tmp_path / "run" / "metrics.json").read_text())["images"]
    assert used == MaskDataOptions(folder / "images/train", folder / "masks/train", CLASSES, max_images=2).open(1).names


def test_scores_are_those_of_the_masks(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(run, folder, "--output", str(tmp_path), "--num_pictures", "1") == 0
    assert "mean IoU" in capsys.readouterr().out
    model, counts = PixelSegmenter.load(run / "model.safetensors"), MeanIoU(3)
    held_out = MaskDataOptions(folder / "images/val", folder / "masks/val", CLASSES).open()
    for image, mask in zip(held_out.images, held_out.masks, strict=True):
        counts.update(model.segment(image).labels, mask)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["metrics"] == counts.summary(CLASSES)
    assert content["metrics"] == json.loads((run / "metrics.json").read_text())["metrics"]
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["0.png"]


def test_ignored_pixels_and_absent_classes_do_not_count(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masks that agree with the predictions but for the blue, which they ignore: blue occurs nowhere."""
    assert segment(run, folder / "images/val", tmp_path / "out") == 0
    for path in (tmp_path / "out/masks").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.array([50, 60, 70], np.uint8)[mask]).save(path)
    arguments = ["--masks", str(tmp_path / "out/masks"), "--mask_values={50: 0, 60: 1}", "--ignore", "70"]
    capsys.readouterr()
    assert evaluate(run, folder, *arguments) == 0
    note, *lines = capsys.readouterr().out.splitlines()
    assert "have pixels none of blue, of which nothing is learned or measured from them: they hold 50 (" in note
    rows = [["mean IoU of 2 of 3 classes", "100.0 %"], ["ground", "100.0 %"], ["red", "100.0 %"], ["blue", "-"]]
    assert [re.split("  +", line.strip()) for line in lines][:4] == rows


def test_predict_writes_masks_pictures_and_scores(run: Path, folder: Path, tmp_path: Path) -> None:
    assert segment(run, folder / "images", tmp_path / "out", "--num_pictures", "3") == 0
    names = [f"{split}/{i}.png" for split, number in (("train", 6), ("val", 4)) for i in range(number)]
    rows = table(tmp_path / "out" / "scores.csv")
    assert [row["image"] for row in rows] == names
    model = PixelSegmenter.load(run / "model.safetensors")
    predicted = MaskDataOptions(folder / "images", tmp_path / "out" / "masks", CLASSES).open()
    for row, image, mask in zip(rows, predicted.images, predicted.masks, strict=True):
        found = model.segment(image)
        assert torch.equal(mask, found.labels)
        assert float(row["uncertainty"]) == pytest.approx(found.score, abs=1e-6)
        assert float(row["blue"]) == pytest.approx(float((mask == 2).float().mean()), abs=1e-6)
    for kind in ("overlays", "uncertainty"):
        drawn = sorted((tmp_path / "out" / kind).rglob("*.png"))
        assert len(drawn) == 3
        assert Image.open(drawn[0]).size == (32, 24)
    assert not (tmp_path / "out" / "rank.csv").exists()


def test_rank_puts_the_strangest_first(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path, "pool", 4)
    ramp = np.linspace(COLOURS[1], COLOURS[2], 32)[None].repeat(24, 0).astype(np.uint8)  # neither red nor blue
    Image.fromarray(ramp).save(tmp_path / "images/pool/strange.png")
    (tmp_path / "images/pool/broken.png").write_bytes(b"no picture")
    (tmp_path / "masks/pool/3.png").rename(tmp_path / "three.png")
    more = ["--rank", "--labelled", str(tmp_path / "masks/pool")]
    assert segment(run, tmp_path / "images/pool", tmp_path / "out", *more) == 0
    said = capsys.readouterr().out
    assert "1 image left out" in said
    assert "broken.png" in said
    assert "in rank.png: strange.png" in said
    rows = table(tmp_path / "out" / "rank.csv")
    assert [(row["rank"], row["image"]) for row in rows] == [("1", "strange.png"), ("2", "3.png")]
    values = [float(row["uncertainty"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0
    assert (tmp_path / "out" / "rank.png").exists()


def test_a_class_with_too_few_pixels_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path, "train", 2)
    mask = np.zeros((24, 32), np.uint8)
    mask[3, :4] = 2
    Image.fromarray(mask).save(tmp_path / "masks/train/1.png")
    more = [f"--data.images={tmp_path / 'images/train'}", f"--data.masks={tmp_path / 'masks/train'}"]
    assert train(folder, tmp_path / "run", *RGB, *more) == 0
    assert "note: 1.png has only 4 pixels of class blue; they are ignored." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.classes=[ground, red]"], "has the unknown value 2; known are 0, 1, 255"),
        (["--data.mask_values={0: 0, 1: 1}"], "has the unknown value 2; known are 0, 1, 255"),
        (["--data.val_masks=null"], "give both data.val_images and data.val_masks"),
        (["--data.masks=nowhere"], "there is no folder of masks nowhere"),
        ([f"--features={GENERATOR}", "--features.generator=nowhere"], "there is no model file nowhere"),
        (
            [f"--features={GENERATOR}", "--features.generator=GREY", "--features.blocks=[0]"],
            "features need colour images, but this UNet takes 1",
        ),
        (["--fit.feature_dtype=float8"], "float16"),
        (["--trainer.max_steps=3"], "trainer.max_steps is not for segmentation: its options fit say how long"),
    ],
)
def test_mistakes_end_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    more = [word.replace("GREY", str(folder / "grey.safetensors")) for word in more]
    assert train(folder, tmp_path / "run", *RGB, *more) == 2
    printed = capsys.readouterr()
    said = printed.err
    assert message in said
    assert "classifiers learn" not in printed.out
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_not_written_over(run: Path, folder: Path) -> None:
    before = (run / "model.safetensors").read_bytes()
    assert train(folder, run, *RGB) == 2
    assert segment(run, folder / "images", run) == 2
    assert evaluate(run, folder, "--output", str(run)) == 2
    assert (run / "model.safetensors").read_bytes() == before


def test_a_single_member_cannot_rank(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, tmp_path / "run", *RGB, "--members", "1") == 0
    assert "1 classifier learns 3 classes from" in capsys.readouterr().out
    assert segment(tmp_path / "run", folder / "images", tmp_path / "out", "--rank") == 2
    assert "agrees with itself" in capsys.readouterr().err


def test_a_mistyped_option_of_the_features_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        f"--features={GENERATOR}",
        f"--features.generator={folder / 'generator.safetensors'}",
        "--features.block=[0]",
    ]
    assert train(folder, tmp_path / "run", *more) == 2
    said = capsys.readouterr().err
    assert "did you mean blocks?" in said
    assert said.count("\n") == 1


def test_a_broken_picture_to_measure_on_is_found_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path, "val", 2)
    whole = (tmp_path / "images/val/1.png").read_bytes()
    (tmp_path / "images/val/1.png").write_bytes(whole[: len(whole) // 2])  # its header says a size
    more = [f"--data.val_images={tmp_path / 'images/val'}", f"--data.val_masks={tmp_path / 'masks/val'}"]
    assert train(folder, tmp_path / "run", *RGB, *more) == 2
    assert "val/1.png" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_of_equally_uncertain_images_the_first_comes_first() -> None:
    scores = [ImageScore(name, value, [1.0]) for name, value in (("a", 0.1), ("b", 0.3), ("c", 0.2), ("d", 0.3))]
    assert [score.name for score in FolderScores(scores, []).ranked()] == ["b", "d", "c", "a"]


def test_a_run_that_is_not_finished_has_no_scores_and_is_gone_on_with(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(run, folder / "images/val", tmp_path / "out", "--rank") == 0

    whole, scores, segmented = PixelSegmenter.segment, (tmp_path / "out/scores.csv").read_text(), []

    def interrupted(self: PixelSegmenter, *image: Any, **options: Any) -> Any:
        segmented.append(image)
        if len(segmented) == 3:
            raise ValueError("no room")
        return whole(self, *image, **options)

    monkeypatch.setattr(PixelSegmenter, "segment", interrupted)
    assert segment(run, folder / "images/val", tmp_path / "out", "--rank", "--overwrite") == 2
    assert not {"scores.csv", "rank.csv", "rank.png"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert segment(run, folder / "images/val", tmp_path / "out", "--rank") == 0
    assert len(segmented) == 3 + 2 + 4  # the two that were left of four, and all for rank.png
    assert (tmp_path / "out/scores.csv").read_text() == scores
    assert segment(run, folder / "images/val", tmp_path / "out", "--tile", "128") == 2
    assert "holds results of other settings (tile)" in capsys.readouterr().err


def convert(output: Path, files: list[Path], *more: str) -> int:
    arguments = ["--checkpoints", *map(str, files), f"--classes=[{', '.join(CLASSES)}]", "--output", str(output)]
    return main(["convert", *arguments, *more])


def test_classifiers_of_the_reference_become_a_segmenter(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    features = DiffusionFeatures(folder / "generator.safetensors", [0, 2], [10])
    files = [write_classifier(tmp_path / f"model_{i}.pth", Classifier(features.channels, 3).eval()) for i in range(2)]
    more = [f"--features={GENERATOR}", f"--features.generator={folder / 'generator.safetensors'}"]
    more += ["--features.timesteps=[10]", "--features.blocks=[0, 2]"]
    assert convert(tmp_path / "segmenter.safetensors", files, *more) == 0
    assert "2 classifiers of 64 features and 3 classes" in capsys.readouterr().out
    image = torch.rand(3, 24, 32)
    found = PixelSegmenter.load(tmp_path / "segmenter.safetensors").segment(image)
    wanted = PixelEnsemble.from_reference(files).segment(features.maps(image))
    torch.testing.assert_close(found.uncertainty, wanted.uncertainty)
    assert torch.equal(found.labels, wanted.labels)
    assert float(found.uncertainty.std()) > 0
    assert convert(tmp_path / "segmenter.safetensors", files, *more) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert convert(tmp_path / "other.safetensors", files, *more, "--features.blocks=[0]") == 2
    assert "the classifier takes 64 features" in capsys.readouterr().err
    assert not (tmp_path / "other.safetensors").exists()
