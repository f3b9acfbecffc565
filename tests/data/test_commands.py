import json

import pytest

from diffperception.cli.main import main


def test_check_prints_problems_and_exits_with_1_on_errors_alone(folder, content, save, capsys):
    arguments = ["--annotations", str(save(content)), "--images", str(folder)]
    assert main(["check", *arguments]) == 0
    assert "no errors" in capsys.readouterr().out

    content["categories"].append({"id": 30, "name": "unseen"})
    save(content)
    assert main(["check", *arguments]) == 0
    assert "unseen" in capsys.readouterr().out

    (folder / "b.png").unlink()
    assert main(["check", *arguments, "--report", str(folder / "report.json")]) == 1
    assert "b.png" in capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    assert [problem["kind"] for problem in report["problems"]] == ["missing image", "category without objects"]


def test_check_says_when_images_were_not_looked_at(content, save, capsys):
    assert main(["check", "--annotations", str(save(content))]) == 0
    assert "--images FOLDER" in capsys.readouterr().out


def test_shapes_are_drawn_once_and_pass_the_check(tmp_path, capsys):
    output = tmp_path / "shapes"
    arguments = ["shapes", "--output", str(output), "--train", "3", "--val", "2", "--workers", "1"]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert "nothing to draw" in capsys.readouterr().out
    for split in ("train", "val"):
        annotations = str(output / "annotations" / f"instances_{split}.json")
        assert main(["check", "--annotations", annotations, "--images", str(output / split)]) == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--train", "many"], "train"), (["--train", "-4"], "negative"), (["--seeds", "1"], "seed")],
)
def test_a_mistake_in_the_options_of_shapes_is_one_sentence(tmp_path, capsys, options, complaint):
    assert main(["shapes", "--output", str(tmp_path / "shapes"), *options]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "shapes").exists()
