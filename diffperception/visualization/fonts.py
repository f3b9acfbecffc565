"""Letters of any script in pictures: each in the first font here that has it, and spelled out where none has."""

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Set as AbstractSet
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

BUILT_IN = ""  # Pillow's own font, which has ASCII
MOST_FONTS = 300  # of a system that are looked into for a rare letter
_MANY_SCRIPTS = re.compile(r"cjk|noto|unifont|unicode|droid|gothic|ming|song|hei|sans", re.IGNORECASE)
_GENERIC = {"LETTER", "CHARACTER", "SYLLABLE", "SIGN"}  # in the names of letters, after their script

Ink = tuple[int, ...]


def text_width(text: str, size: int) -> int:
    """Pixels that a line of text takes, rounded up."""
    return math.ceil(sum(_font(path, size).getlength(part) for path, part in _runs(text)))


def write_line(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, ink: Ink, size: int) -> None:
    """Write a line of text whose top left corner is `place`; size in pixels."""
    x, y = place
    baseline = y + _font(BUILT_IN, size).getmetrics()[0]
    for path, part in _runs(text):
        font = _font(path, size)
        draw.text((x, baseline), part, fill=ink, font=font, anchor="ls")
        x += font.getlength(part)


@lru_cache(maxsize=1024)
def readable(text: str) -> str:
    """The text in one line, letters that no font here has spelled out in brackets; a warning says so, once for each."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if text.isascii() and text.isprintable():
        return text
    groups = groupby(text, lambda letter: letter == " " or _font_with(letter) is not None)
    parts = [(known, "".join(letters)) for known, letters in groups]
    return "".join(letters if known else _spelled_out(letters) for known, letters in parts)


@lru_cache(maxsize=1024)
def _spelled_out(letters: str) -> str:
    shown = f"[{' '.join(map(_spelled, letters))}]"
    warnings.warn(
        f"no font on this machine has the letters {letters}: pictures show {shown} in their place; a font that has"
        " them, such as Noto Sans CJK, is found once it is installed",
        stacklevel=2,
    )
    return shown


@lru_cache(maxsize=4096)
def _runs(text: str) -> list[tuple[str, str]]:
    """The text as pairs of a font and what is written in it."""
    text = readable(text)
    if text.isascii():
        return [(BUILT_IN, text)]
    runs: list[tuple[str, str]] = []
    for letter in text:
        if runs and (letter == " " or ord(letter) in _letters(runs[-1][0])):
            runs[-1] = (runs[-1][0], runs[-1][1] + letter)
        else:
            runs.append((_font_with(letter) or BUILT_IN, letter))
    return runs


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@cache
def _font_with(letter: str) -> str | None:
    return next((path for path in (BUILT_IN, *_paths()) if ord(letter) in _letters(path)), None)


@cache
def _paths() -> list[str]:
    """The font files here: matplotlib's own, then the system's, those of many scripts first."""
    from matplotlib import font_manager, get_data_path

    own = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    found = sorted(font_manager.findSystemFonts(), key=lambda path: (not _MANY_SCRIPTS.search(Path(path).name), path))
    return [str(own), *found[:MOST_FONTS]]


@cache
def _letters(path: str) -> AbstractSet[int]:
    """The code points that a font has outlines for; none of a file that cannot be read."""
    from fontTools.ttLib import TTFont

    source = path or io.BytesIO(_font(BUILT_IN, 14).font_bytes)
    try:
        with TTFont(source, lazy=True, fontNumber=0) as font:
            has_outlines = any(table in font for table in ("glyf", "CFF ", "CFF2"))  # Pillow scales no bitmaps
            return frozenset(font.getBestCmap() or ()) if has_outlines else frozenset()
    except Exception:  # systems have broken fonts, which fail in many ways
        return frozenset(range(32, 127)) if path == BUILT_IN else frozenset()


def _spelled(letter: str) -> str:
    """A letter by its name, such as NE, or by its code where that says no more."""
    name = unicodedata.name(letter, "")
    if not name or "IDEOGRAPH" in name:
        return f"{ord(letter):X}"
    words = name.split()
    category = unicodedata.category(letter)
    if len(words) > 1 and category[0] in "LM":
        words = [word for word in words[1:] if word not in _GENERIC]
    if category in ("Lu", "Ll"):
        words = [word for word in words if word not in ("CAPITAL", "SMALL")]
    is_upper = category == "Lu" or name.startswith("KATAKANA")
    return " ".join(words) if is_upper else " ".join(words).lower()
