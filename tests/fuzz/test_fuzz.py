"""Damaged inputs of all kinds: every command ends well or in one sentence, and writes in its output folder alone."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffperception.cli.main import main
from diffperception.segmentation import RGBFeatures
from tests.fuzz import mutations
from tests.parity import filled_state
from tests.training.tiny_data import write_tiny_data

DETECTOR = {
    "class_path": "diffperception.detection.DiffusionDet",
    "init_args": {
        "backbone": "resnet10t",
        "strides": [8, 16],
        "fpn_norm": True,
        "head": {
            "class_path": "DynamicHead",
            "init_args": {"stages": 1, "width": 16, "dynamic_width": 8, "ffn_width": 16, "num_heads": 2},
        },
        "sampler": {"steps": 1},
        "num_boxes": 6,
        "min_size": None,
    },
}
RUN = [
    "--trainer.max_steps",
    "1",
    "--trainer.accelerator",
    "cpu",
    "--trainer.devices",
    "1",
    "--trainer.max_minutes",
    "1",
]


@dataclass(frozen=True)
class Case:
    """A command, and the damage to the files that it reads; both know the folder with the sound files."""

    command: Callable[[Path], list[str]]
    damage: Callable[[Random, Path], None]


def detection(folder: Path) -> list[str]:
    return ["--config", str(folder / "detection.yaml")]


def segmentation(folder: Path) -> list[str]:
    return ["--config", str(folder / "segmentation.yaml")]


def predict(kind: str) -> Callable[[Path], list[str]]:
    return lambda folder: [
        "predict",
        "--model",
        str(folder / f"{kind}.safetensors"),
        "--images",
        str(folder / "pictures"),
        "--workers",
        "0",
    ]


def damage_config(random: Random, path: Path) -> None:
    if random.random() < 0.15:
        path.write_bytes(mutations.damage_bytes(random, path.read_bytes()))
        return
    tree = mutations.damage_tree(random, yaml.safe_load(path.read_text()))
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")


def damage_any(damage: Callable[[Random, Path], None], *folders: str) -> Callable[[Random, Path], None]:
    """Damage one or two of the files in the folders."""

    def damage_some(random: Random, folder: Path) -> None:
        files = [path for name in folders for path in sorted((folder / name).glob("*.png"))]
        for path in random.sample(files, random.randint(1, 2)):
            damage(random, path)

    return damage_some


def in_file(damage: Callable[[Random, Path], None], name: str) -> Callable[[Random, Path], None]:
    return lambda random, folder: damage(random, folder / name)


ANNOTATIONS = in_file(mutations.damage_json, "annotations.json")
CASES = {
    "check annotations": Case(
        lambda f: ["check", "--annotations", str(f / "annotations.json"), "--images", str(f / "images")], ANNOTATIONS
    ),
    "train on annotations": Case(lambda f: ["train", *detection(f), *RUN], ANNOTATIONS),
    "evaluate on annotations": Case(
        lambda f: [
            "evaluate",
            "--model",
            str(f / "detector.safetensors"),
            "--annotations",
            str(f / "annotations.json"),
            "--images",
            str(f / "images"),
            "--workers",
            "0",
        ],
        ANNOTATIONS,
    ),
    "evaluate results": Case(
        lambda f: ["evaluate", "--results", str(f / "results.json"), "--annotations", str(f / "annotations.json")],
        lambda random, f: mutations.damage_json(
            random, f / random.choice(("results.json", "results.json", "annotations.json"))
        ),
    ),
    "train by a configuration": Case(
        lambda f: ["train", *detection(f), *RUN], in_file(damage_config, "detection.yaml")
    ),
    "train a segmenter by a configuration": Case(
        lambda f: ["train", *segmentation(f)], in_file(damage_config, "segmentation.yaml")
    ),
    "train on masks": Case(lambda f: ["train", *segmentation(f)], damage_any(mutations.damage_mask, "masks")),
    "train on pictures": Case(lambda f: ["train", *detection(f), *RUN], damage_any(mutations.damage_picture, "images")),
    "check masks": Case(
        lambda f: [
            "check",
            "--task",
            "segmentation",
            "--images",
            str(f / "pictures"),
            "--masks",
            str(f / "masks"),
            "--classes",
            "ground",
            "thing",
        ],
        damage_any(mutations.damage_mask, "masks", "pictures"),
    ),
    "detect in pictures": Case(predict("detector"), damage_any(mutations.damage_picture, "pictures")),
    "segment pictures": Case(predict("segmenter"), damage_any(mutations.damage_picture, "pictures")),
    "detect with a model": Case(predict("detector"), in_file(mutations.damage_model, "detector.safetensors")),
    "segment with a model": Case(predict("segmenter"), in_file(mutations.damage_model, "segmenter.safetensors")),
    "convert": Case(
        lambda f: ["convert", "--checkpoint", str(f / "adm.pt"), "--num_head_channels", "16", "--image_size", "16"],
        in_file(mutations.damage_checkpoint, "adm.pt"),
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sound files of every kind, and models that were trained on them."""
    folder = tmp_path_factory.mktemp("sound")
    annotations, images = write_tiny_data(folder, images=4)
    rows = json.loads(annotations.read_text())["annotations"]
    results = [{key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5} for row in rows]
    (folder / "results.json").write_text(json.dumps(results))
    for name in ("pictures", "masks"):
        (folder / name).mkdir()
    for number in range(3):
        picture, mask = Image.new("RGB", (24, 20), (30, 60, 90)), Image.new("L", (24, 20))
        box = (4 + number, 5, 14, 15)
        picture.paste((250, 200, 40), box)
        mask.paste(1, box)
        picture.save(folder / "pictures" / f"{number}.png")
        mask.save(folder / "masks" / f"{number}.png")
    write_configurations(folder, annotations, images)
    for kind in ("detection", "segmentation"):
        trained = folder / "trained"
        assert main(["train", "--config", str(folder / f"{kind}.yaml"), "--output", str(trained)]) == 0
        name = {"detection": "detector", "segmentation": "segmenter"}[kind]
        shutil.move(trained / "model.safetensors", folder / f"{name}.safetensors")
        shutil.rmtree(trained)
    torch.save(filled_state("adm_small"), folder / "adm.pt")
    return folder


def write_configurations(folder: Path, annotations: Path, images: Path) -> None:
    """Trainings of a step, on files that are named by where they are below the folder of the case."""
    files = {
        "train_annotations": annotations,
        "train_images": images,
        "val_annotations": annotations,
        "val_images": images,
    }
    config = {
        "task": "detection",
        "model": DETECTOR,
        "data": {
            **{key: str(path) for key, path in files.items()},
            "transforms": {
                "class_path": "diffperception.data.transforms.TrainingTransforms",
                "init_args": {"crop": 0.0, "short_sides": []},
            },
            "batch_size": 2,
            "workers": 0,
        },
        "optimizer": {"lr": 0.001, "base_batch_size": 2, "warmup_steps": 1},
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
        "evaluation": {"every": None, "num_pictures": 0, "batch_size": 2},
    }
    (folder / "detection.yaml").write_text(yaml.safe_dump(config))
    config = {
        "task": "segmentation",
        "features": {"class_path": f"{RGBFeatures.__module__}.RGBFeatures"},
        "data": {"images": str(folder / "pictures"), "masks": str(folder / "masks"), "classes": ["ground", "thing"]},
        "members": 2,
        "fit": {"max_minibatches": 20},
        "num_pictures": 1,
    }
    (folder / "segmentation.yaml").write_text(yaml.safe_dump(config))


@contextlib.contextmanager
def copied(sound: Path) -> Iterator[Path]:
    """A copy of the sound files, whose configurations name it; everything is removed at the end."""
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room, "files")
        shutil.copytree(sound, folder)
        for config in folder.glob("*.yaml"):
            config.write_text(config.read_text().replace(str(sound), str(folder)))
        yield folder


def content(folder: Path) -> dict[str, str]:
    """What lies in a folder: of every file its path and a digest, of every folder its path."""
    paths = sorted(folder.rglob("*"))
    return {str(p): hashlib.sha1(p.read_bytes()).hexdigest() if p.is_file() else "" for p in paths}


def run(arguments: list[str], place: Path) -> tuple[int, str]:
    """The exit code of a command that is given in a folder, and what it said on stderr."""
    said, before = io.StringIO(), Path.cwd()
    os.chdir(place)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(arguments)
    finally:
        os.chdir(before)
    return code, said.getvalue()


def check(name: str, sound: Path, random: Random) -> None:
    """One case: sound files, damaged at random; the command; what it must have kept to."""
    with copied(sound) as folder:
        CASES[name].damage(random, folder)
        before = content(folder)
        place, output = folder.parent / "elsewhere", folder.parent / "output"
        place.mkdir()
        command = CASES[name].command(folder)
        where = {"check": [], "convert": ["--output", str(output / "x.safetensors")]}
        code, said = run([*command, *where.get(command[0], ["--output", str(output)])], place)
        require_sentence(command[0], code, said)
        assert content(folder) == before, "a file outside of the output has changed"
        assert not list(place.iterdir()), "something was written into the working folder"
        assert set(folder.parent.iterdir()) <= {folder, place, output}
        assert not [path for path in output.rglob("*") if ".part" in path.name], "half a file is left"
        for path in output.rglob("*.json"):
            json.loads(path.read_text(encoding="utf-8"))


def require_sentence(command: str, code: int, said: str) -> None:
    """The command has ended well, or in one sentence, its last; `check` with the exit code 1 where it found errors."""
    assert "Traceback" not in said, said
    assert code in ((0, 1, 2) if command == "check" else (0, 2)), said
    if code == 2:
        sentences = [line for line in said.splitlines() if line.startswith(f"diffperception {command}: ")]
        assert len(sentences) == 1, said
        assert said.rstrip().endswith(sentences[0].rstrip()), f"more was said after it: {said}"
        assert "unexpected error" not in sentences[0], sentences[0]
        assert len(sentences[0]) < 1500, sentences[0]  # texts of users stand in some of them


def run_cases(name: str, sound: Path, number: int, derandomize: bool) -> None:
    """So many cases. A failure names the seed of its case; there is nothing to shrink in a seed."""
    quietly = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    rules = settings(max_examples=number, derandomize=derandomize, phases=[Phase.generate], **quietly)
    rules(given(st.randoms(use_true_random=True))(lambda random: check(name, sound, random)))()


@pytest.mark.parametrize("name", CASES)
def test_a_hundred_cases(name: str, sound: Path) -> None:
    run_cases(name, sound, -(-100 // len(CASES)), derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_thousand_cases(name: str, sound: Path) -> None:
    run_cases(name, sound, -(-2000 // len(CASES)), derandomize=False)
