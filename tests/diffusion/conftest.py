import pytest

from tests.diffusion.gaussian_mixture import Mixture


@pytest.fixture
def mixture() -> Mixture:
    return Mixture()
