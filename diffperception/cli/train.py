"""`diffperception train`: its options and their help are those of the recipe that `task` names."""

from collections.abc import Sequence

from diffperception.training.configured import train_by_arguments


def train(arguments: Sequence[str]) -> int:
    """Train a detector, a generator of images, the classifier that guides it, or a segmenter."""
    outcome = train_by_arguments(arguments, require_output=True)
    return 0 if outcome.signal is None else 128 + outcome.signal
