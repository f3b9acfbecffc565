"""What a task gives to be trained; `run` does the rest, for all tasks alike."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from diffperception.files import OutputFolder
from diffperception.training.data import TrainingData
from diffperception.training.module import TrainingModule

Metrics = dict[str, float]  # the most telling first


class Evaluator:
    """Looks at a model during training and after it. Every process calls both methods, with the same weights."""

    every: int | None = None  # steps between evaluations; None for none during training
    last = False  # whether `evaluate` is called after the last step too: `finish` sees only the averaged weights

    def evaluate(self, averaged: Any, raw: Any, step: int, folder: OutputFolder | None) -> Metrics:
        """Metrics during the training.

        Args:
            averaged: the model with averaged weights; `raw` itself where no average is kept.
            raw: the model in training, whose mode is restored afterwards.
            folder: the run's, for pictures; None where nothing is to be written.
        """
        return {}

    def finish(self, model: Any, folder: OutputFolder | None) -> Metrics:
        """The final metrics of the trained model, which is in evaluation mode and in float32.

        The first process has the folder to write to, if there is one.
        """
        return {}


@dataclass
class Parts:
    """What a run is made of: the training step, which holds the model; the batches it is given; and what looks at the
    model. The summary is a sentence on what learns what from how much; notes are to be said before, a sentence each.
    """

    module: TrainingModule
    data: TrainingData
    evaluator: Evaluator = field(default_factory=Evaluator)
    summary: str = ""
    notes: Sequence[str] = ()


class Recipe(ABC):
    """A task of training. Its constructor's arguments are the keys of a configuration; they are only kept there.

    Attributes:
        task: the name that a configuration calls it by.
        files: what each file is that a run leaves beside what all runs leave, by name; folders end in a slash.
        example: a configuration that is shipped, for the help; empty if there is none.
        lasting: dotted names of options that a resumed run must have as it was begun, for they decide what its state
            means.
        init: the file whose weights training starts from, where they fit; None for none, as of tasks without it.
    """

    task: ClassVar[str]
    files: ClassVar[Mapping[str, str]] = {}
    example: ClassVar[str] = ""
    lasting: ClassVar[tuple[str, ...]] = ()
    init: Path | None = None

    @abstractmethod
    def prepare(self, seed: int) -> Parts:
        """Read the data and build the model, whose random weights come from torch's generator, which is seeded.

        Raises:
            ValueError, OSError: data or model are not sound; nothing has been written yet.
        """


def size_of(model: nn.Module) -> str:
    """Such as `DiffusionDet with 110.6 M parameters`."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__} with {parameters / 1e6:.1f} M parameters"
