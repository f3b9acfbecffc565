"""How options may be written: several values, hyphens; and what is said of a value of none of several types."""

import json
from argparse import ArgumentError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from diffperception.configuration.messages import sentence
from diffperception.configuration.parser import Options, OptionsOf, call


@dataclass
class DataOptions:
    """What is read.

    Args:
        batch_size: how much at once.
        sizes: how large.
    """

    batch_size: int = 1
    sizes: list[int] | None = None


received: dict = {}


def measure(
    path_name: Path = Path("some-where"),
    num_boxes: PositiveInt | list[PositiveInt] | None = None,
    modes: str | list[str] = "ddim",
    data: DataOptions = DataOptions(),  # noqa: B008
    overwrite: bool = False,
    share: ClosedUnitInterval | None = None,
    seeds: PositiveInt = 1,
    colours: Literal["red", "green"] | list[Literal["red", "green"]] = "red",
    names: list[str] | None = None,
    pairs: dict[int, int] | None = None,
    frozen: int | Literal["all"] = 0,
) -> None:
    """Measure.

    Args:
        path_name: where.
        num_boxes: how many.
        modes: how.
        data: what.
        overwrite: whether to.
        share: of the whole.
        seeds: how often.
        colours: in what.
        names: of what.
        pairs: what they mean.
        frozen: how many.
    """
    received.update(path_name=path_name, num_boxes=num_boxes, modes=modes, data=data, overwrite=overwrite, names=names)
    received.update(share=share, pairs=pairs)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--num_boxes 100", {"num_boxes": 100}),
        ("--num_boxes 100 300 500", {"num_boxes": [100, 300, 500]}),
        ("--num_boxes [100,300]", {"num_boxes": [100, 300]}),
        ("--modes ddim fixed_time --num_boxes 1 2", {"modes": ["ddim", "fixed_time"], "num_boxes": [1, 2]}),
        ("--num-boxes 3", {"num_boxes": 3}),
        ("--num-boxes 3 --num-boxes null", {"num_boxes": None}),
        ("--num-boxes=3", {"num_boxes": 3}),
        ("--num-boxes 3 4 --overwrite", {"num_boxes": [3, 4], "overwrite": True}),
        ("--data.batch-size 3", {"data": DataOptions(3)}),
        ("--names None nullable", {"names": ["None", "nullable"]}),
        ("--names nullable", {"names": ["nullable"]}),
        ("--names a --names null", {"names": None}),
        ("--path-name a-b --modes c-d", {"path_name": Path("a-b"), "modes": "c-d"}),
        ("--path-name=a-b=c-d", {"path_name": Path("a-b=c-d")}),
    ],
)
def test_lists_and_hyphens(words: str, values: dict) -> None:
    call(measure, words.split())
    assert {name: received[name] for name in values} == values


NAMES = ["no", "yes", "1e3", "012", "null", "1_000", "off", "5:30", "2024-01-01", "~", "a b", "é"]


@pytest.mark.parametrize("names", [NAMES, ["a, b", "#x", "a: b", "[x]", "{y}", "-5", "", '"', "*", "true"]])
def test_names_stay_as_they_are_typed(tmp_path: Path, names: list[str]) -> None:
    call(measure, ["--names", *names])
    assert received["names"] == names
    for name in names:
        call(measure, ["--names", name, "b"])
        assert received["names"] == [name, "b"]
    (tmp_path / "options.yaml").write_text(f"names: {json.dumps(names)}")
    call(measure, [str(tmp_path / "options.yaml")])
    assert received["names"] == names


@pytest.mark.parametrize("text", [f"names: [{', '.join(NAMES)}]", "names:\n" + "".join(f"- {n}\n" for n in NAMES)])
def test_names_in_a_file_need_no_quotes(tmp_path: Path, text: str) -> None:
    (tmp_path / "options.yaml").write_text(text, encoding="utf-8")
    call(measure, [str(tmp_path / "options.yaml")])
    assert received["names"] == NAMES


@pytest.mark.parametrize("name", ["2024", "1e3", "#x", "~", "a: b", "[a", "{a}", "no", "a=b", "-x", "* ", "null.png"])
def test_paths_stay_as_they_are_typed(tmp_path: Path, name: str) -> None:
    call(measure, ["--path-name", name])
    assert received["path_name"] == Path(name)
    (tmp_path / "options.yaml").write_text(f"path_name: {json.dumps(name)}")
    call(measure, [str(tmp_path / "options.yaml")])
    assert received["path_name"] == Path(name)


def test_a_file_says_numbers_switches_and_nothing_as_before(tmp_path: Path) -> None:
    text = "overwrite: yes\nnum_boxes: [1_000, 2]\nnames:\nshare: 1e-1\npairs: {0: 1, 255: 0}\npath_name: 2024\n"
    (tmp_path / "options.yaml").write_text(text)
    call(measure, [str(tmp_path / "options.yaml")])
    expected = {"overwrite": True, "num_boxes": [1000, 2], "names": None, "share": 0.1, "pairs": {0: 1, 255: 0}}
    assert {name: received[name] for name in expected} == expected
    assert received["path_name"] == Path("2024")


@pytest.mark.parametrize(("words", "batches", "pairs"), [("[3, 4]", [3, 4], None), ("3 4", [3, 4], "{0:0,255:1}")])
def test_lists_of_groups_and_pairs_may_be_written_without_care(words: str, batches: list, pairs: str | None) -> None:
    call(measure, ["--data.sizes", *words.split(), "--pairs", pairs or "null"])
    assert received["data"].sizes == batches
    assert received["pairs"] == (pairs and {0: 0, 255: 1})


@pytest.mark.parametrize(("yaml", "value"), [("num_boxes: 4", 4), ("num_boxes: [1, 2]", [1, 2]), ("{}", None)])
def test_lists_in_a_file(tmp_path: Path, yaml: str, value: object) -> None:
    (tmp_path / "options.yaml").write_text(yaml)
    call(measure, ["--config", str(tmp_path / "options.yaml")])
    assert received["num_boxes"] == value


def say(word: str, times: PositiveInt = 1, precision: Literal["32", "bf16"] = "bf16") -> tuple[str, int, str]:
    """Say it.

    Args:
        word: what.
        times: how often.
        precision: how exactly.
    """
    return word, times, precision


def listen(sayer: Annotated[partial[tuple[str, int, str]], OptionsOf(say, "word")], word_too: str = "a") -> None:
    received.update(heard=sayer(word_too), keywords=sayer.keywords)


def test_options_of_a_function_keep_their_defaults_help_and_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(listen, ["--times", "3"])
    assert received["heard"] == ("a", 3, "bf16")
    (tmp_path / "options.yaml").write_text("precision: 32")  # without quotes
    call(listen, [str(tmp_path / "options.yaml"), "--word-too", "b"])
    assert received["heard"] == ("b", 1, "32")
    assert received["keywords"] == {"times": 1, "precision": "32"}
    with pytest.raises(ArgumentError, match="option times: "):
        call(listen, ["--times", "0"])
    with pytest.raises(ArgumentError, match="unrecognized arguments: --word"):
        call(listen, ["--word", "a"])
    with pytest.raises(SystemExit):
        call(listen, ["--help"])
    text = capsys.readouterr().out
    assert "Say it." in text
    assert "how often" in text


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--num-boxes 0", "option num_boxes: expected a whole number above 0, or several, got 0"),
        ("--num-boxes 1 x", "option num_boxes: expected a whole number above 0, or several, got [1, x]"),
        ("--share 2", "option share: expected a number from 0 to 1, got 2"),
        ("--seeds 0", "option seeds: expected a whole number above 0, got 0"),
        ("--seeds x", "option seeds: expected a whole number above 0, got x"),
        ("--colours red blue", "option colours: expected one of red, green, or several, got [red, blue]"),
        ("--frozen x", "option frozen: expected a whole number or all, got x"),
        ("--num-boxs 1", "unrecognized arguments: --num_boxs 1; did you mean num_boxes?"),
        ("--batch-sise 1", "unrecognized arguments: --batch_sise 1; did you mean data.batch_size?"),
        ("--data.batch-size 1 2", "unrecognized arguments: 2"),
        ("--pairs 0:0", "option pairs: expected pairs of whole numbers such as {0: 0, 255: 1}, got 0:0"),
        ('--pairs {"a":0}', "option pairs: expected a whole number, got a"),
        ("--seeds null", "option seeds: expected a whole number above 0, got null"),
    ],
)
def test_a_mistake_is_one_sentence(words: str, complaint: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        call(measure, words.split())
    assert sentence(caught.value) == complaint


def test_help_spells_options_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(measure, ["--help"])
    text = capsys.readouterr().out
    assert "--num_boxes" in text
    assert "--num_boxes NUM_BOXES ..." in text
    assert "--num-boxes" not in text
    assert "--num_boxes+" not in text


class Ingredient:
    """Something with options of its own.

    Args:
        count: how many.
        share: of the whole.
        fresh: whether it is.
        names: texts that YAML would read as something else.
        sizes: numbers.
        inner: one in it.
    """

    def __init__(
        self,
        count: int = 1,
        share: float = 0.5,
        fresh: bool = False,
        names: list[str] | None = None,
        sizes: list[int] | None = None,
        inner: "Ingredient | str | None" = None,
    ) -> None:
        self.count, self.share, self.fresh, self.inner = count, share, fresh, inner
        self.names, self.sizes = names, sizes


def cook(ingredient: Ingredient) -> None:
    """Cook."""


def test_settings_of_nested_classes_have_the_types_of_their_options() -> None:
    names = ["no", "012", "1e3", "null", "5:30"]
    own = {"count": 3, "share": 0.25, "fresh": True, "names": names, "sizes": [1, 2], "inner": None}
    nested = {"class_path": f"{__name__}.Ingredient", "init_args": {**own, "inner": "012"}}
    given = {"class_path": f"{__name__}.Ingredient", "init_args": {**own, "inner": nested}}
    options = Options("cook", cook)
    parsed = options.parse(["--config", yaml.safe_dump({"ingredient": given})])
    assert options.settings(parsed)["ingredient"] == given
