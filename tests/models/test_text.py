"""Words, the encoder that reads them, and what makes a condition of a text."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffperception.models import ClassLabels, DiffusionModel, TextConditioner
from diffperception.models.text import TextEncoder, vocabulary_of, words_of
from diffperception.models.text_conditioner import SPECIAL
from tests.helpers.networks import tiny_unet
from tests.parity import arrays, distance, fill_state
from tests.parity.conditional_unets import CLIP, IDS, NAME

CAPTIONS = ["a red star", "a blue ring left of a red star", "红色的星"]


def conditioner(**options: Any) -> TextConditioner:
    made = TextConditioner(**{"width": 12, "num_heads": 2} | options)
    made.prepare(CAPTIONS)
    return made.eval()


def generator(**options: Any) -> DiffusionModel:
    torch.manual_seed(0)
    return DiffusionModel(None, tiny_unet(context=12), conditioner(**options), image_size=8).eval()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red STAR, left.", ["a", "red", "star", "left"]),
        ("红色的星在Blue圆环左边。", ["红", "色", "的", "星", "在", "blue", "圆", "环", "左", "边"]),
        ("the man's dog—2 café", ["the", "man's", "dog", "2", "café"]),
        ("\uff21\uff22\u3000\uff13 \u2019", ["ab", "3"]),
        ("スター", ["ス", "タ", "ー"]),
        (" ?! ", []),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_the_vocabulary_is_of_words_that_occur_often_enough() -> None:
    assert vocabulary_of(CAPTIONS, 2) == (["a", "red", "star"], 8)


@torch.no_grad()
def test_a_causal_encoder_is_clips_text_tower() -> None:
    width, depth, heads = CLIP["hidden_size"], CLIP["num_hidden_layers"], CLIP["num_attention_heads"]
    encoder = TextEncoder(CLIP["vocab_size"], width, depth, heads, 9, causal=True, activation="quick_gelu")
    encoder.load_state_dict(fill_state({name: tuple(value.shape) for name, value in encoder.state_dict().items()}))
    assert distance(encoder(torch.tensor(IDS)), arrays(NAME)["clip"]) < 1e-5


@torch.no_grad()
def test_padding_changes_no_word() -> None:
    short, long = conditioner(), conditioner(length=30)
    long.encoder.positions[: len(short.encoder.positions)] = short.encoder.positions
    long.load_state_dict({**short.state_dict(), "encoder.positions": long.encoder.positions})
    one, other = short(["a red star"]), long(["a red star"])
    assert one.mask is not None
    assert other.mask is not None
    torch.testing.assert_close(one.tokens[one.mask], other.tokens[other.mask])  # type: ignore[index]
    assert one.mask.sum() == 5  # start, three words, end


@torch.no_grad()
def test_words_and_their_order_matter() -> None:
    texts = ["a red star", "a blue star", "star red a", ""]
    condition = conditioner(pooled=6)(texts)
    assert condition.vector is not None
    assert not condition.vector.any()  # at first nothing is added to the time's embedding
    assert condition.tokens is not None
    first = condition.tokens[:, 0]
    assert (torch.cdist(first, first) > 1e-3).sum() == 12


def test_what_is_dropped_is_as_if_nothing_were_said() -> None:
    reader = conditioner()
    said = reader.drop(CAPTIONS, torch.tensor([True, False, True]))
    assert said == ["", CAPTIONS[1], ""]
    nothing = reader(reader.absent(1))
    torch.testing.assert_close(reader(said).tokens[:1], nothing.tokens)  # type: ignore[index]


def test_a_file_keeps_words_and_gives_the_same_tokens(tmp_path: Path) -> None:
    model = generator()
    model.save(tmp_path / "model.safetensors")
    loaded = DiffusionModel.load(tmp_path / "model.safetensors")
    assert isinstance(loaded.conditioner, TextConditioner)
    assert loaded.conditioner.vocabulary == sorted({word for text in CAPTIONS for word in words_of(text)})
    assert loaded.conditioner.examples == CAPTIONS
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 900])
    for said in (["a red star", "红色的星"], None):
        one, other = (each(x, t, told.expand(2)) for each in (model, loaded) if (told := each.condition(said)))
        assert torch.equal(one, other)


def test_a_prompt_is_what_is_said_where_nothing_is() -> None:
    model = generator()
    told = model.told("a blue ring")
    for said, wanted in ((None, ["a blue ring"]), (["a star"], ["a star"])):
        one, other = told.condition(said), model.condition(wanted)
        assert torch.equal(one.tokens, other.tokens)  # type: ignore[union-attr,arg-type]
    with pytest.raises(ValueError, match="'pink' of the prompt 'a pink ring'"):
        model.told("a pink ring")
    with pytest.raises(ValueError, match="give the prompt as a text"):
        model.told({"prompt_embeds": torch.zeros(1, 12)})


def test_prompts_take_turns_and_unknown_words_are_named() -> None:
    reader = conditioner()
    assert reader.choose(["a star", "a ring"], [0, 1, 2, 5]) == ["a star", "a ring", "a star", "a ring"]
    assert reader.choose(None, [1]) == CAPTIONS[1:2]
    with pytest.raises(ValueError, match=r"the word 'crimson' of the prompt 'A crimson star'.*knows the 11 words"):
        reader.choose(["a star", "A crimson star"], [0])
    with pytest.raises(ValueError, match="has 9 words, but the generator reads 8"):
        reader.choose(["a " * 9], [0])
    assert (reader(["a crimson star"]).tokens - reader(["a pink star"]).tokens).abs().max() == 0  # type: ignore[operator]


def test_rows_of_the_embedding_are_words() -> None:
    reader = conditioner(min_count=2)
    assert reader.classes == [*SPECIAL, "a", "red", "star"]
    assert reader.encoder.embedding.num_embeddings == len(reader.classes)


def test_what_does_not_fit_is_refused() -> None:
    unet = tiny_unet(context=12)
    with pytest.raises(ValueError, match="attends to tokens 12 wide, but no conditioner makes none"):
        DiffusionModel(None, unet)
    with pytest.raises(ValueError, match="attends to tokens 12 wide, but a ClassLabels makes none"):
        DiffusionModel(["a"], unet)
    with pytest.raises(ValueError, match="attends to tokens 12 wide, but a TextConditioner makes them 16 wide"):
        DiffusionModel(None, unet, TextConditioner(width=16))
    with pytest.raises(ValueError, match="attends to no tokens, but a TextConditioner"):
        DiffusionModel(None, tiny_unet(), TextConditioner())
    with pytest.raises(ValueError, match=r"has 128 channels .*, but a TextConditioner makes a vector of 6"):
        DiffusionModel(None, unet, TextConditioner(width=12, num_heads=2, pooled=6))
    with pytest.raises(ValueError, match="cannot be split evenly by num_heads = 5"):
        TextConditioner(width=12, num_heads=5)
    with pytest.raises(ValueError, match="no word occurs 9 times"):
        TextConditioner(min_count=9).prepare(CAPTIONS)
    with pytest.raises(ValueError, match=r"name them with data.captions"):
        TextConditioner().prepare(None)
    with pytest.raises(ValueError, match="a ClassLabels reads none"):
        ClassLabels(["a"], 8).prepare(CAPTIONS)
    with pytest.raises(ValueError, match="no conditioner that reads them"):
        DiffusionModel(None, tiny_unet()).prepare(CAPTIONS)
    with pytest.raises(ValueError, match=r"name them with data.captions"):
        conditioner().read([{"label": 1}])
