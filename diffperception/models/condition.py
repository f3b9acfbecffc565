"""What a denoiser is told beside the noisy sample and its time."""

from dataclasses import dataclass, fields, replace

from torch import Tensor


@dataclass
class Condition:
    """Four slots, any of them empty; a network says which it reads.

    Attributes:
        vector: (B, E) added to the time's embedding, such as a class's.
        tokens: (B, L, D) a sequence to attend to, such as a text's.
        mask: (B, L) bool, which of the tokens count; all by default.
        maps: (B, C, h, w) beside the sample, such as a small image that is to be enlarged.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    maps: Tensor | None = None

    def expand(self, batch: int) -> "Condition":
        """The condition of a single sample for each of a batch; one of the batch's size stays as it is."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.expand(batch, *v.shape[1:]) for k, v in given.items() if v is not None})
