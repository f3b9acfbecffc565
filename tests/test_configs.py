"""Every shipped configuration is one that the runner accepts, and its model can be built."""

import json
import math
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from diffperception.cli.main import find
from diffperception.cli.parsing import build_parser, chosen_task, parse
from diffperception.data.shapes import CLASSES
from diffperception.detection import Detector
from diffperception.generation import DiffusionModel
from diffperception.models import NoisyClassifier
from diffperception.segmentation import DiffusionFeatures

CONFIGS = Path(__file__).parents[1] / "configs"


def files_of(path: Path) -> list[Path]:
    """The files to give for a configuration: a_b_c.yaml states its differences from a.yaml, then a_b.yaml, if any."""
    stems = accumulate(path.stem.split("_"), "{}_{}".format)
    return [file for stem in stems if (file := path.with_name(f"{stem}.yaml")).exists()]


def shipped() -> list[Path]:
    return sorted(CONFIGS.rglob("*.yaml"))


def test_there_are_configurations() -> None:
    assert {path.parent.name for path in shipped()} == {
        "detection",
        "generation",
        "segmentation",
    }  # each is tested below


def parsed(path: Path) -> tuple[ArgumentParser, Namespace]:
    compares = path.stem.endswith("_compare")  # of another command, and given alone
    arguments = [part for file in ([path] if compares else files_of(path)) for part in ("--config", str(file))]
    command = find("compare") if compares else find("train", chosen_task(arguments))
    parser = build_parser(command)
    return parser, parse(parser, command, arguments)


def classes_of(path: Path) -> list[str] | None:
    """Of the folder of images that a generator's configuration is for: the shapes, if it takes their labels."""
    labelled = [yaml.safe_load(file.read_text())["data"].get("labelled") for file in files_of(path)]
    return list(CLASSES) if "classifier" in path.name or [x for x in labelled if x is not None][-1:] == [True] else None


def write_generator(run: Path, file: Path) -> None:
    """Write what the shipped configuration whose output is `run` would train, untrained."""
    recipes = [path for path in shipped() if yaml.safe_load(path.read_text()).get("output") == str(run)]
    assert len(recipes) == 1, f"one configuration writes {run}"
    parser, options = parsed(recipes[0])
    model = parser.instantiate(options).model(classes_of(recipes[0]))
    assert isinstance(model, DiffusionModel)
    model.save(file)


@pytest.mark.parametrize("path", sorted((CONFIGS / "detection").glob("*.yaml")), ids=lambda path: path.name)
def test_a_detectors_configuration_is_accepted_and_it_is_built(path: Path, tmp_path: Path) -> None:
    parser, options = parsed(path)
    options.model.init_args.pretrained = False  # weights of the backbone would come from the network
    backbone = options.model.init_args.backbone
    if isinstance(backbone, Namespace):
        write_generator(Path(backbone.init_args.unet).parent, tmp_path / "model.safetensors")
        backbone.init_args.unet = str(tmp_path / "model.safetensors")
    model = parser.instantiate(options).model(["one", "two", "three"])
    assert isinstance(model, Detector)
    assert model.classes == ["one", "two", "three"]


@pytest.mark.parametrize("path", sorted((CONFIGS / "generation").glob("*.yaml")), ids=lambda path: path.name)
def test_a_generators_configuration_is_accepted_and_it_is_built(path: Path) -> None:
    parser, options = parsed(path)
    classes = classes_of(path)
    with torch.device("meta"):
        model = parser.instantiate(options).model(classes)
    assert isinstance(model, DiffusionModel | NoisyClassifier)
    assert model.classes == classes


def test_the_recipe_for_lsun_is_the_published_model() -> None:
    parser, options = parsed(CONFIGS / "generation" / "adm_lsun256.yaml")
    with torch.device("meta"):
        unet = parser.instantiate(options).model(None).unet
    published = json.loads((Path(__file__).parent / "parity" / "adm_lsun256_keys.json").read_text())
    assert sum(parameter.numel() for parameter in unet.parameters()) == sum(math.prod(s) for s in published.values())


SEGMENTERS = [path for path in shipped() if path.parent.name == "segmentation" and "compare" not in path.stem]


@pytest.mark.parametrize("path", SEGMENTERS, ids=lambda path: path.name)  # of compare see tests/cli/test_compare.py
def test_a_segmenters_configuration_is_accepted_and_its_features_are_built(path: Path, tmp_path: Path) -> None:
    parser, options = parsed(path)
    write_generator(Path(options.features.init_args.file).parent, tmp_path / "model.safetensors")
    options.features.init_args.file = str(tmp_path / "model.safetensors")
    built = parser.instantiate(options)
    assert isinstance(built.features, DiffusionFeatures)
    assert built.features.channels == len(built.features.timesteps) * sum(
        built.features.unet.block_info[block].channels for block in built.features.blocks
    )
    assert built.fit.max_minibatches is not None
    if "shapes" in path.name:
        assert built.data.classes == ["background", "shape"]
        assert built.data.mask_values == {0: 0} | dict.fromkeys(range(1, len(CLASSES) + 1), 1)
