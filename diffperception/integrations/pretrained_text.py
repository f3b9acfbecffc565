"""Captions read by a pretrained encoder of transformers, of a folder on this machine: CLIP, T5, BERT, XLM-R, ..."""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from diffperception.devices import to_device
from diffperception.doctor import require_installed
from diffperception.models.base import require_not_named_by_a_file
from diffperception.models.condition import Condition
from diffperception.models.text_conditioner import TextReader

# Of families whose whole models have more than an encoder of texts.
ENCODERS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
}

TOKENIZERS = ("tokenizer.json", "vocab*", "*.model")  # files of which one is in every tokenizer's folder


class PretrainedText(TextReader):
    """Texts by an encoder of transformers that stays as it is, while the network that is told its tokens learns.

    A model's file holds the encoder and its tokenizer, so that it needs the folder no more.

    Args:
        folder: where `save_pretrained` of an encoder and of its tokenizer wrote, or a repository was downloaded to.
        length: tokens of a text at most; longer captions are cut.
        pooled: E, the length of a vector of the whole text, which is added to the time's embedding; None for none.
        prompt: what is said where nothing is.
        examples: texts that are drawn where none are asked for; by default, in training, some of the captions.
        config: the encoder's configuration, in place of the folder, as a model's file has it.
        tokenizer: likewise the content of tokenizer.json.
        padding: likewise the number of the token that texts are filled up with.

    Raises:
        FileNotFoundError, ImportError, ValueError: there is no such folder, transformers is absent, or what is in the
            folder is no encoder of texts with a tokenizer.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        length: int = 77,
        pooled: int | None = None,
        prompt: str = "",
        examples: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        padding: int = 0,
    ) -> None:
        require_installed("transformers", "a pretrained encoder of texts", "pip install 'diffperception[text]'")
        if folder is not None:
            encoder, tokenizer, padding = _read(Path(folder))
        elif config is not None and tokenizer is not None:
            encoder = _built(config)
        else:
            raise ValueError("name the folder of an encoder of transformers")
        super().__init__(encoder.config.hidden_size, pooled, prompt, examples)
        self.encoder = encoder.requires_grad_(False).eval()
        self.tokenizer = importlib.import_module("tokenizers").Tokenizer.from_str(tokenizer)
        self.unknown = json.loads(tokenizer)["model"].get("unk_token")
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.length, self.padding = min(length, _positions(encoder.config)), padding
        self.record(folder=None, config=json.loads(encoder.config.to_json_string()), tokenizer=tokenizer)
        self.record(padding=padding)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, said: Sequence[str]) -> Condition:
        rows = [self._ids(text or self.prompt) for text in said]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.padding] * (longest - len(row)) for row in rows], device="cpu")
        mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows], device="cpu")
        ids, mask = to_device(ids, self.device), to_device(mask, self.device)
        return self.condition(self._encode(ids, mask), mask)

    @torch.no_grad()
    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def _ids(self, text: str) -> list[int]:
        """The tokens of a text, cut to the length, its last one kept, which is often that of the end."""
        ids = self.tokenizer.encode(text).ids or [self.padding]
        return ids if len(ids) <= self.length else [*ids[: self.length - 1], ids[-1]]

    def require_known(self, text: str) -> None:
        found = self.tokenizer.encode(text)
        unknown = [
            text[start:end]
            for token, (start, end) in zip(found.tokens, found.offsets, strict=True)
            if token == self.unknown
        ]
        if any(unknown):
            raise ValueError(f"the encoder has no token for {unknown[0]!r} of the prompt {text!r}: leave it out")
        if len(found) > self.length:
            raise ValueError(f"the prompt {text!r} has {len(found)} tokens, but {self.length} are read: shorten it")


def _read(folder: Path) -> tuple[Any, str, int]:
    """The encoder in a folder, its tokenizer as JSON, and the number of its token for padding."""
    require_not_named_by_a_file(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"there is no folder {folder} with the config.json of an encoder of transformers")
    if not any(any(folder.glob(name)) for name in TOKENIZERS):
        raise ValueError(f"{folder} has no tokenizer beside its encoder: save it there with save_pretrained")
    transformers = importlib.import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        encoder, about = _class_of(config.model_type).from_pretrained(folder, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        content, numbers = tokenizer.backend_tokenizer.to_str(), tokenizer.get_vocab().values()
    except (OSError, ValueError, AttributeError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder} holds no encoder of texts with its tokenizer that transformers reads ({reason}): save both there"
            " with save_pretrained"
        ) from None
    missing = sorted(name for name in about["missing_keys"] if "pooler" not in name)  # which nothing here reads
    if encoder.main_input_name != "input_ids" or missing:
        lacks = f", without weights such as {missing[0]}" if missing else ""
        raise ValueError(f"{folder} holds a {type(encoder).__name__}{lacks}: name the folder of an encoder of texts")
    if max(numbers) >= encoder.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {max(numbers) + 1} tokens, but the encoder {encoder.config.vocab_size}:"
            " they are not of one model"
        )
    return encoder.float(), content, tokenizer.pad_token_id or 0


def _built(config: Mapping[str, Any]) -> Any:
    """The encoder of a configuration, with new weights; it runs no code but that of transformers."""
    transformers = importlib.import_module("transformers")
    plain = {name: value for name, value in config.items() if name not in ("auto_map", "architectures", "model_type")}
    full = transformers.AutoConfig.for_model(config["model_type"], **plain)
    kind = _class_of(config["model_type"])
    return kind.from_config(full) if kind is transformers.AutoModel else kind(full)


def _class_of(model_type: str) -> Any:
    return getattr(importlib.import_module("transformers"), ENCODERS.get(model_type, "AutoModel"))


def _positions(config: Any) -> int:
    """How many tokens a text may have at most."""
    return min(int(getattr(config, "max_position_embeddings", None) or 512), 512)
