"""What a denoiser is told beside the noisy sample and its time."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Condition:
    """What a denoiser is told: five slots, any of them empty; a network says which it reads."""

    vector: Tensor | None = None  # (B, E) added to the time's embedding, such as a class's
    tokens: Tensor | None = None  # (B, L, D) a sequence to attend to, such as a text's
    mask: Tensor | None = None  # (B, L) bool, which of the tokens count; all by default
    labels: Tensor | None = None  # (B,) int64, classes that a network embeds itself
    maps: Tensor | None = None  # (B, C, h, w) beside the sample, such as a small image that is to be enlarged

    def expand(self, batch: int) -> "Condition":
        """The condition of a single sample for each of a batch; one of the batch's size stays as it is."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return Condition(**{name: value.expand(batch, *value.shape[1:]) for name, value in given.items()})
