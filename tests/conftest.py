from collections.abc import Iterator

import pytest
import torch

from tests.helpers.devices import Device
from tests.helpers.simulated_gpu import SimulatedGPU

GPU = [pytest.param("cuda:0", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped elsewhere")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; this machine has none")


@pytest.fixture(params=["cpu", "simulated", *GPU])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Each device to compute on; fails a test that mixed devices, as CUDA would."""
    if request.param != "simulated":
        yield Device(request.param)
        return
    with SimulatedGPU() as gpu:
        yield gpu
    assert not gpu.mixes, "CUDA refuses these:\n" + "\n".join(map(str, gpu.mixes))
