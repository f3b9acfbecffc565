import pytest
from gaussian_mixture import Mixture


@pytest.fixture
def mixture() -> Mixture:
    return Mixture()
