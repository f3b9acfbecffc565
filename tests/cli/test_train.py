"""`diffperception train` from its command line: what it writes, and what it says when something is wrong."""

import csv
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffperception.data.batches import StepBatchSampler
from tests.helpers.runs import assert_not_resumed, complaint, copy_run, fixtures_of, train
from tests.training.tiny_data import write_tiny_config
from tests.training.tiny_detector import TinyDetector


class DeeperDetector(TinyDetector):
    """Of the same arguments, but with more weights."""

    def __init__(self, classes: Sequence[str], width: int = 8):
        super().__init__(classes, width)
        self.more = torch.nn.Linear(width, width)


config, whole = fixtures_of(write_tiny_config)


def same_weights(one: Path, other: Path) -> bool:
    first, second = (torch.load(run / "last.ckpt", weights_only=True) for run in (one, other))
    return all(
        torch.equal(first[part][name], second[part][name])
        for part in ("state_dict", "current_model_state")
        for name in first.get(part, ())
    )


def test_a_run_leaves_everything_it_promises(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        ".diffperception",
        "config.yaml",
        "last.ckpt",
        "model.safetensors",
        "metrics.csv",
        "metrics.json",
        "detections.json",
        "pictures",
        "tensorboard",
    }
    assert {path.name for path in (whole / "pictures").iterdir()} == {"0.png", "curves.png"}
    scores = json.loads((whole / "metrics.json").read_text())
    assert set(scores["per_class"]) == {"disc", "square"}
    assert scores["metrics"]["APl"] is None  # no large object: undefined, which JSON has no number for
    assert len(json.loads((whole / "detections.json").read_text())) == 7


def test_the_log_has_the_losses_the_rate_and_the_scores(whole: Path) -> None:
    with open(whole / "metrics.csv", newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert list(rows) == list(range(1, 10))
    for row in rows.values():
        loss, box, label = (float(row[f"train/{name}"]) for name in ("loss", "loss_box", "loss_label"))
        assert loss == pytest.approx(box + label, abs=1e-4)
        assert 0 <= float(row["train/waiting"]) <= 1
    assert [step for step, row in rows.items() if row["val/AP"]] == [4, 8, 9]
    warm = float(rows[3]["train/lr"])  # after the warm-up of three steps the cosine begins
    assert warm == pytest.approx(0.01)
    assert float(rows[6]["train/lr"]) == pytest.approx(0.01 * (1 + math.cos(math.pi / 2)) / 2)


def test_the_saved_configuration_repeats_the_run(whole: Path, tmp_path: Path) -> None:
    assert "resume" not in yaml.safe_load((whole / "config.yaml").read_text())
    assert train(whole / "config.yaml", tmp_path / "again") == 0
    assert same_weights(whole, tmp_path / "again")


def test_what_is_saved_and_scored_is_the_average(whole: Path) -> None:
    state = torch.load(whole / "last.ckpt", weights_only=True)
    weights = load_file(whole / "model.safetensors")
    assert all(torch.equal(weights[name], state["state_dict"][f"model.{name}"]) for name in weights)
    assert not torch.equal(weights["box.weight"], state["current_model_state"]["model.box.weight"])


def test_the_rate_follows_the_images_a_step_and_is_said(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer.accumulate", "3", "--trainer.max_steps", "1", "--optimizer.warmup_steps", "0"]
    assert train(config, tmp_path / "run", *options, "--optimizer.schedule", "constant") == 0
    said = capsys.readouterr().out
    assert "6 images per step, so the learning rate is 0.01 x 6 / 2 = 0.03" in said
    assert "step 1/1" in said
    assert f"{tmp_path / 'run' / 'model.safetensors'}: the trained detector" in said
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert {group["lr"] for group in state["optimizer_states"][0]["param_groups"]} == {0.03}


def test_a_model_that_cannot_be_built_is_said(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, tmp_path / "run", "--model.init_args.width", "-3") == 2
    assert "the model cannot be built with these options (RuntimeError: Trying to create" in complaint(capsys)
    assert train(config, tmp_path / "run", "--task", "/") == 2
    assert "the task / cannot be imported" in complaint(capsys)


def test_a_folder_that_holds_a_run_is_refused_or_replaced(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--trainer.max_steps", "1"]
    assert train(config, tmp_path, *one, "--evaluation.num_pictures", "2") == 0
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tensorboard" / "mine.png").write_text("mine")
    assert len(list((tmp_path / "pictures").iterdir())) == 3
    capsys.readouterr()
    assert train(config, tmp_path, *one) == 2
    said = complaint(capsys)
    assert "--resume" in said
    assert "--overwrite" in said
    assert train(config, tmp_path, *one, "--overwrite", "--resume") == 2
    written = (tmp_path / "last.ckpt").stat().st_mtime_ns
    edited = tmp_path / "pictures" / "curves.png"
    edited.write_text("edited")
    capsys.readouterr()
    assert train(config, tmp_path, *one, "--overwrite") == 2
    assert f"{edited} is in the way" in complaint(capsys)
    assert (edited.read_text(), (tmp_path / "last.ckpt").stat().st_mtime_ns) == ("edited", written)
    edited.unlink()
    assert train(config, tmp_path, *one, "--overwrite", "--evaluation.num_pictures", "0") == 0
    assert (tmp_path / "last.ckpt").stat().st_mtime_ns > written
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "tensorboard" / "mine.png").exists()
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["curves.png"]


@pytest.mark.parametrize("name", ["metrics.csv", "config.yaml", "pictures/curves.png", "pictures/a/mine.png"])
@pytest.mark.parametrize("mode", [[], ["--overwrite"], ["--resume"]])
def test_files_that_no_run_has_written_are_never_replaced(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, mode: list[str]
) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    assert train(config, tmp_path, "--trainer.max_steps", "1", *mode) == 2
    assert f"{mine} is in the way" in complaint(capsys)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"


def test_the_output_is_a_folder(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, config) == 2
    assert f"{config} is a file: name a folder" in complaint(capsys)


def test_ctrl_c_leaves_a_checkpoint_that_goes_on_as_if_nothing_had_been(
    config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path / "run", "--model.interrupt_at", "5") == 130
    assert "stopped after step 5" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert train(config, tmp_path / "run", "--resume") == 0
    assert same_weights(whole, tmp_path / "run")


def test_a_finished_run_is_resumed_to_its_end_again(whole: Path, config: Path, tmp_path: Path) -> None:
    assert train(config, tmp_path / "run") == 0
    (tmp_path / "run" / "model.safetensors").unlink()
    assert train(config, tmp_path / "run", "--resume") == 0
    first, second = (load_file(run / "model.safetensors") for run in (whole, tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_time_limit_ends_a_run_like_its_last_step(config: Path, tmp_path: Path) -> None:
    assert train(config, tmp_path / "run", "--trainer.max_minutes", "0") == 0
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 1
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_stops_training_by_name_and_the_steps_done_are_kept(
    config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    broken = write_tiny_config(tmp_path / "broken")
    seen = [index for step in range(4) for index, _ in StepBatchSampler(7, 2, 9, seed=0).batch(step)]
    image = tmp_path / "broken/data/images" / f"{seen[6]}.png"  # in the fourth batch for the first time
    good = image.read_bytes()
    image.write_bytes(good[:40])
    assert train(broken, tmp_path / "run", "--data.workers", workers, "--evaluation.every", "null") == 2
    said = complaint(capsys)
    assert image.name in said
    assert "\n" not in said
    step = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 9
    image.write_bytes(good)
    assert train(broken, tmp_path / "run", "--resume") == 0
    assert same_weights(whole, tmp_path / "run")


@pytest.mark.filterwarnings("default:.*skipped")
def test_a_broken_image_can_be_skipped(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_tiny_config(tmp_path / "broken")
    (tmp_path / "broken/data/images/6.png").write_bytes(b"no image")
    assert train(broken, tmp_path / "run", "--data.on_broken", "skip") == 0
    assert re.search(r"6\.png.*skipped", capsys.readouterr().err)
    notes = json.loads((tmp_path / "run" / "metrics.json").read_text())["notes"]
    assert any("1 of 7 images were not predicted" in note for note in notes)


def test_a_loss_that_is_not_finite_names_the_step_and_the_images(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path / "run", "--model.nan_at", "6") == 2
    said = complaint(capsys)
    assert "step 6" in said
    assert "box nan" in said
    assert "with ids 1" in said
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_a_checkpoint_cut_in_half_is_named(
    config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (whole / "last.ckpt").read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 100):
        (tmp_path / "last.ckpt").write_bytes(content[:size])
        assert train(config, tmp_path, "--resume") == 2
        assert f"{tmp_path / 'last.ckpt'} is cut short" in complaint(capsys)


def test_a_checkpoint_of_another_model_is_refused(
    config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "last.ckpt").write_bytes((whole / "last.ckpt").read_bytes())
    assert train(config, tmp_path, "--resume", "--model.width", "5") == 2
    assert f"model.width is 5, but the run in {tmp_path} was begun with 8" in complaint(capsys)
    assert train(config, tmp_path, "--resume", "--model", "tests.cli.test_train.DeeperDetector") == 2
    assert "holds the weights of another model than this DeeperDetector" in complaint(capsys)
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--optimizer.ema_decay", "null"], "optimizer.ema_decay is null, but the run in {} was begun with 0.9"),
        (["--optimizer.backbone_lr_factor", "0.5"], "optimizer.backbone_lr_factor is 0.5, but"),
        (["--trainer.max_steps", "8"], "trainer.max_steps is 8, but {}/last.ckpt was written after step 9"),
    ],
)
def test_what_the_state_of_a_run_hangs_on_cannot_change_on_the_way(
    config, whole, tmp_path, capsys, options: list[str], said: str
):
    assert_not_resumed(config, whole, tmp_path, options, said, capsys)


def test_other_classes_cannot_go_on_with_a_run(
    config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "last.ckpt").write_bytes((whole / "last.ckpt").read_bytes())
    annotations = Path(yaml.safe_load(config.read_text())["data"]["train_annotations"])
    (tmp_path / "other.json").write_text(annotations.read_text().replace("disc", "plate"))
    files = [part for name in ("train", "val") for part in (f"--data.{name}_annotations", str(tmp_path / "other.json"))]
    assert train(config, tmp_path, "--resume", *files) == 2
    assert 'model.classes is ["plate", "square"], but the run' in complaint(capsys)


def test_a_resumed_run_follows_its_new_options(config: Path, whole: Path, tmp_path: Path) -> None:
    copy_run(whole, tmp_path)
    new = ["--trainer.max_steps", "10", "--optimizer.lr", "0.5", "--optimizer.schedule", "constant"]
    new += ["--optimizer.weight_decay", "0.25", "--optimizer.ema_decay", "0.5", "--evaluation.every", "null"]
    assert train(config, tmp_path, "--resume", *new) == 0
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 10
    groups = state["optimizer_states"][0]["param_groups"]
    assert {group["lr"] for group in groups} == {0.5}
    assert {group["weight_decay"] for group in groups} == {0.25, 0.0}
    with open(tmp_path / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["train/lr"]) == 0.5


def test_training_starts_from_given_weights(
    config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = ["--optimizer.lr", "0", "--optimizer.ema_decay", "null", "--trainer.max_steps", "1"]
    assert train(config, tmp_path / "run", "--init", str(whole / "model.safetensors"), *still) == 0
    first, second = (load_file(run / "model.safetensors") for run in (whole, tmp_path / "run"))
    assert torch.equal(first["box.weight"], second["box.weight"])
    TinyDetector(["disc", "plate"]).save(tmp_path / "other.safetensors")
    assert train(config, tmp_path / "other", "--init", str(tmp_path / "other.safetensors"), *still) == 0
    said = capsys.readouterr().out
    assert "(TinyDetector of 2 classes)" in said
    assert "label.weight" in said  # the layer of the classes, of which one is another
    third = load_file(tmp_path / "other" / "model.safetensors")
    assert not torch.equal(third["label.weight"], load_file(tmp_path / "other.safetensors")["label.weight"])
    TinyDetector(["disc", "square"], width=3).save(tmp_path / "narrow.safetensors")
    assert train(config, tmp_path / "narrow", "--init", str(tmp_path / "narrow.safetensors")) == 2
    assert "narrow.safetensors" in complaint(capsys)


def test_nothing_is_written_before_the_data_are_known_to_be_there(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path / "run", "--data.train_annotations", "absent.json") == 2
    assert "absent.json" in complaint(capsys)
    assert train(config, tmp_path / "run", "--trainer.max_steps", "1") == 0


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("optimizer.base_batch_size", "0", "option optimizer.base_batch_size: expected a whole number above 0, got 0"),
        ("optimizer.ema_decay", "2", "option optimizer.ema_decay: expected a number from 0 to 1"),
        ("optimizer.lr", "-1", "option optimizer.lr: expected a number from 0 on, got -1"),
        ("data.batch_size", "-1", "option data.batch_size: expected a whole number above 0, got -1"),
        ("evaluation.every", "0", "option evaluation.every: expected a whole number above 0, got 0"),
        ("trainer.max_steps", "0", "option trainer.max_steps: expected a whole number above 0, got 0"),
        ("trainer.accelerator", "gpuu", "trainer.accelerator gpuu, devices auto and strategy auto do not suit this"),
        ("trainer.strategy", "alone", "strategy alone do not suit this machine: "),
        ("seed", "-1", "option seed: expected a whole number from 0 on, got -1"),
    ],
)
def test_numbers_and_machines_that_will_not_do_are_named_before_anything_is_written(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, said: str
) -> None:
    assert train(config, tmp_path / "run", f"--{option}", value) == 2
    assert said in complaint(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_missed(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, tmp_path / "run", "--trainer.accelerator", "gpu") == 2
    assert "No supported gpu backend found" in complaint(capsys)
    assert not (tmp_path / "run").exists()


def test_an_empty_data_set_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.json").write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}')
    assert train(config, tmp_path / "run", "--data.train_annotations", str(tmp_path / "empty.json")) == 2
    assert "no images" in complaint(capsys)


def test_options_that_are_null_stay_so_in_the_saved_configuration(config: Path, tmp_path: Path) -> None:
    assert train(config, tmp_path / "run", "--optimizer.grad_clip_norm", "null", "--optimizer.ema_decay", "null") == 0
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["optimizer"]["grad_clip_norm"] is None
    assert "ema_decay" in saved["optimizer"]
    assert train(tmp_path / "run/config.yaml", tmp_path / "again") == 0
    assert same_weights(tmp_path / "run", tmp_path / "again")


def test_images_without_a_single_box_are_nothing_to_learn(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = Path(yaml.safe_load(config.read_text())["data"]["train_annotations"])
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(json.loads(annotations.read_text()) | {"annotations": []}))
    assert train(config, tmp_path / "run", "--data.train_annotations", str(empty)) == 2
    assert "there is nothing to learn" in complaint(capsys)
    assert not (tmp_path / "run").exists()


def test_a_refused_resume_leaves_the_options_of_the_run(
    whole: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("kept: true")
    (run / "last.ckpt").write_bytes((whole / "last.ckpt").read_bytes()[:1000])
    assert train(config, run, "--resume") == 2
    assert "cut short" in complaint(capsys)
    assert (run / "config.yaml").read_text() == "kept: true"


def test_a_run_goes_on_with_the_data_that_it_was_begun_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny_config(tmp_path / "tiny")
    assert train(config, tmp_path / "run", "--trainer.max_steps", "1") == 0
    truth = next((tmp_path / "tiny").rglob("annotations.json"))
    whole = truth.read_text()
    content = json.loads(whole)
    content["annotations"][0]["bbox"][0] += 1
    truth.write_text(json.dumps(content))
    again = ["--trainer.max_steps", "2", "--resume"]
    assert train(config, tmp_path / "run", *again) == 2
    assert "what is in data.train_annotations has changed since the run" in complaint(capsys)
    truth.write_text(whole)
    assert train(config, tmp_path / "run", *again, "--data.batch_size", "3") == 2
    assert "data.batch_size is 3, but the run" in complaint(capsys)
    assert train(config, tmp_path / "run", *again) == 0
