"""Devices, precision and processes."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diffperception.devices import autocast, first_process, gather, join_processes, pick_device, share
from tests.helpers.devices import Device


def test_the_cpu_is_picked_by_name_and_where_there_is_nothing_else() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.accelerator.is_available():
        assert pick_device() == pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "xpu:99", ""])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"there is no device '{name}' here: use cpu or auto"):
        pick_device(name)


def test_an_accelerator_that_is_picked_multiplies_in_tf32(device: Device, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("highest")
    pick_device(str(device.device))
    assert torch.get_float32_matmul_precision() == ("highest" if device.device.type == "cpu" else "high")


def test_bfloat16_is_used_where_asked_for() -> None:
    a, cpu = torch.rand(4, 4), torch.device("cpu")
    with autocast(cpu, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(cpu, "32"):
        assert (a @ a).dtype == torch.float32


def test_an_evaluation_within_a_training_has_its_precision() -> None:
    a = torch.rand(4, 4)
    with torch.autocast("cpu", torch.bfloat16), autocast(a.device, "32"):
        assert (a @ a).dtype == torch.bfloat16


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_one_process_of_several_is_the_first(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for value, first in (("0", True), ("1", False)):
        monkeypatch.setenv(variable, value)
        assert first_process() is first


def test_alone_there_is_nothing_to_share() -> None:
    with join_processes():
        assert not dist.is_initialized()
        assert list(share(range(5))) == gather(range(5)) == list(range(5))


def _two(rank: int, folder: Path, port: int) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pick_device("cpu")
    with join_processes():
        mine = [10 * item for item in share(range(5))]
        (folder / str(rank)).write_text(f"{mine} {gather(mine)}")
    assert not dist.is_initialized()


def test_two_processes_share_and_gather(tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_two, (tmp_path, port), nprocs=2, start_method="spawn")
    assert (tmp_path / "0").read_text() == "[0, 20, 40] [0, 10, 20, 30, 40]"
    assert (tmp_path / "1").read_text() == "[10, 30] [0, 10, 20, 30, 40]"
