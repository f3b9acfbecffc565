"""What a user is told where a neighbour is not installed."""

import pytest

from diffperception.cli.failures import MISTAKE, failure
from diffperception.doctor import require_installed


def test_an_absent_library_ends_in_the_command_that_installs_it():
    with pytest.raises(ImportError) as caught:
        require_installed("nosuchlibrary", "reading its folders", "pip install nosuchlibrary")
    text, code = failure(caught.value, "train")
    assert code == MISTAKE
    assert text == "reading its folders needs nosuchlibrary, which is not installed: `pip install nosuchlibrary`"


def test_a_library_that_is_there_is_passed_over():
    require_installed("torch", "anything", "pip install torch")
