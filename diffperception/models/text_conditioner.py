"""What makes a condition of a text."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from diffperception.devices import to_device
from diffperception.models.condition import Condition
from diffperception.models.conditioners import Conditioner
from diffperception.models.text import TextEncoder, vocabulary_of, words_of
from diffperception.models.unet.blocks import zeroed

SPECIAL = ("<padding>", "<start>", "<end>", "<unknown>")  # the first tokens, before those of words
EXAMPLES = 36  # captions that a model shows where nothing else is asked for
SHOWN = 12  # words of a vocabulary in a message


class TextReader(Conditioner):
    """Reads texts; what is said are the texts of B samples, empty ones where nothing is said of one.

    Args:
        width: D of a token.
        pooled: E, the length of a vector of the whole text, which is added to the time's embedding; None for none.
        prompt: what is said where nothing is.
        examples: texts that are drawn where none are asked for.
    """

    has_absent = True

    def __init__(self, width: int, pooled: int | None = None, prompt: str = "", examples: Sequence[str] = ()) -> None:
        super().__init__()
        self.token_width, self.vector_width = width, pooled
        self.pooled = None if pooled is None else zeroed(nn.Linear(width, pooled))
        self.prompt, self.examples = prompt, list(examples)

    def read(self, targets: Sequence[Mapping[str, Any]]) -> list[str]:
        captions = [target.get("caption") for target in targets]
        if None in captions:
            raise ValueError("the images have no captions, which this model learns from: name them with data.captions")
        return [str(caption) for caption in captions]

    def prepare(self, captions: Sequence[str] | None) -> None:
        if captions is None:
            raise ValueError("this model learns from captions, and there are none: name them with data.captions")
        if not self.examples:
            different = list(dict.fromkeys(captions))
            self.examples = different[:: max(1, len(different) // EXAMPLES)][:EXAMPLES]
            self.record(examples=self.examples)

    def absent(self, batch: int) -> list[str]:
        return [""] * batch

    def drop(self, said: Sequence[str], dropped: Tensor) -> list[str]:
        return ["" if gone else text for text, gone in zip(said, dropped.tolist(), strict=True)]

    def choose(self, names: Sequence[str] | None, numbers: Sequence[int]) -> list[str]:
        texts = list(names or self.examples or [""])
        for text in texts:
            self.require_known(text)
        return [texts[number % len(texts)] for number in numbers]

    def told(self, prompt: str | Path | Mapping[str, Tensor], network: nn.Module) -> Self:
        if isinstance(prompt, Mapping) or Path(prompt).suffix == ".safetensors":
            raise ValueError(f"a {type(self).__name__} makes tokens of texts itself: give the prompt as a text")
        self.require_known(text := str(prompt))
        told = type(self)(**self.arguments | {"prompt": text})
        told.load_state_dict(self.state_dict())
        return told.to(self.device)

    def condition(self, tokens: Tensor, mask: Tensor) -> Condition:
        """Of tokens (B, L, D), of which a mask (B, L) counts some."""
        if self.pooled is None:
            return Condition(tokens=tokens, mask=mask)
        counted = mask[..., None].to(tokens.dtype)
        return Condition(self.pooled((tokens * counted).sum(1) / counted.sum(1)), tokens, mask)

    @abstractmethod
    def require_known(self, text: str) -> None:
        """ValueError naming what the model has not learned of a text that a user wants."""


class TextConditioner(TextReader):
    """Texts by words of its own vocabulary and a small transformer, which are learned with the network.

    The network attends to a token per word, with one at the start and one at the end of each text.

    Args:
        vocabulary: the words that it knows, sorted; by default, in training, those of the captions.
        width: D of a token, which the network has as its context.
        depth: layers of the transformer.
        num_heads: heads of its attention.
        length: tokens of a text at most; by default, in training, those of the longest caption.
        pooled: E, the length of a vector of the whole text, which is added to the time's embedding and as long as
            that; None for none.
        min_count: words that occur less often in the captions are not learned.
        prompt: what is said where nothing is.
        examples: texts that are drawn where none are asked for; by default, in training, some of the captions.
    """

    class_layers: ClassVar = {"encoder.embedding": 0}
    encoder: TextEncoder

    def __init__(
        self,
        vocabulary: Sequence[str] | None = None,
        width: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        length: int | None = None,
        pooled: int | None = None,
        min_count: int = 1,
        prompt: str = "",
        examples: Sequence[str] = (),
    ) -> None:
        if width < 1 or num_heads < 1 or width % num_heads:
            raise ValueError(f"the width {width} of a text's tokens cannot be split evenly by num_heads = {num_heads}")
        if length is not None and length < 3:
            raise ValueError(f"length must be 3 or more, for a word between start and end, not {length}")
        super().__init__(width, pooled, prompt, examples)
        self.layout = (width, depth, num_heads)
        self.length, self.min_count = length, min_count
        self._know(vocabulary or (), length or 3)

    def _know(self, vocabulary: Sequence[str], length: int) -> None:
        """Take these words for all there are."""
        self.vocabulary = list(vocabulary)
        self.classes = [*SPECIAL, *vocabulary]  # the rows of the embedding, by which weights of other files go
        self.number = {word: index for index, word in enumerate(self.classes)}
        self.encoder = TextEncoder(len(self.classes), *self.layout, length).to(self.device)

    def prepare(self, captions: Sequence[str] | None) -> None:
        super().prepare(captions)
        if self.vocabulary or captions is None:
            return
        words, longest = vocabulary_of(captions, self.min_count)
        if not words:
            raise ValueError(f"no word occurs {self.min_count} times in the captions: set min_count lower")
        self.length = self.length or longest + 2
        self._know(words, self.length)
        self.record(vocabulary=words, length=self.length)

    def forward(self, said: Sequence[str]) -> Condition:
        ids = to_device(torch.tensor([self._ids(text or self.prompt) for text in said], device="cpu"), self.device)
        mask = ids != 0
        return self.condition(self.encoder(ids, mask), mask)

    def _ids(self, text: str) -> list[int]:
        """The tokens of a text, cut and padded to the length."""
        length = self.length or 3
        unknown = self.number["<unknown>"]
        words = [self.number.get(word, unknown) for word in words_of(text)][: length - 2]
        ids = [self.number["<start>"], *words, self.number["<end>"]]
        return ids + [self.number["<padding>"]] * (length - len(ids))

    def require_known(self, text: str) -> None:
        words = words_of(text)
        unknown = [word for word in words if word not in self.number]
        if unknown:
            few = ", ".join(self.vocabulary[:SHOWN]) + (", ..." if len(self.vocabulary) > SHOWN else "")
            raise ValueError(
                f"the word {unknown[0]!r} of the prompt {text!r} is not known: the generator knows the"
                f" {len(self.vocabulary)} words of the captions that it learned from alone ({few})"
            )
        if self.length is not None and len(words) > self.length - 2:
            raise ValueError(
                f"the prompt {text!r} has {len(words)} words, but the generator reads {self.length - 2}: shorten it"
            )
