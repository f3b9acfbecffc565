"""Every shipped configuration is one that the runner accepts, and its model can be built."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from diffperception.configuration.inheritance import given, spread_files
from diffperception.configuration.parser import Options
from diffperception.data.shapes import CLASSES
from diffperception.detection import Detector, SetWeights
from diffperception.generation import DiffusionModel
from diffperception.models import NoisyClassifier
from diffperception.segmentation import DiffusionFeatures
from diffperception.training import compare_label_efficiency
from diffperception.training.configured import options_for

CONFIGS = Path(__file__).parents[1] / "configs"
NEIGHBOURS = {"detectron2", "mmseg"}  # folders of files that their programs read: see tests/integrations


def shipped() -> list[Path]:
    return sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in NEIGHBOURS)


def test_there_are_configurations() -> None:
    assert {path.parent.name for path in shipped()} == {"detection", "generation", "segmentation"}  # each tested below


def parsed(path: Path) -> tuple[Options, Namespace]:
    options = (
        Options("compare", compare_label_efficiency) if path.stem.endswith("_compare") else options_for([str(path)])
    )
    return options, options.parse([str(path)])


def built(options: Options, values: Namespace) -> dict[str, Any]:
    """The arguments of the recipe, or command."""
    return options.instantiate(values)[0]


def classes_of(path: Path) -> list[str] | None:
    """Of the folder of images that a generator's configuration is for: the shapes, if it takes their labels."""
    return list(CLASSES) if "classifier" in path.name or parsed(path)[1].data.labelled else None


def write_generator(run: Path, file: Path) -> None:
    """Write what the shipped configuration whose output is `run` would train, untrained."""
    recipes = [path for path in shipped() if given(spread_files([str(path)]), "output") == str(run)]
    assert len(recipes) == 1, f"one configuration writes {run}"
    model = built(*parsed(recipes[0]))["model"](classes_of(recipes[0]))
    assert isinstance(model, DiffusionModel)
    model.save(file)


@pytest.mark.parametrize("path", sorted((CONFIGS / "detection").glob("*.yaml")), ids=lambda path: path.name)
def test_a_detectors_configuration_is_accepted_and_it_is_built(path: Path, tmp_path: Path) -> None:
    options, values = parsed(path)
    values.model.init_args.pretrained = False  # weights of the backbone would come from the network
    backbone = values.model.init_args.backbone
    if isinstance(backbone, Namespace):
        write_generator(Path(backbone.init_args.unet).parent, tmp_path / "model.safetensors")
        backbone.init_args.unet = str(tmp_path / "model.safetensors")
    model = built(options, values)["model"](["one", "two", "three"])
    assert isinstance(model, Detector)
    assert model.classes == ["one", "two", "three"]


def test_a_function_that_is_left_out_is_nothing_in_config_yaml() -> None:
    """Such as a detector's auxiliary head: jsonargparse would write a text there, which is then read as its name."""
    options = options_for(files := [str(CONFIGS / "detection" / "shapes.yaml")])
    with warnings.catch_warnings(record=True) as said:
        settings = options.settings(options.parse(files))
    assert settings["model"]["init_args"]["auxiliary"] is None
    assert not said


def test_the_parts_of_a_detector_are_options() -> None:
    files = [str(CONFIGS / "detection" / "shapes.yaml")]
    parts = ["--model.init_args.head.init_args.stages", "2", "--model.sampler.eta", "0.5"]
    parts += ["--model.init_args.criterion.init_args.matcher", "hungarian", "--model.criterion.weights.l1", "7"]
    options = options_for(files)
    model = built(options, options.parse([*files, *parts]))["model"](["one", "two"])
    assert (len(model.head.stages), model.head.width, model.backbone.width) == (2, 64, 64)
    assert (model.sampler.steps, model.sampler.eta, model.criterion.matcher) == (4, 0.5, "hungarian")
    assert model.arguments["criterion"].arguments["weights"] == SetWeights(classification=12, l1=7)


@pytest.mark.parametrize("path", sorted((CONFIGS / "generation").glob("*.yaml")), ids=lambda path: path.name)
def test_a_generators_configuration_is_accepted_and_it_is_built(path: Path) -> None:
    options, values = parsed(path)
    classes = classes_of(path)
    with torch.device("meta"):
        model = built(options, values)["model"](classes)
    assert isinstance(model, DiffusionModel | NoisyClassifier)
    assert model.classes == classes


def test_the_recipe_for_lsun_is_the_published_model() -> None:
    options, values = parsed(CONFIGS / "generation" / "adm_lsun256.yaml")
    with torch.device("meta"):
        unet = built(options, values)["model"](None).network
    published = json.loads((Path(__file__).parent / "parity" / "adm_lsun256_keys.json").read_text())
    assert sum(parameter.numel() for parameter in unet.parameters()) == sum(math.prod(s) for s in published.values())


SEGMENTERS = [path for path in shipped() if path.parent.name == "segmentation" and "compare" not in path.stem]


@pytest.mark.parametrize("path", SEGMENTERS, ids=lambda path: path.name)  # of compare see tests/cli/test_compare.py
def test_a_segmenters_configuration_is_accepted_and_its_features_are_built(path: Path, tmp_path: Path) -> None:
    options, values = parsed(path)
    write_generator(Path(values.features.init_args.generator).parent, tmp_path / "model.safetensors")
    values.features.init_args.generator = str(tmp_path / "model.safetensors")
    arguments = built(options, values)
    features, data = arguments["features"], arguments["data"]
    assert isinstance(features, DiffusionFeatures)
    asked = values.features.init_args
    assert len(features.info) == len(asked.timesteps) * len(asked.blocks)
    assert arguments["fit"].max_minibatches is not None
    if "shapes" in path.name:
        assert data.classes == ["background", "shape"]
        assert data.mask_values == {0: 0} | dict.fromkeys(range(1, len(CLASSES) + 1), 1)
