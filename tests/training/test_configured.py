"""Training from Python: a configuration and changes, or a recipe; and the options of Lightning's trainer."""

from argparse import ArgumentError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffperception.cli.main import main
from diffperception.detection import Detector
from diffperception.training import train
from diffperception.training.configured import find_recipe
from diffperception.training.options import OptimizerOptions, RunOptions, TrainerOptions
from diffperception.training.recipes.detection import DataOptions, DetectionRecipe, EvaluationOptions
from diffperception.training.run import run
from tests.helpers.runs import fixtures_of
from tests.training.tiny_data import write_tiny_config
from tests.training.tiny_detector import TinyDetector


class OwnRecipe(DetectionRecipe):
    """A user's own."""

    task = "tests.training.test_configured.OwnRecipe"


config, _ = fixtures_of(write_tiny_config)


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run."""
    folder = tmp_path_factory.mktemp("whole")
    train(config, output=folder)
    return load_file(folder / "model.safetensors")


def same(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_one_call_trains_from_a_configuration_and_writes_nothing_unasked(
    config: Path, whole: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = train(config)
    assert isinstance(outcome.model, TinyDetector)
    assert not outcome.model.training
    assert same(outcome.model, whole)
    assert outcome.step == 9
    assert outcome.metrics.keys() >= {"AP", "AP50"}
    assert not list(tmp_path.iterdir())


def test_changes_may_be_dotted_or_nested_and_files_several(config: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("trainer: {max_steps: 3}\n")
    outcome = train(
        [config, tmp_path / "more.yaml"],
        optimizer={"lr": 0.5, "ema_decay": None},
        output=str(tmp_path / "run"),
        **{"data.batch_size": 3, "model.width": 3},
    )
    assert outcome.step == 3
    assert outcome.model.arguments["width"] == 3
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["optimizer"]["lr"] == 0.5
    assert saved["optimizer"]["ema_decay"] is None
    assert saved["optimizer"]["warmup_steps"] == 3
    assert saved["data"]["batch_size"] == 3
    assert "base" not in saved
    with pytest.raises(ArgumentError, match=r"did you mean data\.batch_size"):
        train(config, **{"data.batch_sise": 1})


def test_a_recipe_is_run_without_any_configuration(config: Path) -> None:
    data = yaml.safe_load(config.read_text())["data"]
    paths = {name: Path(data[name]) for name in ("train_annotations", "train_images", "val_annotations", "val_images")}

    def flipped(image: torch.Tensor, target: dict) -> tuple[torch.Tensor, dict]:
        return image.flip(-1), target

    def model(classes: list[str]) -> Detector:
        return TinyDetector(classes, 4)

    recipe = DetectionRecipe(
        model,
        DataOptions(**paths, transforms=flipped, batch_size=2, workers=0),
        OptimizerOptions(ema_decay=None),
        EvaluationOptions(every=None),
    )
    outcome = run(recipe, RunOptions(trainer=TrainerOptions(max_steps=2, accelerator="cpu")))
    assert outcome.step == 2
    assert outcome.signal is None


def test_a_users_own_recipe_is_named_by_its_import_path(config: Path) -> None:
    assert find_recipe(OwnRecipe.task) is OwnRecipe
    assert train(config, task=OwnRecipe.task, **{"trainer.max_steps": 1}).step == 1


@pytest.mark.parametrize("name", ["detectoin", "diffperception.detection.Detector", "nowhere.Absent"])
def test_an_unknown_task_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="there is no task"):
        find_recipe(name)


@pytest.mark.parametrize("task", [{"a": 5}, ["a"]])
def test_a_task_is_a_text(tmp_path: Path, task: object) -> None:
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({"task": task}))
    with pytest.raises(ValueError, match="option task: expected a text"):
        train(tmp_path / "wrong.yaml")


@pytest.mark.parametrize("name", ["deterministic", "benchmark"])
def test_options_of_the_trainer_leave_the_numbers_as_they_are(
    config: Path, whole: dict[str, torch.Tensor], name: str
) -> None:
    try:
        assert same(train(config, **{f"trainer.{name}": True}).model, whole)
    finally:
        torch.use_deterministic_algorithms(False)


def test_numbers_go_where_the_options_say(config: Path, tmp_path: Path) -> None:
    train(config, output=tmp_path / "run", **{"trainer.logger": "tensorboard", "trainer.max_steps": 1})
    assert not (tmp_path / "run" / "metrics.csv").exists()
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    with pytest.raises(ArgumentError, match=r"trainer\.logger"):
        train(config, **{"trainer.logger": ["cvs"]})


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
@pytest.mark.parametrize("names", ["wandb", ["csv", "wandb"]])
def test_weights_and_biases_must_be_installed(config: Path, tmp_path: Path, names: str | list[str]) -> None:
    with pytest.raises(ValueError, match="pip install wandb"):
        train(config, output=tmp_path / "run", **{"trainer.logger": names})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2"])
def test_strategies_that_spread_the_weights_are_refused(config: Path, strategy: str) -> None:
    with pytest.raises(ValueError, match="take ddp"):
        train(config, **{"trainer.strategy": strategy})


def test_sixteen_bits_are_an_option(config: Path) -> None:
    with pytest.raises(ArgumentError, match="32-true, bf16-mixed, 16-mixed"):
        train(config, **{"trainer.precision": "8"})


def test_a_run_needs_an_output_on_the_command_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config)]) == 2
    assert "give --output" in capsys.readouterr().err
