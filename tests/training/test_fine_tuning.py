"""Runs that start from other weights: what a user sees of it, and what a resumed run makes of it."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from diffperception.models.base import Model
from tests.helpers.runs import complaint, fixtures_of, train
from tests.training.tiny_data import write_tiny_config
from tests.training.tiny_generator import write_tiny_generator

config, whole = fixtures_of(write_tiny_config)
SHORT = ["--trainer.max_steps", "2", "--evaluation.every", "null", "--evaluation.num_pictures", "0"]
SMALL = ["--model", "tests.training.tiny_detector.UnpluggedDiffusionDet", *SHORT]


def other_classes(config: Path, folder: Path) -> list[str]:
    """Options of a data set whose first class has another name and whose categories come in another order."""
    content = json.loads((config.parent / "data" / "annotations.json").read_text())
    content["categories"] = [{"id": 3, "name": "ring"}, {"id": 7, "name": "Square"}, {"id": 1, "name": "gear"}]
    (folder / "own.json").write_text(json.dumps(content))
    return [f"--data.{part}_annotations={folder / 'own.json'}" for part in ("train", "val")]


def test_a_detector_of_other_classes_is_started_from_and_told(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path / "base", *SMALL) == 0
    capsys.readouterr()
    own = [*other_classes(config, tmp_path), "--optimizer.lr", "0"]
    assert train(config, tmp_path / "tuned", *SMALL, *own, "--init", str(tmp_path / "base/model.safetensors")) == 0
    said = capsys.readouterr().out
    assert "(UnpluggedDiffusionDet of 2 classes)" in said
    assert "classes taken by name: Square (there square); anew: " in said
    base, tuned = (Model.load(tmp_path / run / "model.safetensors", allow="tests") for run in ("base", "tuned"))
    assert tuned.classes != base.classes
    ours, theirs = (model.head.stages[0].class_logits.bias for model in (tuned, base))
    assert ours[tuned.classes.index("Square")] == theirs[base.classes.index("square")]
    assert torch.equal(tuned.head.stages[0].box_deltas.weight, base.head.stages[0].box_deltas.weight)


def test_a_resumed_run_does_not_start_again_nor_from_something_else(
    config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, run = tmp_path / "start.safetensors", tmp_path / "run"
    start.write_bytes((whole / "model.safetensors").read_bytes())
    assert train(config, run, *SHORT, "--init", str(start)) == 0
    start.unlink()  # is not needed any more
    capsys.readouterr()
    longer = [*SHORT, "--trainer.max_steps", "3", "--resume"]
    assert train(config, run, *longer, "--init", str(start)) == 0
    assert "starting from" not in capsys.readouterr().out
    assert train(config, run, *longer, "--init", str(whole / "model.safetensors")) == 2
    assert "init is" in complaint(capsys)


def test_a_file_that_does_not_fit_leaves_nothing_behind(
    config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path / "run", *SMALL, "--init", str(whole / "model.safetensors")) == 2
    assert "too little of this UnpluggedDiffusionDet" in complaint(capsys)
    assert not (tmp_path / "run").exists()
    assert train(config, tmp_path / "run", *SMALL, "--init", str(tmp_path / "absent.pth")) == 2
    assert "there is no" in complaint(capsys)


def test_a_generator_starts_from_another_ones_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny_generator(tmp_path)
    short = ["--trainer.max_steps", "1", "--preview.every", "null", "--preview.num_samples", "1"]
    assert train(config, tmp_path / "base", *short) == 0
    capsys.readouterr()
    (tmp_path / "pictures" / "odd").rename(tmp_path / "pictures" / "strange")
    tuned = [*short, "--optimizer.lr", "0", "--init", str(tmp_path / "base/model.safetensors")]
    assert train(config, tmp_path / "tuned", *tuned) == 0
    assert "classes taken by name: even; anew: strange" in capsys.readouterr().out
    base, tuned = (Model.load(tmp_path / run / "model.safetensors", allow="tests") for run in ("base", "tuned"))
    assert all(torch.equal(value, base.network.state_dict()[n]) for n, value in tuned.network.state_dict().items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_frozen_stages_end_as_they_began_average_and_statistics_included(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    assert train(config, tmp_path / "base", *SMALL) == 0
    frozen = ["--optimizer.frozen_stages", "2", "--evaluation.every", "2", "--trainer.max_steps", "4"]
    frozen += ["--init", str(tmp_path / "base/model.safetensors"), "--trainer.precision", precision]
    assert train(config, tmp_path / "tuned", *SMALL, *frozen) == 0
    assert "M parameters are frozen, with the statistics of their norms" in capsys.readouterr().out
    base, tuned = (
        Model.load(tmp_path / run / "model.safetensors", allow="tests").state_dict() for run in ("base", "tuned")
    )
    first = ("backbone.backbone.body.conv1", "backbone.backbone.body.bn1", "backbone.backbone.body.layer1")
    assert all(torch.equal(value, base[name]) for name, value in tuned.items() if name.startswith(first))
    for name in ("bn1.weight", "bn1.running_mean", "conv1.weight"):
        trained = f"backbone.backbone.body.layer2.0.{name}"
        assert not torch.equal(tuned[trained], base[trained])
    longer = [*SMALL, *frozen, "--trainer.max_steps", "5", "--resume"]
    assert train(config, tmp_path / "tuned", *longer, "--optimizer.frozen_stages", "1") == 2
    assert "optimizer.frozen_stages is 1" in complaint(capsys)
    state = torch.load(tmp_path / "tuned/last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    model = Model.load(tmp_path / "tuned/model.safetensors", allow="tests")
    assert len(state) == sum(not name.startswith(first) for name, _ in model.named_parameters())


def test_a_run_says_which_weights_its_backbone_begins_with_and_the_weights_are_not_needed_after_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), file)
    fcos = ["--model=FCOS", "--model.backbone=test_resnet", "--model.width=64", f"--model.backbone_weights={file}"]
    assert train(config, tmp_path / "run", *fcos, *SHORT, "--optimizer.lr=0") == 0
    assert f"note: the backbone starts from {file}: all of its " in capsys.readouterr().out
    assert str(file) in (tmp_path / "run/config.yaml").read_text()
    file.unlink()
    Model.load(tmp_path / "run/model.safetensors")
    assert train(config, tmp_path / "other", *fcos, *SHORT) == 2
    assert complaint(capsys).endswith(f"there is no checkpoint {file}")
    assert not (tmp_path / "other").exists()
