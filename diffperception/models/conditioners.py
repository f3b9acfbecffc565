"""What makes a condition of an image's class or caption."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffperception.models.base import Model
from diffperception.models.condition import Condition

Said = Any  # of a batch, as one kind of conditioner reads it: labels (B,), or a list of texts


class Conditioner(Model, ABC):
    """Makes a :class:`Condition`; its weights are trained with the denoiser."""

    has_absent: bool = False  # whether there is a value for nothing being said, as classifier-free guidance needs
    token_width: int | None = None  # D of the tokens that it makes, where that is known
    vector_width: int | None = None  # E of the vector that it makes, where that is known

    @abstractmethod
    def forward(self, said: Said) -> Condition:
        """The condition of a batch of B samples."""

    @abstractmethod
    def read(self, targets: Sequence[Mapping[str, Any]]) -> Said:
        """What the targets of a batch say; ValueError if they lack it."""

    def prepare(self, captions: Sequence[str] | None) -> None:
        """Take note, before a training, of the captions of its images; ValueError if these are none of its concern."""
        if captions is not None:
            raise ValueError(
                f"the images have captions, but a {type(self).__name__} reads none: leave data.captions out, or set"
                " model.conditioner to one that does, such as TextConditioner"
            )

    @abstractmethod
    def absent(self, batch: int) -> Said:
        """What stands for nothing being said of B samples."""

    @abstractmethod
    def drop(self, said: Said, dropped: Tensor) -> Said:
        """What was said, but nothing of the samples that ``dropped`` (B,) bool, on the CPU, names."""

    def told(self, prompt: str | Path | Mapping[str, Tensor], network: nn.Module) -> "Conditioner":
        """One that says this beside, to a network that attends to words; ValueError if it cannot."""
        raise ValueError("this generator attends to no words: leave the prompt out")

    @abstractmethod
    def choose(self, names: Sequence[str] | None, numbers: Sequence[int]) -> Said:
        """What is said of samples of these numbers if a user wants these classes or texts, by default all, in turn.

        ValueError for one that it does not know.
        """


class ClassLabels(Conditioner):
    """An embedding per class, as in ADM (arXiv 2105.05233); what is said are labels (B,) int64, 0..K-1.

    Args:
        classes: names of the K labels.
        channels: E, the length of an embedding, which is the network's.
        null_class: there is one more label, K, that stands for none, as classifier-free guidance needs.
    """

    class_layers: ClassVar = {"embedding": 0}

    def __init__(self, classes: Sequence[str], channels: int, null_class: bool = False) -> None:
        super().__init__()
        self.classes = list(classes)
        self.has_absent, self.vector_width = null_class, channels
        self.embedding = nn.Embedding(len(self.classes) + null_class, channels)

    def forward(self, said: Tensor) -> Condition:
        return Condition(vector=self.embedding(said.to(self.embedding.weight.device)))

    def read(self, targets: Sequence[Mapping[str, Any]]) -> Tensor:
        labels = [target.get("label") for target in targets]
        if None in labels:
            raise ValueError("the images have no labels, which this model learns from: set data.labelled to true")
        return torch.tensor(labels)

    def absent(self, batch: int) -> Tensor:
        return torch.full((batch,), len(self.classes))

    def drop(self, said: Tensor, dropped: Tensor) -> Tensor:
        return torch.where(dropped.to(said.device), len(self.classes), said)

    def choose(self, names: Sequence[str] | None, numbers: Sequence[int]) -> Tensor:
        return labels_in_turn(self.classes, names, numbers)


def labels_in_turn(classes: Sequence[str], names: Sequence[str] | None, numbers: Sequence[int]) -> Tensor:
    """The labels (B,) of samples of these numbers, as :meth:`Conditioner.choose` says."""
    unknown = [name for name in names or [] if name not in classes]
    if unknown:
        raise ValueError(f"there is no class {unknown[0]}: the generator knows {', '.join(classes)}")
    labels = torch.tensor([classes.index(name) for name in names or classes])
    return labels[torch.tensor(list(numbers)) % len(labels)]
