"""`diffperception evaluate` from its command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffperception.cli.main import main
from tests.helpers.runs import complaint
from tests.training.tiny_data import write_tiny_data
from tests.training.tiny_detector import TinyDetector

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments that name a model and a data set."""
    folder = tmp_path_factory.mktemp("given")
    annotations, images = write_tiny_data(folder / "data")
    torch.manual_seed(0)
    TinyDetector(["disc", "square"]).save(folder / "model.safetensors")
    names = {"model": folder / "model.safetensors", "annotations": annotations, "images": images, "trust": "tests"}
    return [part for name, value in names.items() for part in (f"--{name}", str(value))] + ["--workers", "0"]


Scores = tuple[dict, list]


def evaluate(given: list[str], output: Path, *options: str) -> Scores:
    assert main(["evaluate", *given, "--output", str(output), *options]) == 0
    return read(output)


def read(output: Path) -> Scores:
    return json.loads((output / "metrics.json").read_text()), json.loads((output / "detections.json").read_text())


def assert_same(one: Scores, other: Scores) -> None:
    """The same detections, but for the rounding of sums, which batches of other sizes do in another order."""
    assert one[0]["metrics"] == pytest.approx(other[0]["metrics"])
    assert len(one[1]) == len(other[1])
    for row, twin in zip(one[1], other[1], strict=True):
        assert (row["image_id"], row["category_id"]) == (twin["image_id"], twin["category_id"])
        assert [row["score"], *row["bbox"]] == pytest.approx([twin["score"], *twin["bbox"]], abs=1e-3)


def test_the_table_the_numbers_and_the_pictures(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, detections = evaluate(given, tmp_path, "--num_pictures", "3", "--max_dets", "30")
    said = capsys.readouterr().out
    assert "AP50" in said
    assert "disc" in said
    assert "AR30" in scores["metrics"]
    assert {row["category_id"] for row in detections} <= {3, 7}  # the file's ids, not the labels
    assert len(list((tmp_path / "pictures").iterdir())) == 3


def test_scores_depend_on_the_seed_but_not_on_the_batch_size(given: list[str], tmp_path: Path) -> None:
    single = evaluate(given, tmp_path, "--batch_size", "1")
    assert_same(evaluate(given, tmp_path, "--batch_size", "4", "--overwrite"), single)
    other = evaluate(given, tmp_path, "--seed", "1", "--overwrite")
    assert [row["score"] for row in other[1]] != pytest.approx([row["score"] for row in single[1]], abs=1e-3)


def test_files_of_others_are_not_replaced(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["evaluate", *given, "--output", str(tmp_path)]
    for name in ("metrics.json", "pictures/1.png"):
        mine = tmp_path / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        assert main(options) == 2
        assert "--overwrite" in complaint(capsys)
        assert main([*options, "--overwrite"]) == 2
        assert f"{mine} would be replaced" in complaint(capsys)
        assert mine.read_text() == "mine"
        mine.unlink()


def test_two_processes_score_like_one(given: list[str], tmp_path: Path) -> None:
    single = evaluate(given, tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "diffperception", "evaluate", *given, "--output", str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.count("AP50") == 1  # one process speaks
    assert_same(read(tmp_path / "two"), single)


def test_a_results_file_is_scored_without_a_model(given: list[str], tmp_path: Path) -> None:
    scores, detections = evaluate(given, tmp_path / "model")
    annotations = given[given.index("--annotations") + 1]
    options = ["evaluate", "--annotations", annotations, "--output", str(tmp_path / "results")]
    assert main([*options, "--results", str(tmp_path / "model" / "detections.json")]) == 0
    assert json.loads((tmp_path / "results" / "metrics.json").read_text())["metrics"] == scores["metrics"]
    truth = json.loads(Path(annotations).read_text())["annotations"]
    (tmp_path / "truth.json").write_text(json.dumps([row | {"score": 1.0} for row in truth]))
    assert main([*options, "--results", str(tmp_path / "truth.json"), "--overwrite"]) == 0
    assert json.loads((tmp_path / "results" / "metrics.json").read_text())["metrics"]["AP"] == 1.0
    assert len(detections) == 7


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--steps", "4"], "no option steps"),
        (["--model", "absent.safetensors"], "absent.safetensors"),
        (["--images", "absent"], "no image folder absent"),
        (["--device", "abacus"], "no device"),
        (["--max_dets", "0"], "max_dets"),
        (["--trust", "nobody"], "tests"),
        (["--batch_sise", "3"], "did you mean batch_size?"),
    ],
)
def test_a_mistake_is_one_sentence(given: list[str], capsys, options: list[str], part: str) -> None:
    assert main(["evaluate", *given, *options]) == 2
    assert part in complaint(capsys)


def test_a_model_of_other_classes_is_refused(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TinyDetector(["disc", "square", "ring"]).save(tmp_path / "other.safetensors")
    assert main(["evaluate", *given, "--model", str(tmp_path / "other.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "3 classes (disc, square, ring)" in said
    assert "2 (disc, square)" in said


def test_a_model_with_numbers_for_classes_is_to_be_converted_with_their_names(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TinyDetector(["0", "1"]).save(tmp_path / "numbered.safetensors")
    assert main(["evaluate", *given, "--model", str(tmp_path / "numbered.safetensors")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    annotations = given[given.index("--annotations") + 1]
    assert f"convert it again with --annotations {annotations}" in line


def test_a_model_file_cut_in_half_is_named(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Path(given[given.index("--model") + 1]).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    assert main(["evaluate", *given, "--model", str(tmp_path / "half.safetensors")]) == 2
    assert "half.safetensors" in capsys.readouterr().err
