"""Captions read by encoders of transformers in local folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffperception.models import DiffusionModel
from tests.helpers.networks import tiny_unet

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "star", "blue", "##ish", "红", "星"]
SMALL = {"vocab_size": len(WORDS), "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_encoder(folder: Path, kind: str = "Bert", **options: Any) -> Path:
    """An encoder of transformers with random weights, and a tokenizer of a few words."""
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **SMALL | {"intermediate_size": 16, "max_position_embeddings": 9} | options
    )
    names = {"CLIPText": "CLIPTextModel", "T5": "T5EncoderModel"}
    getattr(transformers, names.get(kind, f"{kind}Model"))(config).save_pretrained(folder)
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    plain.normalizer = tokenizers.normalizers.BertNormalizer()
    plain.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    return folder


def reader(folder: Path, **options: Any) -> Any:
    from diffperception.integrations.pretrained_text import PretrainedText

    return PretrainedText(folder, **options).eval()


T5 = {"d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2}


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), [("Bert", {}), ("CLIPText", {"eos_token_id": 3}), ("T5", T5)])
def test_tokens_are_the_encoders_own_whatever_the_batch(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    text = reader(write_encoder(tmp_path / "text", kind, **options), pooled=6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "text")
    condition = text(["a red star", "a bluish 红星", ""])
    for i, caption in enumerate(["a red star", "a bluish 红星", ""]):
        alone = text.encoder(**{k: v for k, v in tokenizer(caption, return_tensors="pt").items() if "type" not in k})
        torch.testing.assert_close(condition.tokens[i][condition.mask[i]], alone.last_hidden_state[0])
    assert condition.vector.shape == (3, 6)


def test_a_file_holds_the_encoder_and_needs_its_folder_no_more(tmp_path: Path) -> None:
    text = reader(write_encoder(tmp_path / "text"))
    text.prepare(["a red star", "a blue star"])
    model = DiffusionModel(None, tiny_unet(context=12), text, image_size=8).eval()
    model.save(tmp_path / "model.safetensors")
    (tmp_path / "text").rename(tmp_path / "moved")
    loaded = DiffusionModel.load(tmp_path / "model.safetensors")
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([5])
    one, other = (each(x, t, each.condition(["a red star"])) for each in (model, loaded))
    assert torch.equal(one, other)
    assert str(tmp_path) not in (tmp_path / "model.safetensors").read_bytes().decode(errors="ignore")
    assert loaded.conditioner is not None
    assert loaded.conditioner.choose(None, [1]) == ["a blue star"]
    loaded.train()
    assert not any(parameter.requires_grad for parameter in loaded.conditioner.encoder.parameters())
    assert not loaded.conditioner.encoder.training


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json of an encoder"):
        reader(tmp_path / "nothing")
    folder = write_encoder(tmp_path / "text")
    text = reader(folder)
    with pytest.raises(ValueError, match="has 10 tokens, but 9 are read"):
        text.choose(["a " * 8], [0])
    with pytest.raises(ValueError, match="no token for 'crimson' of the prompt 'a crimson star'"):
        text.choose(["a red star", "a crimson star"], [0])
    with pytest.raises(ValueError, match="has 11 tokens, but the encoder 5: they are not of one model"):
        reader(write_encoder(tmp_path / "small", vocab_size=5))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"BertModel, without weights such as encoder\.layer\.1"):
        reader(folder)
    (folder / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(ValueError, match="holds no encoder of texts"):
        reader(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="has no tokenizer beside"):
        reader(folder)
