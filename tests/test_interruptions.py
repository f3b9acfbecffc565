"""Commands that are killed at any moment, or find the disk full: files are old or new and whole, and going on works."""

import csv
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffperception.detection import DiffusionDet
from diffperception.detection.heads.boxes import DynamicHead
from diffperception.models import DiffusionModel
from diffperception.segmentation import PixelEnsemble, PixelSegmenter, RGBFeatures
from tests.helpers.killing import Starter
from tests.helpers.networks import tiny_unet
from tests.helpers.runs import assert_same_run
from tests.helpers.scenes import write_scenes
from tests.training.tiny_data import write_tiny_config

COMMANDS = ["train", "predict", "segment", "sample", "extract", "autolabel"]


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    with Starter() as started:
        yield started


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    head = partial(DynamicHead, stages=1, width=16, pool_size=3, dynamic_width=8, ffn_width=16, num_heads=2)
    DiffusionDet(["a", "b"], "resnet18", head, num_boxes=12, min_size=32, max_size=64).save(folder / "detector")
    PixelSegmenter(RGBFeatures(), PixelEnsemble(3, 3, 2), ["a", "b", "c"]).save(folder / "segmenter")
    DiffusionModel(None, tiny_unet(), image_size=16).save(folder / "generator")
    write_scenes(folder / "scenes", range(12))
    write_tiny_config(folder / "tiny")
    return folder


def arguments(command: str, inputs: Path, output: Path) -> list[str]:
    images = ["--images", str(inputs / "scenes/images"), "--workers", "0", "--device", "cpu"]
    drawn = ["--num_samples", "12", "--batch_size", "2", "--sampling.steps", "3"]
    options = {
        "train": ["train", "--config", str(inputs / "tiny/config.yaml")],
        "predict": ["predict", "--model", str(inputs / "detector"), *images, "--num_trajectories", "1"],
        "segment": ["predict", "--model", str(inputs / "segmenter"), *images, "--rank", "true"],
        "sample": ["sample", "--model", str(inputs / "generator"), "--device", "cpu", *drawn],
        "extract": ["extract", "--features", "RGBFeatures", *images],
        "autolabel": ["autolabel", "--model", str(inputs / "segmenter"), *images, "--drop", "0.2"],
    }[command]
    return [*options, "--output", str(output)]


def again(command: str) -> list[str]:
    return ["--resume", "true"] if command == "train" else []


def content_below(folder: Path) -> dict[str, bytes]:
    """The files of a folder but for hidden ones, and those that name the time."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith("tensorboard/")}


def assert_whole(folder: Path) -> None:
    """Every file that has its name is of its kind, to the end."""
    for path in folder.rglob("[!.]*.*"):
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".csv":
            with open(path, newline="") as file:
                assert len({len(row) for row in csv.reader(file)}) == 1
        elif path.suffix == ".ckpt":
            torch.load(path, weights_only=True)


def assert_same_output(command: str, one: Path, other: Path) -> None:
    if command == "train":
        assert_same_run(one, other)
        assert content_below(one).keys() == content_below(other).keys()
    else:
        assert content_below(one) == content_below(other)
    assert not list(other.rglob(".diffperception-part*"))


SLOW = [pytest.param(command, 10, marks=pytest.mark.slow) for command in COMMANDS]


# The fast one of train is tests/training/test_resume.py.
@pytest.mark.parametrize(("command", "moments"), [*((command, 1) for command in COMMANDS[1:]), *SLOW])
def test_killed_at_any_moment(command: str, moments: int, starter: Starter, inputs: Path, tmp_path: Path) -> None:
    before = content_below(inputs)
    seconds = starter.run(arguments(command, inputs, tmp_path / "whole")).seconds
    times, killed = random.Random(f"{command} {moments}"), 0
    for number in range(moments):
        output = tmp_path / str(number)
        killed += starter.run(arguments(command, inputs, output), times.uniform(0.05, 0.9) * seconds).code == -9
        assert_whole(output)
        ending = starter.run([*arguments(command, inputs, output), *again(command)])
        assert ending.code == 0, ending.said
        assert_same_output(command, tmp_path / "whole", output)
        assert content_below(inputs) == before
    assert {path.name for path in tmp_path.iterdir()} == {"whole", *map(str, range(moments))}
    print(f"{command}: {killed} of {moments} killed before the end, which came after {seconds:.1f} s")


@pytest.mark.parametrize("command", [pytest.param("train", marks=pytest.mark.slow), *COMMANDS[1:]])
def test_a_full_disk(command: str, starter: Starter, inputs: Path, tmp_path: Path) -> None:
    """Half files are gone, old ones are as they were, a sentence says it, and with more room the command goes on."""
    whole, output = tmp_path / "whole", tmp_path / "full"
    assert starter.run(arguments(command, inputs, whole)).code == 0
    largest = max(len(content) for content in content_below(whole).values())
    ending = starter.run(arguments(command, inputs, output), file_bytes=largest // 2)
    said = [line for line in ending.said.splitlines() if line.startswith("diffperception")]
    assert (ending.code, len(said)) == (2, 1), ending.said
    assert "File too large" in said[0]
    assert not list(output.rglob(".diffperception-part*"))
    assert_whole(output)
    ending = starter.run([*arguments(command, inputs, output), *again(command)])
    assert ending.code == 0, ending.said
    assert_same_output(command, whole, output)
