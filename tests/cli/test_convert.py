import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffperception.cli.convert import read_checkpoint
from diffperception.cli.main import main
from diffperception.detection import DiffusionDet
from tests.parity import fill_state
from tests.parity.diffusiondet import RESNET50, SMALL_HEAD, head_shapes, resnet_shapes

BIAS = "head.head_series.1.class_logits.bias"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A ResNet-50 with a small head and three classes, as the reference names it; in half precision, to write less."""
    filled = fill_state(resnet_shapes(RESNET50, width=32) | head_shapes(classes=3, **SMALL_HEAD))
    return {name: value.half() for name, value in filled.items()}


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory) -> Path:
    """What training leaves: weights, their average, and more."""
    path = tmp_path_factory.mktemp("reference") / "model_final.pth"
    average = weights | {BIAS: weights[BIAS] + 1}
    torch.save({"model": weights, "ema_state": average, "optimizer": {"lr": 0.1}, "iteration": 5}, path)
    return path


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def run(checkpoint: Path, output: Path, *options: str) -> int:
    return main(["convert", "--checkpoint", str(checkpoint), "--output", str(output), *options])


def test_a_converted_file_predicts_as_the_checkpoint(checkpoint, weights, tmp_path, capsys):
    output = tmp_path / "new" / "model.safetensors"
    assert run(checkpoint, output) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("resnet50", "3 classes (0, 1, 2)", "2 stages", " M parameters", str(output)))
    assert "--ema" in said
    assert "--annotations" in said

    converted, direct = DiffusionDet.load(output), DiffusionDet.from_reference(weights)
    assert (converted.min_size, converted.max_size) == (800, 1333)
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    found = []
    for detector in (converted, direct):
        detector.min_size = None
        found.append(detector.predict([image], steps=2, num_boxes=20)[0])
    assert len(found[0]["boxes"]) > 0
    assert all(torch.equal(found[0][key], found[1][key]) for key in ("boxes", "scores", "labels"))


def test_averaged_weights_and_names_of_classes(checkpoint, weights, tmp_path, capsys):
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 9, "name": "owl"}]
    annotations = tmp_path / "coco.json"
    annotations.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    output = tmp_path / "model.safetensors"
    assert run(checkpoint, output, "--ema", "--annotations", str(annotations)) == 0
    detector = DiffusionDet.load(output)
    assert detector.classes == ["dog", "cat", "owl"]
    assert torch.equal(detector.head.stages[1].class_logits.bias, (weights[BIAS] + 1).float())
    assert "--annotations" not in capsys.readouterr().out


def test_a_file_is_replaced_only_when_asked(checkpoint, tmp_path, capsys):
    output = tmp_path / "model.safetensors"
    output.write_text("mine")
    assert run(checkpoint, output) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine"


@pytest.mark.parametrize("part", ["", "model", "state_dict", "ema_state"])
def test_weights_are_found_wherever_they_lie(tensors, tmp_path, part):
    path = tmp_path / "a.pth"
    torch.save({part: tensors, "epoch": 3} if part else tensors, path)
    found, where, _ = read_checkpoint(path)
    assert where == part
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_safetensors_are_read(tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "a.safetensors")[0]["a.weight"], tensors["a.weight"])


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_arrays_and_numbers_of_any_numpy_are_read(tmp_path, module):
    arrays = {f"a.{kind}": np.arange(4).astype(kind) for kind in ("float16", "float32", "float64", "int64", "bool")}
    path = tmp_path / "a.pth"
    torch.save({"model": arrays, "best": np.float64(1.5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"numpy._core.multiarray", module).replace(b"numpy.core.multiarray", module))
    found = read_checkpoint(path)[0]
    assert all(np.array_equal(found[name].numpy(), array) for name, array in arrays.items())


class Harmful:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("wrap", [lambda harm: harm, lambda harm: np.array([harm], dtype=object)])
@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_that_would_run_code_is_refused(tensors, tmp_path, capsys, wrap, new_format):
    harm = tmp_path / "harm"
    path = tmp_path / "a.pth"
    torch.save({"model": tensors, "x": wrap(Harmful(harm))}, path, _use_new_zipfile_serialization=new_format)
    assert run(path, tmp_path / "model.safetensors") == 2
    error = capsys.readouterr().err
    assert "could run code" in error
    assert error.count("\n") == 1
    assert not harm.exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_class_of_another_library_is_refused_by_its_name(tensors, tmp_path):
    torch.save({"model": tensors, "where": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"pathlib\.\S*Path"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_damaged_files_are_one_sentence(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name, tmp_path / "model.safetensors") == 2
    error = capsys.readouterr().err
    assert "damaged, or of another format" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        ({"model": {"a": torch.ones(1)}}, ["--ema"], "no averaged weights"),
        ({"epoch": 1, "a": torch.ones(1)}, [], "something else than tensors beside its weights (epoch)"),
        ([torch.ones(1)], [], "holds no weights"),
        ({"a": torch.ones(1)}, [], "no checkpoint of the reference DiffusionDet"),
    ],
)
def test_files_without_weights_are_refused(tmp_path, capsys, content, options, complaint):
    torch.save(content, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "model.safetensors", *options) == 2
    assert complaint in capsys.readouterr().err


def test_the_script_is_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert.py", "--checkpoint", str(tmp_path / "no.pth"), "--output", "x"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(Path(__file__).parents[2] / "tools" / "convert.py"), run_name="__main__")
    assert "there is no checkpoint" in capsys.readouterr().err
