"""What a network of diffusers is told: the embedding of one prompt for all images, and classes."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffperception.doctor import require_installed
from diffperception.models import Condition, Conditioner
from diffperception.models.base import require_not_named_by_a_file
from diffperception.models.conditioners import labels_in_turn
from diffperception.models.convert.unet2d import read_object

WORDS = 77  # of a prompt about which nothing is said, as CLIP has them
MASK = "prompt_attention_mask"
ENCODERS = {"CLIPTextModel": 77, "CLIPTextModelWithProjection": 77, "T5EncoderModel": 120}  # and words at most
OF_SEVERAL = ("SD3Transformer2DModel", "FluxTransformer2DModel")  # networks told what several encoders make, mixed


class Prompt(Conditioner):
    """The same words for all images, as embedded, and the classes that a network embeds itself.

    What is said are labels (B,) int64; -1 where there are no classes.

    Args:
        classes: names of the network's classes, if it has some.
        null_class: it has one more, for none of them.
        words: L and D of the words' embeddings (L, D), for a network that attends to words; zeros at first.
        vector: E of the whole prompt's embedding (E,), for a network that is told one; zeros at first.
        masked: not all words count.
        text: the words, where they are known.
    """

    tokens: Tensor | None  # (1, L, D)
    vector: Tensor | None  # (1, E)
    mask: Tensor | None  # (1, L) bool

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        null_class: bool = False,
        words: Sequence[int] | None = None,
        vector: int | None = None,
        masked: bool = False,
        text: str | None = None,
    ) -> None:
        super().__init__()
        self.classes, self.text = list(classes or []), text
        self.has_absent = null_class or not self.classes
        self.register_buffer("tokens", None if words is None else torch.zeros(1, *words))
        self.register_buffer("vector", None if vector is None else torch.zeros(1, vector))
        self.register_buffer("mask", torch.ones(1, words[0], dtype=torch.bool) if masked and words else None)

    def forward(self, said: Tensor) -> Condition:
        if not self.classes and not torch.compiler.is_compiling() and bool((said >= 0).any()):
            raise ValueError("This model was trained without classes: leave labels out.")
        everywhere = Condition(vector=self.vector, tokens=self.tokens, mask=self.mask).expand(len(said))
        everywhere.labels = said if self.classes else None
        return everywhere

    def told(self, prompt: str | Path | Mapping[str, Tensor], network: Any) -> "Prompt":
        """One that says this instead.

        Args:
            prompt: a .safetensors file, or tensors, named as diffusers' pipelines name them: `prompt_embeds` (L, D),
                and where there are such `pooled_prompt_embeds` (E,) and `prompt_attention_mask` (L,); or a text, which
                the folder's own encoder embeds.
            network: that will be told.

        Raises:
            FileNotFoundError: there is no such file.
            ImportError: transformers, which embeds texts, is not installed.
            ValueError: the network attends to no words or to others, or the folder has no encoder that we run.
        """
        if self.tokens is None:
            raise ValueError(f"a {network.architecture} attends to no words: leave the prompt out")
        require_not_named_by_a_file("of a prompt" if isinstance(prompt, Mapping) else prompt)
        text = None
        if isinstance(prompt, Mapping):
            found = dict(prompt)
        elif Path(prompt).suffix == ".safetensors":
            found = _read(Path(prompt))
        else:
            text = str(prompt)
            found = embed(text, network)
        words, vector, mask = _checked(found, network, prompt if isinstance(prompt, str | Path) else "the prompt")
        width = None if self.vector is None else self.vector.shape[1] if vector is None else vector.shape[1]
        told = Prompt(self.classes, self.has_absent, list(words.shape[1:]), width, mask is not None, text)
        for name, value in (("tokens", words), ("vector", vector), ("mask", mask)):
            if value is not None:
                getattr(told, name).copy_(value)
        return told.to(self.tokens.device)

    def read(self, targets: Sequence[Mapping[str, Any]]) -> Tensor:
        return torch.tensor([target.get("label", len(self.classes)) for target in targets])

    def absent(self, batch: int) -> Tensor:
        return torch.full((batch,), len(self.classes) or -1)

    def drop(self, said: Tensor, dropped: Tensor) -> Tensor:
        return torch.where(dropped.to(said.device), len(self.classes), said)

    def choose(self, names: Sequence[str] | None, numbers: Sequence[int]) -> Tensor:
        return labels_in_turn(self.classes, names, numbers) if self.classes else self.absent(len(numbers))


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors in a file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with a prompt's embedding")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): write it again") from None


def _checked(
    found: Mapping[str, Tensor], network: Any, what: str | Path
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Words (1, L, D), vector (1, E) and mask (1, L); ValueError if they do not suit the network."""
    if "prompt_embeds" not in found:
        raise ValueError(f"{what} has no tensor prompt_embeds (words, width), but {', '.join(found) or 'none'}")
    words, vector, mask = (found.get(f"{name}") for name in ("prompt_embeds", "pooled_prompt_embeds", MASK))
    words = words[None] if words is not None and words.ndim == 2 else words
    if words is None or words.ndim != 3 or len(words) != 1 or words.shape[2] != network.word_width:
        given = None if words is None else tuple(words.shape)
        raise ValueError(
            f"{what}: prompt_embeds is {given}, but this {network.architecture} takes words {network.word_width} wide:"
            f" (words, {network.word_width})"
        )
    if not all(value is None or value.isfinite().all() for value in (words, vector)):
        raise ValueError(f"{what}: not all numbers are finite: embed the prompt again, in float32")
    if not network.vector_widths:
        vector = None
    elif vector is not None and vector.numel() not in network.vector_widths:
        raise ValueError(
            f"{what}: pooled_prompt_embeds has {vector.numel()} numbers, but this {network.architecture} takes"
            f" {' or '.join(map(str, network.vector_widths))}"
        )
    if mask is not None and mask.numel() != words.shape[1]:
        raise ValueError(f"{what}: {MASK} has {mask.numel()} numbers for {words.shape[1]} words")
    pooled = None if vector is None else vector.reshape(1, -1)
    return words, pooled, None if mask is None else mask.reshape(1, -1).bool()


def embed(text: str, network: Any) -> dict[str, Tensor]:
    """A text as the encoders beside a network embed it: one of CLIP or of T5, or SDXL's two.

    Raises:
        ImportError: transformers is not installed.
        ValueError: there are no encoders, or such as are not run here.
    """
    way = "give the embedding as a .safetensors file with prompt_embeds, as encode_prompt of its pipeline makes it"
    home = None if network.origin is None else Path(network.origin.place)
    parts = sorted(path.name for path in home.glob("text_encoder*")) if home else []
    if home is None or not parts:
        raise ValueError(f"there is no text encoder beside this {network.architecture} to embed {text!r}: {way}")
    kinds = [(read_object(home / part / "config.json").get("architectures") or ["?"])[0] for part in parts]
    if network.architecture in OF_SEVERAL or any(kind not in ENCODERS for kind in kinds):
        raise ValueError(f"the text encoders in {home} ({', '.join(kinds)}) are not run here: {way}")
    require_installed("transformers", f"the embedding of {text!r}", "pip install transformers")
    found = [_encode(text, home, part, kind) for part, kind in zip(parts, kinds, strict=True)]
    if len(found) == 1:
        return {name: value for name, value in found[0].items() if name in ("prompt_embeds", MASK)}
    words = torch.cat([each["penultimate"] for each in found], -1)  # as SDXL has them (arXiv 2307.01952)
    return {"prompt_embeds": words, "pooled_prompt_embeds": found[-1]["pooled"]}


@torch.no_grad()
def _encode(text: str, home: Path, part: str, kind: str) -> dict[str, Tensor]:
    """What one encoder makes of a text: words, those of the layer before the last, the whole's, and which count."""
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        home / part.replace("text_encoder", "tokenizer"), local_files_only=True
    )
    encoder = getattr(transformers, kind).from_pretrained(home / part, local_files_only=True, use_safetensors=True)
    length = min(tokenizer.model_max_length, ENCODERS[kind])
    given = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    if kind == "T5EncoderModel":
        words = encoder.eval()(given.input_ids, attention_mask=given.attention_mask).last_hidden_state
        return {"prompt_embeds": words, MASK: given.attention_mask}
    out = encoder.eval()(given.input_ids, output_hidden_states=True)
    pooled = out.text_embeds if kind == "CLIPTextModelWithProjection" else out.pooler_output
    return {"prompt_embeds": out.last_hidden_state, "penultimate": out.hidden_states[-2], "pooled": pooled}
