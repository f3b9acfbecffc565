"""Foreign checkpoints are read without running what is in them, whatever is wrapped around their weights."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from diffperception.models.convert.checkpoints import complaints, read_weights, state_of


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def same(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("part", ["", "model", "state_dict", "ema_state"])
def test_weights_are_found_wherever_they_lie(tensors, tmp_path, part):
    path = tmp_path / "a.pth"
    torch.save({part: tensors, "epoch": 3} if part else tensors, path)
    found = read_weights(path)
    assert found.place == part
    assert same(found.state, tensors)


OPTIMIZER = {"state": {0: {"step": torch.ones(1), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: prefixed(state, "module."),
        lambda state: {"state_dict": prefixed(state, "model."), "optimizer_states": [OPTIMIZER], "loops": {}},
        lambda state: {"model": prefixed(state, "module._orig_mod.")},
        lambda state: {"state_dict": {"model": prefixed(state, "_orig_mod.model.module."), "step": torch.ones(1)}},
        lambda state: {"optimizer": OPTIMIZER, "network": {"state_dict": state}, "rng_state": torch.ones(4)},
        lambda state: {"state_dict": prefixed(state, "net."), "args": argparse.Namespace(model="resnet18")},
        lambda state: {"state_dict": prefixed(state, "model.") | {"loss.table": torch.ones(1)}},
        lambda state: {"generator": state, "epoch": 1},
        lambda state: {"model": state, "model_ema": {name: value + 1 for name, value in state.items()}},
        lambda state: prefixed(state, "model.") | prefixed({n: v + 1 for n, v in state.items()}, "model_ema."),
        lambda state: state | prefixed({name: value + 1 for name, value in state.items()}, "ema_model."),
    ],
)
def test_what_programs_wrap_around_weights_comes_off(tensors, tmp_path, wrap):
    torch.save(wrap(tensors), tmp_path / "a.pth")
    assert same(state_of(tmp_path / "a.pth"), tensors)


def test_wrappers_within_a_network_come_off_too(tmp_path):
    torch.save({"backbone._orig_mod.a": torch.ones(1), "head.module.b": torch.ones(2)}, tmp_path / "a.pth")
    assert list(state_of(tmp_path / "a.pth")) == ["backbone.a", "head.b"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state, average: {"state_dict": state, "state_dict_ema": average},
        lambda state, average: {"model": state, "ema": {"ema_model": prefixed(average, "module."), "decay": 0.9}},
        lambda state, average: {"model": prefixed(state, "model.") | prefixed(average, "ema_model.")},
        lambda state, average: {"ema": prefixed(average, "ema_model.") | prefixed(state, "online_model.")},
    ],
)
def test_averaged_weights_are_taken_when_asked_for(tensors, tmp_path, wrap):
    average = {name: value + 1 for name, value in tensors.items()}
    torch.save(wrap(tensors, average), tmp_path / "a.pth")
    assert same(read_weights(tmp_path / "a.pth", ema=True).state, average)


def test_an_averaged_model_of_torch_is_read_and_its_counter_left_out(tmp_path):
    network = torch.nn.Linear(2, 3)
    torch.save(AveragedModel(network).state_dict(), tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth")
    assert same(found.state, network.state_dict())
    assert found.left_out == ["n_averaged"]


def test_several_networks_are_not_guessed_among(tensors, tmp_path):
    torch.save({"generator": tensors, "discriminator": tensors}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"several networks \(generator, discriminator\)"):
        read_weights(tmp_path / "a.pth")


def test_safetensors_are_read(tensors, tmp_path):
    save_file(prefixed(tensors, "module."), tmp_path / "a.safetensors")
    assert same(state_of(tmp_path / "a.safetensors"), tensors)
    (tmp_path / "a.safetensors").rename(tmp_path / "a.bin")  # the content counts
    assert same(state_of(tmp_path / "a.bin"), tensors)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_arrays_are_read_as_detectron2_keeps_them(tensors, tmp_path, protocol):
    arrays = {name: value.numpy() for name, value in tensors.items()}
    content = {"model": arrays, "__author__": "somebody", "matching_heuristics": True}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    assert same(state_of(tmp_path / "a.pkl"), tensors)


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_arrays_and_numbers_of_any_numpy_are_read(tmp_path, module):
    arrays = {f"a.{kind}": np.arange(4).astype(kind) for kind in ("float16", "float32", "float64", "int64", "bool")}
    path = tmp_path / "a.pth"
    torch.save({"model": arrays, "best": np.float64(1.5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"numpy._core.multiarray", module).replace(b"numpy.core.multiarray", module))
    found = state_of(path)
    assert all(np.array_equal(found[name].numpy(), array) for name, array in arrays.items())


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_class_of_another_library_is_refused_by_its_name(tmp_path, write):
    write({"model": {"a": np.ones(3)}, "where": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"pathlib\.\S*Path\), and reading that could run code"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer to it: `git lfs pull`"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x00\x01 noise", "is damaged"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(tmp_path, content, complaint):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        read_weights(tmp_path / "a.pth")


def test_a_folder_is_called_what_it_is(tmp_path):
    with pytest.raises(ValueError, match="is a folder, with no checkpoint in it: name the file"):
        read_weights(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(ValueError, match="is a folder of diffusers"):
        read_weights(tmp_path)


def test_complaints_name_a_few_and_count_the_others():
    said = complaints({}, {f"w{n}": (1,) for n in range(9)})
    assert said == "9 names are missing: w0, w1, w2, w3, w4, w5, and 3 more."
