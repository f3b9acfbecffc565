"""The command runner: options from a signature, files that state differences, mistakes that end in one sentence."""

import subprocess
import sys
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from diffperception.cli.main import COMMANDS, find_kind, functions, main
from diffperception.configuration.messages import sentence
from diffperception.configuration.parser import Options, call
from diffperception.models import Pixels
from diffperception.training.configured import RECIPES, options_for
from tests.training.tiny_detector import TinyDetector


class Engine:
    """Pulls."""


class Whistle:
    def __init__(self, pitch: int = 440, tune: str | None = "high", notes: int | None = 2):
        """Sounds.

        Args:
            pitch: in hertz.
            tune: what is played.
            notes: how many.
        """
        self.sound = (pitch, tune, notes)


class Steam(Engine):
    def __init__(self, wagons: list[str], pressure: int = 3, fuel: str = "coal", whistle: str | Whistle | None = None):
        """Pulls with steam.

        Args:
            wagons: what is pulled.
            pressure: in bar.
            fuel: what is burnt.
            whistle: to warn with.
        """
        self.said = f"{'+'.join(wagons)} with {pressure} bar of {fuel}"
        self.whistle = whistle


@dataclass
class Track:
    """Where it goes.

    Args:
        length: in km.
        gauge: of the rails.
    """

    length: float = 1.5
    gauge: Literal["narrow", "broad"] = "narrow"


received: dict = {}


def journey(
    engine: Callable[[list[str]], Engine],
    track: Track = Track(),  # noqa: B008
    count: int = 1,
    whistle: bool = False,
) -> int:
    """Go somewhere.

    And come back.

    Args:
        engine: what pulls.
        track: where it goes.
        count: how often.
        whistle: whether to whistle.
    """
    received.update(engine=engine, track=track, count=count, whistle=whistle)
    return count


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    file = tmp_path / "base.yaml"
    file.write_text("engine: {class_path: tests.cli.test_main.Steam, init_args: {pressure: 5}}\ntrack: {length: 7}\n")
    return ["--config", str(file)]


def test_files_and_options_state_only_differences_and_the_later_wins(base: list[str], tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("track: {gauge: broad}\nengine: {init_args: {fuel: wood}}\ncount: 4\n")
    assert call(journey, [*base, "--config", str(second), "--count", "6", "--engine.pressure", "8"]) == 6
    assert received["track"] == Track(7, "broad")
    assert received["engine"](["coal", "mail"]).said == "coal+mail with 8 bar of wood"


def test_the_settings_are_a_configuration_again(base: list[str], tmp_path: Path) -> None:
    options = Options("journey", journey)
    settings = options.settings(options.parse([*base, "--whistle", "--count", "3"]))
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(settings))
    again = options.parse(["--config", str(tmp_path / "again.yaml")])
    assert options.settings(again) == settings
    (values,) = options.instantiate(again)
    assert (values["track"], values["count"], values["whistle"]) == (Track(7), 3, True)


@pytest.mark.parametrize(("given", "meant"), [([], False), (["--whistle"], True), (["--whistle", "false"], False)])
def test_a_switch_needs_no_value(base: list[str], given: list[str], meant: bool) -> None:
    call(journey, [*base, *given, "--count", "2"])
    assert received["whistle"] is meant
    assert received["count"] == 2


def depart(late: bool | None = None) -> None:
    """Leave.

    Args:
        late: whether behind time; null where nobody knows.
    """
    received.update(late=late)


@pytest.mark.parametrize(("given", "meant"), [([], None), (["--late"], True), (["--late", "null"], None)])
def test_a_switch_that_may_be_null_needs_no_value(given: list[str], meant: bool | None) -> None:
    call(depart, given)
    assert received["late"] is meant


WHISTLE = ["--engine.whistle", "tests.cli.test_main.Whistle"]


@pytest.mark.parametrize(
    ("option", "sound"),
    [("tune", (440, None, 2)), ("notes", (440, "high", None)), ("init_args.notes", (440, "high", None))],
)
@pytest.mark.parametrize("equals", [True, False])
def test_null_unsets_an_option_of_a_model_in_a_model(base: list[str], option: str, sound: tuple, equals: bool) -> None:
    name = f"--engine.whistle.{option}"
    call(journey, [*base, *WHISTLE, *([f"{name}=null"] if equals else [name, "null"])])
    assert received["engine"]([]).whistle.sound == sound


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--track.lenght", "3"], ["track.lenght", "did you mean track.length?"]),
        (["--engine.presure", "3"], ["engine", "presure", "did you mean pressure?"]),
        (["--engine.pressure", "null"], ["engine.pressure", "expected a whole number", "null"]),
        ([*WHISTLE, "--engine.whistle.pitch", "null"], ["engine.whistle.pitch: ", "expected a whole number, got null"]),
        ([*WHISTLE, "--engine.whistle.pitch", "low"], ["engine.whistle.pitch: ", "expected a whole number, got low"]),
        (["--engine.pressure", "high"], ["engine.pressure", "expected a whole number", "high"]),
        (["--track.gauge", "wide"], ["track.gauge", "narrow", "broad", "wide"]),
        (["--count", "few"], ["option count", "expected a whole number", "few"]),
        (["--engine", "tests.cli.test_main.Steem"], ["engine", "Steem"]),
        (["--engine", "Steem"], ["option engine: Steem is none of the classes that fit; did you mean Steam?"]),
        (
            ["--engine", "Motor"],
            ["option engine: Motor is none of", "give Engine, Steam or the import path of another"],
        ),
        (["--engine", "null"], ["option engine: expected a class, got null"]),
        (["--track", "3"], ["option track: expected a group of options, got 3"]),
        (["--engine", "nowhere.Steam"], ["engine", "nowhere"]),
        (["--engine", "pathlib.Path"], ["engine", "pathlib.Path", "Engine"]),
        (["--track=5"], ["track"]),
        (["stray"], ["stray"]),
        (["--config", "absent.yaml"], ["absent.yaml"]),
        (["--count"], ["--count", "one argument"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(base: list[str], arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(ArgumentError) as caught:
        call(journey, [*base, *arguments])
    text = sentence(caught.value)
    assert "\n" not in text
    assert "Namespace" not in text
    assert all(part in text for part in parts), text


def test_the_nearest_class_is_named_inside_a_class_too() -> None:
    with pytest.raises(ArgumentError, match=r"option model\.network: Unet is none .* did you mean UNet\?"):
        options_for(["--task=generation"]).parse(["--model", "DiffusionModel", "--model.network", "Unet"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trak: {length: 3}", ["trak", "did you mean track"]),
        ("track: {lenght: 3}", ["track", "lenght", "did you mean length?"]),
        ("track: 5", ["track", "group of options"]),
        ("engine: {init_args: {presure: 3}}", ["presure", "did you mean pressure?"]),
        ("count: null", ["option count: expected a whole number, got null"]),
        ("engine: {init_args: {pressure: null}}", ["option engine.pressure: ", "expected a whole number, got null"]),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence_too(base: list[str], tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ArgumentError) as caught:
        call(journey, [*base, "--config", str(tmp_path / "wrong.yaml")])
    said = sentence(caught.value)
    assert "\n" not in said
    assert all(part in said for part in parts), said


def test_a_missing_option_is_named() -> None:
    with pytest.raises(ArgumentError, match="engine"):
        call(journey, [])


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(journey, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Go somewhere. And come back." in text
    for part in ("what pulls", "where it goes", "in km", "of the rails", "how often", "whether to whistle", "--config"):
        assert part in text


def test_errors_of_workers_and_of_the_system_become_sentences() -> None:
    lines = [
        "Caught BrokenImageError in DataLoader worker process 0.",
        "Original Traceback:",
        "  File x",
        "Broken: a: b",
    ]
    assert sentence(ValueError("\n".join(lines))) == "a: b"
    with pytest.raises(FileNotFoundError) as caught:
        Path("/nowhere/at/all").read_text()
    assert sentence(caught.value) == "/nowhere/at/all: No such file or directory"


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


def test_a_command_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evalate"]) == 2
    assert "did you mean evaluate?" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_explained(name: str) -> None:
    if name == "train":
        options = [options_for(["--task", task]) for task in RECIPES]
    else:
        options = [Options(name, command) for command in functions(name).values()]
    for each in options:
        undocumented = [action.dest for action in each.parser._actions if not action.help and action.dest != "help"]
        assert not undocumented


def test_only_training_imports_lightning_and_help_imports_no_torch() -> None:
    program = """
import sys
from diffperception.cli.main import functions, main
main(["--help"])
assert "torch" not in sys.modules
for name in ("evaluate", "predict", "check", "shapes"):
    functions(name)
assert "lightning" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=300)


def test_a_file_may_come_first_and_names_what_it_builds_on(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "second.yaml").write_text("base: base.yaml\ntrack: {gauge: broad}\n")
    assert call(journey, [str(tmp_path / "second.yaml"), "--count", "6"]) == 6
    assert received["track"] == Track(7, "broad")
    options = Options("journey", journey)
    assert "base" not in options.settings(options.parse([str(tmp_path / "second.yaml")]))


def by_detector(model: Path) -> int:
    return 11


def by_results(results: Path, count: int = 12) -> int:
    return count


BY_KIND = {"results": by_results, "detector": by_detector}


def test_the_function_follows_from_the_kind_of_the_model_or_an_option(tmp_path: Path) -> None:
    model, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    TinyDetector(["a"]).save(model)
    Pixels().save(other)
    (tmp_path / "options.yaml").write_text(f"model: {model}\n")
    assert find_kind(["--model", str(model)], BY_KIND) == "detector"
    assert find_kind(["--config", str(tmp_path / "options.yaml")], BY_KIND) == "detector"
    assert find_kind(["--results", "x.json", "--model", str(model)], BY_KIND) == "results"
    assert find_kind(["--help"], BY_KIND) is None
    assert find_kind([], {"only": by_results}) == "only"
    with pytest.raises(ValueError, match=r"other\.safetensors holds a model: give the file of a detector"):
        find_kind(["--model", str(other)], BY_KIND)
    with pytest.raises(FileNotFoundError):
        find_kind(["--model", "absent"], BY_KIND)


def test_a_command_that_is_not_told_of_what_says_so_and_its_help_explains_all_kinds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["evaluate"]) == 2
    assert "give --model, the file of a" in capsys.readouterr().err
    assert main(["evaluate", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--results" in text
    assert "--model" in text


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_tools_are_commands(path: Path) -> None:
    assert path.stem in COMMANDS
    assert f'if __name__ == "__main__":\n    tool("{path.stem}")' in path.read_text()
