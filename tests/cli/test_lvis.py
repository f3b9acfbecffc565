"""LVIS from the command line."""

import json
from pathlib import Path

import pytest

from diffperception.cli.main import main
from tests.training.tiny_data import write_tiny_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of a tiny run whose annotation file is one of LVIS, its images named by URL."""
    config = write_tiny_config(tmp_path)
    path = tmp_path / "data" / "annotations.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/images/{image.pop('file_name')}"
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for category, frequency in zip(content["categories"], "rf", strict=True):
        category["frequency"] = frequency
    path.write_text(json.dumps(content))
    return config


def train(config: Path, output: Path) -> int:
    images = [option for part in ("train", "val") for option in (f"--data.{part}_images", str(config.parent / "data"))]
    protocol = ["--evaluation.protocol", "lvis", "--evaluation.max_dets", "300"]
    return main(["train", "--config", str(config), "--output", str(output), *images, *protocol])


def evaluate(config: Path, *options: str) -> int:
    annotations = config.parent / "data" / "annotations.json"
    return main(["evaluate", "--annotations", str(annotations), "--protocol", "lvis", *options])


def test_a_run_on_lvis_is_scored_by_its_rules_and_its_results_score_the_same(config, tmp_path, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    assert train(config, run) == 0
    assert "APr" in capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    assert {"APr", "APc", "APf", "AR300"} < metrics.keys()
    assert metrics["APc"] is None
    assert evaluate(config, "--results", str(run / "detections.json"), "--output", str(again)) == 0
    assert json.loads((again / "metrics.json").read_text())["metrics"] == metrics
