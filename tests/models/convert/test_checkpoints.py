"""Foreign checkpoints are read without running what is in them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffperception.models.convert.checkpoints import read_weights


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


@pytest.mark.parametrize("part", ["", "model", "state_dict", "ema_state"])
def test_weights_are_found_wherever_they_lie(tensors, tmp_path, part):
    path = tmp_path / "a.pth"
    torch.save({part: tensors, "epoch": 3} if part else tensors, path)
    found, where, _ = read_weights(path)
    assert where == part
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_safetensors_are_read(tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    assert torch.equal(read_weights(tmp_path / "a.safetensors")[0]["a.weight"], tensors["a.weight"])


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_arrays_and_numbers_of_any_numpy_are_read(tmp_path, module):
    arrays = {f"a.{kind}": np.arange(4).astype(kind) for kind in ("float16", "float32", "float64", "int64", "bool")}
    path = tmp_path / "a.pth"
    torch.save({"model": arrays, "best": np.float64(1.5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"numpy._core.multiarray", module).replace(b"numpy.core.multiarray", module))
    found = read_weights(path)[0]
    assert all(np.array_equal(found[name].numpy(), array) for name, array in arrays.items())


def test_a_class_of_another_library_is_refused_by_its_name(tensors, tmp_path):
    torch.save({"model": tensors, "where": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"pathlib\.\S*Path"):
        read_weights(tmp_path / "a.pth")
