"""Names in any script: no two look alike, and what no font has is spelled out and said."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffperception.visualization.draw import draw_detections
from diffperception.visualization.fonts import (
    _font_with,
    _runs,
    _spelled,
    _spelled_out,
    readable,
    text_width,
    write_line,
)
from diffperception.visualization.panels import legend


@pytest.fixture(autouse=True)
def forget() -> None:
    for function in (readable, _runs, _spelled_out):
        function.cache_clear()


def drawn(name: str) -> np.ndarray:
    found = {"boxes": torch.tensor([[10.0, 30.0, 60.0, 55.0]]), "labels": torch.tensor([0])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(draw_detections(torch.full((3, 60, 120), 0.9), found, [name]))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("гайка", "болты"),
        ("螺栓", "齿轮"),
        ("ネジ", "ねじ"),
        ("너트", "볼트"),
        ("מברג", "פטיש"),
        ("مسمار", "برغي"),
        ("😀", "🔩"),
        ("नट", "बोल"),
        ("น็อต", "โบลต์"),
        ("é", "è"),
    ],
)
def test_two_names_are_not_drawn_alike(a: str, b: str) -> None:
    assert drawn(a).shape == drawn(b).shape
    assert (drawn(a) != drawn(b)).any()


def test_letters_beyond_ascii_are_drawn_and_not_spelled_out() -> None:
    assert [readable(name) for name in ("гайка", "écrou", "παξιμάδι")] == ["гайка", "écrou", "παξιμάδι"]


def test_ascii_is_written_as_pillow_writes_it() -> None:
    font = ImageFont.load_default(14)
    ours, theirs = Image.new("RGB", (120, 20), "white"), Image.new("RGB", (120, 20), "white")
    write_line(ImageDraw.Draw(ours), (3, 0), "bolt 0.93 gy", (0, 0, 0), 14)
    ImageDraw.Draw(theirs).text((3, 0), "bolt 0.93 gy", fill=(0, 0, 0), font=font)
    assert (np.asarray(ours) == np.asarray(theirs)).all()


def test_a_letter_without_a_font_is_spelled_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffperception.visualization.fonts._paths", list)  # a machine without fonts
    _font_with.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"the letters гайка: pictures show \[ghe a short i ka a\]"):
            assert readable("гайка") == "[ghe a short i ka a]"
        with pytest.warns(UserWarning, match="Noto"):
            assert readable("M8 螺") == "M8 [87BA]"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert readable("螺 0.93") == "[87BA] 0.93"  # said once
    finally:
        _font_with.cache_clear()


@pytest.mark.parametrize(
    ("letter", "spelled"),
    [("ね", "ne"), ("ネ", "NE"), ("螺", "87BA"), ("너", "neo"), ("Ж", "ZHE"), ("😀", "grinning face"), ("ॐ", "om")],
)
def test_how_letters_are_spelled(letter: str, spelled: str) -> None:
    assert _spelled(letter) == spelled


def test_names_with_breaks_and_controls_stay_one_line() -> None:
    assert readable("a\n b\tc") == "a b c"
    assert text_width("two\nlines", 14) == text_width("two lines", 14)
    assert drawn("bolt\nM8").shape == drawn("bolt").shape
    drawn("\x00\u200b\ufeff")


def test_a_legend_takes_any_names() -> None:
    assert legend(["гайка", "болт", ""]).width > 0
