"""Files that build on others, files without --config, and what is known of options before they are parsed."""

from argparse import ArgumentError
from pathlib import Path

import pytest

from diffperception.configuration.inheritance import given, spread_files, with_bases


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_file_comes_after_all_that_it_builds_on(tmp_path: Path) -> None:
    bottom = write(tmp_path / "bottom.yaml", "a: 1\n")
    data = write(tmp_path / "data.yaml", "b: 1\n")
    middle = write(tmp_path / "x" / "middle.yaml", "base: ../bottom.yaml\n")
    top = write(tmp_path / "top.yaml", "base: [x/middle.yaml, data.yaml]\n")
    resolved = [Path(file).resolve() for file in with_bases(top)]
    assert resolved == [Path(file) for file in (bottom, middle, data, top)]


def test_files_may_come_first_without_config(tmp_path: Path) -> None:
    base, file = write(tmp_path / "base.yaml", "a: 1\n"), write(tmp_path / "file.yml", "base: base.yaml\n")
    expected = ["--config", base, "--config", file, "--b", "other.yaml"]
    assert spread_files([file, "--b", "other.yaml"]) == expected
    assert spread_files(["--config", file, "--b", "other.yaml"]) == expected
    assert spread_files([f"--config={file}", "--b", "other.yaml"]) == expected


def test_circles_and_missing_bases_are_named(tmp_path: Path) -> None:
    one = write(tmp_path / "one.yaml", "base: two.yaml\n")
    write(tmp_path / "two.yaml", "base: one.yaml\n")
    with pytest.raises(ValueError, match=r"one\.yaml builds on itself"):
        with_bases(one)
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml, which .*three\.yaml names as its base"):
        with_bases(write(tmp_path / "three.yaml", "base: absent.yaml\n"))


def test_a_file_of_comments_alone_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# seed: 3\n")
    assert spread_files([str(tmp_path / "a.yaml"), "--seed", "1"]) == ["--seed", "1"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"base: [[3]]", "base must be the name of a file or a list of names, not "),
        (b"base: {a: b}", "base must be the name of a file or a list of names, not {'a': 'b'}"),
        (b"a: [1\nb: 2", "is not YAML: .*in line 2"),
        (b"\xff: 1", "is not YAML: .*can't decode byte 0xff"),
        (b"- a", "must hold options .* not a list"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "wrong.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)wrong\.yaml:? {complaint}"):
        spread_files([str(tmp_path / "wrong.yaml")])


@pytest.mark.parametrize("words", [["--base", "x.yaml"], ["--base=x.yaml"], ["--config", "{base: x.yaml, a: 1}"]])
def test_a_base_is_refused_outside_files(words: list[str]) -> None:
    with pytest.raises(ValueError, match="give --config"):
        spread_files(words)


def test_the_last_word_on_an_option_counts(tmp_path: Path) -> None:
    base, file = write(tmp_path / "base.yaml", "task: a\nmodel: m\n"), write(tmp_path / "f.yaml", "task: b\n")
    arguments = ["--config", base, "--config", file]
    assert given(arguments, "task") == "b"
    assert given(arguments, "model") == "m"
    assert given([*arguments, "--task", "c"], "task") == "c"
    assert given([*arguments, "--task=d", "--model.x", "3"], "task") == "d"
    assert given(["--help"], "task") is None
    with pytest.raises(ArgumentError, match="--task: expected one argument"):
        given(["--task"], "task")
