"""A training step whose loss has a teacher: runs resume, the teacher stays as it is, and what does not fit is said."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffperception.detection import FCOS
from diffperception.training.options import OptimizerOptions
from diffperception.training.recipes.detection import DistillationModule, Teacher
from tests.detection.scenes import CLASSES, random_image, random_target, tiny_detector
from tests.helpers.runs import assert_not_resumed, assert_same_run, complaint, fixtures_of, logged, train
from tests.training.tiny_data import write_tiny_config
from tests.training.tiny_detector import PowerCut, UnpluggedDiffusionDet

config, _ = fixtures_of(write_tiny_config)
BATCH = (
    [random_image(64, 96, 1), random_image(64, 96, 2)],
    [random_target(2, 64, 96, seed) | {"image_id": seed} for seed in range(2)],
)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run that a small teacher takes part in."""
    teacher = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(3)
    UnpluggedDiffusionDet(["square", "disc"]).save(teacher)
    return [
        *("--model", "tests.training.tiny_detector.UnpluggedDiffusionDet", "--trainer.max_steps", "5"),
        *("--evaluation.every", "2", "--evaluation.num_pictures", "0", "--trust", "tests"),
        *("--module", "DistillationModule", "--module.teacher", str(teacher), "--module.steps", "2"),
    ]


def test_a_run_with_a_teacher_resumes_bit_for_bit(
    config: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path / "whole", *options) == 0
    with pytest.raises(PowerCut):
        train(config, tmp_path / "stopped", *options, "--model.die_at", "5")
    assert train(config, tmp_path / "stopped", *options, "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert all(float(row["train/loss_distillation"]) > 0 for row in logged(tmp_path / "whole") if row["train/loss"])
    saved = torch.load(tmp_path / "whole/last.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if "teacher" in name]
    other = tmp_path / "other.safetensors"
    UnpluggedDiffusionDet(["square", "disc"]).save(other)
    (tmp_path / "copy").mkdir()
    capsys.readouterr()
    changed = [str(other) if word.endswith("teacher.safetensors") else word for word in options]
    said = "what is in module.teacher has changed since"
    assert_not_resumed(config, tmp_path / "whole", tmp_path / "copy", changed, said, capsys)


def module(path: Path, weight: float = 6.0, **changes: object) -> DistillationModule:
    if not path.exists():
        tiny_detector(seed=1).save(path)
    student = tiny_detector(noise_draws=2).train()
    return DistillationModule(student, OptimizerOptions(), 0, path, weight=weight, **changes)


def test_the_teacher_stays_as_it_is(tmp_path: Path) -> None:
    task = module(tmp_path / "teacher.safetensors", steps=4)
    loss = task.loss_terms(BATCH, torch.Generator().manual_seed(0))
    torch.stack(list(loss.values())).sum().backward()
    teacher = task.teacher.detector
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    before = load_file(tmp_path / "teacher.safetensors")
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert any(p.grad is not None for p in task.model.parameters())
    assert {id(p) for p in task.parameters()} == {id(p) for p in task.model.parameters()}


def test_without_weight_it_is_training_without_a_teacher(tmp_path: Path) -> None:
    light, heavy = (module(tmp_path / "teacher.safetensors", weight) for weight in (0.0, 3.0))
    first, second = (task.loss_terms(BATCH, torch.Generator().manual_seed(0)) for task in (light, heavy))
    assert first["distillation"] == 0 < second["distillation"]
    assert all(torch.equal(first[name], second[name]) for name in ("classification", "l1", "giou"))


def test_detections_are_those_of_the_teacher_with_its_steps_and_the_students_labels(tmp_path: Path) -> None:
    tiny_detector(seed=1, classes=["star", "circle", "square"]).save(tmp_path / "teacher.safetensors")
    teacher = module(tmp_path / "teacher.safetensors", steps=3, num_boxes=7).teacher
    found = teacher(BATCH[0], torch.Generator().manual_seed(2))
    seeds = torch.randint(1 << 31, (2,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = teacher.detector.predict(BATCH[0], seeds, steps=3, num_boxes=7)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a["boxes"], b["boxes"])
        assert torch.equal(a["scores"], b["scores"])
        assert [CLASSES[n] for n in a["labels"]] == [teacher.detector.classes[n] for n in b["labels"]]
    assert len(found[0]["boxes"])


def test_any_detector_teaches(tmp_path: Path) -> None:
    fcos = FCOS(CLASSES, "test_resnet", width=64, min_size=None)
    fcos.save(tmp_path / "fcos.safetensors")
    task = module(tmp_path / "fcos.safetensors")
    assert task.loss_terms(BATCH, torch.Generator().manual_seed(0))["distillation"].isfinite()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--module.teacher", "absent.safetensors"], "absent.safetensors"),
        (["--model", "tests.training.tiny_detector.TinyDetector"], "TinyDetector takes no steps that a teacher could"),
        (["--module.steps", "0"], "option module.steps: expected a whole number above 0"),
        (["--module", "DistillationModule"], "teacher"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    config: Path,
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: list[str],
    said: str,
) -> None:
    given = options[: options.index("--module")] if wrong[0] == "--module" else options
    assert train(config, tmp_path, *given, *wrong) == 2
    assert said in complaint(capsys)
    assert not list(tmp_path.iterdir())


def test_a_teacher_of_other_classes_is_refused(config: Path, options: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 3 classes \(circle, square, star\), but 2 are learned \(a, b\)"):
        Teacher(tiny_detector(), ["a", "b"], tmp_path, None, None)
