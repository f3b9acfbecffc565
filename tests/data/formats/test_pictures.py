import unicodedata
from pathlib import Path

import pytest

from diffperception.data.formats.pictures import ImageIndex, tidy


@pytest.mark.parametrize(
    ("called", "found"),
    [
        ("a.jpg", "a.jpg"),
        ("A.JPG", "a.jpg"),
        ("one/b.jpg", "one/b.jpg"),
        ("C:\\data\\two\\b.jpg", "two/b.jpg"),
        ("/elsewhere/one/B.jpg", "one/b.jpg"),
        ("./a.jpg", "a.jpg"),
        (unicodedata.normalize("NFD", "grün.jpg"), "grün.jpg"),
        ("0a1b2c3d-a.jpg", "a.jpg"),
        ("gone.jpg", None),
        ("one/a.png", None),
    ],
)
def test_an_image_is_found_by_the_end_of_its_path(tmp_path: Path, draw, called, found):
    index = ImageIndex(draw("a.jpg", "one/b.jpg", "two/b.jpg", "grün.jpg"))
    assert index.find(called) == found


def test_an_image_that_may_be_two_is_refused(tmp_path: Path, draw):
    index = ImageIndex(draw("one/b.jpg", "two/b.jpg", "c.jpg", "c.png"))
    with pytest.raises(ValueError, match=r"b\.jpg may be one/b\.jpg or two/b\.jpg"):
        index.find("b.jpg")
    with pytest.raises(ValueError, match=r"c may be c\.jpg or c\.png"):
        index.find_stem("c")
    assert index.find_stem("two/b") == "two/b.jpg"


def test_addresses_and_served_files_are_names():
    assert tidy("/data/local-files/?d=a%20b/c.jpg") == "a b/c.jpg"
    assert tidy("https://host/x%C3%BC.jpg") == "host/xü.jpg"
    assert tidy(".\\a\\b.jpg") == "a/b.jpg"
    assert tidy("100%.jpg") == "100%.jpg"
