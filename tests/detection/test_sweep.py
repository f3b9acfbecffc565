"""The sweep of the sampler: every combination, the scores that `evaluate` gives, one pass of the backbone."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffperception.cli.main import main
from diffperception.data import CocoDetection
from diffperception.detection import BoxSampler, DiffusionDet
from diffperception.detection.evaluator import results_rows
from diffperception.detection.inference import evaluate_detector
from diffperception.detection.sweep import Score, Sweep, SweepRow, combine, sweep_sampler, write_sweep
from diffperception.diffusion import sample_seed
from diffperception.files import OutputFolder
from tests.detection.scenes import tiny_detector
from tests.training.tiny_data import CLASSES, write_tiny_data
from tests.training.tiny_detector import TinyDetector

ROOT = Path(__file__).parents[2]
CHOICES = {"mode": ["ddim", "fixed_time", "fresh_boxes"], "num_boxes": [8, 12], "steps": [1, 2]}


@pytest.fixture(scope="module")
def detector() -> DiffusionDet:
    return tiny_detector(classes=list(CLASSES.values()), num_boxes=12)


@pytest.fixture(scope="module")
def dataset(detector: DiffusionDet, tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    """Images, of which two processes get different numbers; their objects are the best detections, so AP is not 0."""
    annotations, images = write_tiny_data(tmp_path_factory.mktemp("data"), images=5)
    content = json.loads(annotations.read_text())
    content["annotations"] = []
    for image, target in CocoDetection(annotations, images):
        seed = sample_seed(0, target["image_id"])
        (found,) = detector.predict([image], seeds=[seed])
        rows = results_rows(target["image_id"], found, list(CLASSES))[:4]
        for row in rows:
            area = row["bbox"][2] * row["bbox"][3]
            content["annotations"].append(row | {"id": len(content["annotations"]) + 1, "area": area})
    annotations.write_text(json.dumps(content))
    return CocoDetection(annotations, images)


@pytest.fixture(scope="module")
def arguments(detector: DiffusionDet, dataset: CocoDetection, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    detector.save(path)
    names = {"model": path, "annotations": dataset.annotations, "images": dataset.images, "workers": 0, "device": "cpu"}
    return ["evaluate", *(part for name, value in names.items() for part in (f"--{name}", str(value)))]


def test_every_combination_has_a_row_with_the_scores_of_an_evaluation(
    detector: DiffusionDet, dataset: CocoDetection
) -> None:
    combinations = combine(detector, CHOICES)
    sweep = sweep_sampler(detector, dataset, combinations, seeds=[0, 5], batch_size=3)
    found = [(row.sampler.mode, row.sampler.num_boxes, row.sampler.steps) for row in sweep.rows]
    assert found == list(itertools.product(*CHOICES.values()))
    lines = sweep.table().splitlines()
    assert [line.split()[:3] for line in lines[1:13]] == [[str(value) for value in row] for row in found]
    for row in sweep.rows:
        assert row.seconds > 0
        for seed, ap, ap50 in zip(sweep.seeds, row.ap.by_seed, row.ap50.by_seed, strict=True):
            alone = evaluate_detector(detector, dataset, batch_size=2, seed=seed, sampler=row.sampler)
            assert (ap, ap50) == (alone.metrics["AP"], alone.metrics["AP50"])
    assert len({row.ap.by_seed[0] for row in sweep.rows if row.sampler.steps == 2}) > 3  # the settings matter


def test_only_what_differs_has_a_column(detector: DiffusionDet, dataset: CocoDetection) -> None:
    plain = sweep_sampler(detector, dataset, [detector.sampler_with()], seeds=[0]).table()
    assert plain.splitlines()[0].split() == ["mode", "boxes", "steps", "AP", "AP50", "s/image"]
    assert "ensemble True, eta 1.0, nms_threshold 0.5, renewal_threshold 0.5" in plain
    both = sweep_sampler(detector, dataset, combine(detector, {"ensemble": [True, False]}), seeds=[0]).table()
    assert both.splitlines()[0].split() == ["mode", "boxes", "ensemble", "steps", "AP", "AP50", "s/image"]


def test_the_backbone_sees_each_batch_once(detector: DiffusionDet, dataset: CocoDetection) -> None:
    batches = []
    hook = detector.backbone.register_forward_hook(lambda *_: batches.append(1))
    alone = sweep_sampler(detector, dataset, [detector.sampler_with()], seeds=[0], batch_size=2)
    passes = len(batches)
    many = sweep_sampler(detector, dataset, combine(detector, CHOICES), seeds=[0, 1], batch_size=2)
    hook.remove()
    assert len(batches) == 2 * passes
    assert many.rows[2].sampler == BoxSampler(1, 12)
    assert many.rows[2].ap.by_seed[0] == alone.rows[0].ap.by_seed[0]


def test_settings_that_predict_the_same_predict_once(detector: DiffusionDet, dataset: CocoDetection) -> None:
    passes = []
    hook = detector.head.register_forward_hook(lambda *_: passes.append(1))
    choices = CHOICES | {"num_boxes": [12], "ensemble": [True, False]}
    sweep_sampler(detector, dataset, combine(detector, choices), seeds=[0], batch_size=1)
    hook.remove()
    assert len(passes) == len(dataset) * (1 + 2 * 6)  # all of one step together, each of the six of two steps alone


def test_the_spread_is_that_over_the_seeds(detector: DiffusionDet, dataset: CocoDetection) -> None:
    plain = [detector.sampler_with()]
    (same,) = sweep_sampler(detector, dataset, plain, seeds=[7, 7, 7]).rows
    assert same.ap.spread == same.ap50.spread == 0
    (other,) = sweep_sampler(detector, dataset, plain, seeds=[0, 1, 2]).rows
    a, b, c = other.ap.by_seed
    mean = (a + b + c) / 3
    assert other.ap.mean == pytest.approx(mean)
    assert other.ap.spread == pytest.approx(math.sqrt(((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 2))
    assert other.ap.spread > 0


def test_what_is_undefined_is_null(tmp_path: Path) -> None:
    rows = [SweepRow(BoxSampler(1, 9), Score([0.25]), Score([math.nan]), seconds=0.1)]
    sweep = Sweep(rows, [0], images=1, batch_size=1, device="cpu")
    write_sweep(sweep, OutputFolder(tmp_path))
    (row,) = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert row["AP"] == {"mean": 0.25, "spread": None, "by_seed": [0.25]}
    assert row["AP50"] == {"mean": None, "spread": None, "by_seed": [None]}
    assert str(Score([0.1, 0.3])) == "0.200 ± 0.141"
    assert str(Score([0.1])) == "0.100"


def test_a_sweep_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("mine")
    with pytest.raises(ValueError, match=r"sweep\.json would be replaced"):
        write_sweep(Sweep([], [0], images=1, batch_size=1, device="cpu"), OutputFolder(tmp_path, overwrite=True))
    assert (tmp_path / "sweep.json").read_text() == "mine"


def test_the_command_writes_table_numbers_and_curves(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lists.yaml").write_text("steps: [1, 2]\nmode: [ddim, fresh_boxes]\n")
    lists = ["--config", str(tmp_path / "lists.yaml"), "--num-boxes", "6", "12", "6", "--nms_threshold", "0.5", "1"]
    assert main([*arguments, *lists, "--num_seeds", "2", "--seed", "3", "--output", str(tmp_path), "--overwrite"]) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["seeds"] == [3, 4]
    names = ("mode", "num_boxes", "nms_threshold", "steps")
    settings = [tuple(row[name] for name in names) for row in content["rows"]]
    assert settings == list(itertools.product(["ddim", "fresh_boxes"], [6, 12], [0.5, 1.0], [1, 2]))
    assert all(row["head_passes"] == row["steps"] for row in content["rows"])
    for row in content["rows"]:
        assert f"{row['AP']['mean']:.3f} ± {row['AP']['spread']:.3f}" in printed
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.format == "PNG"
        assert picture.convert("L").getextrema() == (0, 255)
    assert not (tmp_path / "metrics.json").exists()


def test_single_values_are_a_plain_evaluation(
    arguments: list[str], detector: DiffusionDet, dataset: CocoDetection, tmp_path: Path
) -> None:
    single = ["--steps", "2", "--mode", "fixed_time", "--ensemble", "false", "--num_pictures", "0"]
    single += ["--renewal_threshold", "0", "--eta", "0.5", "--nms_threshold", "0.3"]
    assert main([*arguments, *single, "--output", str(tmp_path)]) == 0
    sampler = BoxSampler(2, 12, eta=0.5, renewal_threshold=0, ensemble=False, nms_threshold=0.3, mode="fixed_time")
    expected = evaluate_detector(detector, dataset, sampler=sampler)
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["AP"] == expected.metrics["AP"]
    assert json.loads((tmp_path / "detections.json").read_text()) == expected.detections
    assert not (tmp_path / "sweep.json").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--mode", "ddim", "walk"], "option mode: expected"),
        (["--mode", "walk"], "got walk"),
        (["--steps", "0"], "option steps: expected a whole number above 0, or several, got 0"),
        (["--steps", "1", "0"], "option steps: expected a whole number above 0"),
        (["--num-boxes", "10", "many"], "option num_boxes: expected a whole number above 0"),
        (["--num_seeds", "0"], "option num_seeds:"),
        (
            ["--renewal_threshold", "0.5", "2"],
            "option renewal_threshold: expected a number from 0 to 1, or several, got [0.5, 2]",
        ),
        (["--nms_threshold", "7"], "option nms_threshold: expected a number from 0 to 1"),
        (["--eta", "-3"], "option eta: expected a number from 0 to 1"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str], options: list[str], part: str
) -> None:
    assert main([*arguments, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num_seeds", "2"], "TinyDetector has no sampler to sweep"),
        (["--steps", "1", "2"], "TinyDetector has no option steps in prediction"),
    ],
)
def test_a_detector_without_a_sampler_has_nothing_to_sweep(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    TinyDetector(list(CLASSES.values())).save(tmp_path / "other.safetensors")
    other = ["--model", str(tmp_path / "other.safetensors"), "--trust", "tests"]
    assert main([*arguments, *other, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.slow
def test_two_processes_sweep_like_one(arguments: list[str], tmp_path: Path) -> None:
    lists = ["--steps", "1", "2", "--num_seeds", "2", "--batch-size", "2"]
    assert main([*arguments, *lists, "--output", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["diffperception", *arguments, *lists, "--output", str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.count("AP50") == 2  # the table's head and its note, of one process
    one, two = (json.loads((tmp_path / name / "sweep.json").read_text())["rows"] for name in ("one", "two"))
    assert [(row["AP"], row["AP50"]) for row in one] == [(row["AP"], row["AP50"]) for row in two]
