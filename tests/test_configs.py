"""Every shipped configuration is one that the runner accepts, and its model can be built."""

from pathlib import Path

import pytest

from diffperception.cli.main import find
from diffperception.cli.parsing import build_parser, parse
from diffperception.detection import Detector

CONFIGS = Path(__file__).parents[1] / "configs"
COMMANDS = {"detection": "train"}  # which command the configurations of a folder are for


def files_of(path: Path) -> list[Path]:
    """The files to give for a configuration: a_b.yaml states its differences from a.yaml, where there is one."""
    base = path.with_name(path.stem.partition("_")[0] + ".yaml")
    return [base, path] if base != path and base.exists() else [path]


def shipped() -> list[Path]:
    return sorted(CONFIGS.rglob("*.yaml"))


def test_there_are_configurations() -> None:
    assert shipped()


@pytest.mark.parametrize("path", shipped(), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_configuration_is_accepted_and_its_model_built(path: Path) -> None:
    command = find(COMMANDS[path.relative_to(CONFIGS).parts[0]])
    parser = build_parser(command)
    options = parse(parser, command, [part for file in files_of(path) for part in ("--config", str(file))])
    options.model.init_args.pretrained = False  # weights of the backbone would come from the network
    model = parser.instantiate(options).model(["one", "two", "three"])
    assert isinstance(model, Detector)
    assert model.classes == ["one", "two", "three"]
