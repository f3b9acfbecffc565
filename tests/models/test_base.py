import json

import pytest
import torch
from safetensors.torch import save_file

from diffperception.models.base import load_model, save_model
from tests.detection.scenes import tiny_detector


class Outsider(torch.nn.Linear):
    """A user's own model, outside the package."""

    def __init__(self, inputs: int):
        super().__init__(inputs, 1)
        self.arguments = {"inputs": inputs}


def test_the_file_is_weights_and_arguments(tmp_path):
    path = tmp_path / "deep" / "model.safetensors"
    model = tiny_detector(num_boxes=7)
    save_model(model, path)
    loaded = load_model(path)
    assert json.dumps(loaded.arguments) == json.dumps(model.arguments)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert not loaded.training
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_a_file_names_no_class_outside_the_package_unless_allowed(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(Outsider(3), path)
    with pytest.raises(ValueError, match="if you trust it"):
        load_model(path)
    assert isinstance(load_model(path, allow=("tests",)), Outsider)


def test_a_file_cut_in_half_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    tiny_detector().save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match=r"name the model\.safetensors in that folder"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"take the model\.safetensors beside it"):
        load_model(path.rename(tmp_path / "last.ckpt"))


def test_foreign_and_missing_files_are_named(tmp_path):
    path = tmp_path / "foreign.safetensors"
    with pytest.raises(FileNotFoundError, match=r"foreign\.safetensors"):
        load_model(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not written by diffperception"):
        load_model(path)


class Twins(torch.nn.Sequential):
    """Two layers that share their weights, which safetensors refuses to write."""

    def __init__(self):
        layer = torch.nn.Linear(2, 2)
        super().__init__(layer, layer)
        self.arguments = {}


def test_a_failure_leaves_nothing_beside(tmp_path):
    with pytest.raises(RuntimeError, match="share memory"):
        save_model(Twins(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name a file"):
        save_model(tiny_detector(), tmp_path)
    assert list(tmp_path.iterdir()) == []
