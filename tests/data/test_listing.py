"""Listing images: which files count, in what order, and what is said of the others."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from diffperception.data.listing import image_endings, list_images


def touch(root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return [root / name for name in names]


def test_images_are_listed_in_order_and_whatever_the_case_of_their_endings(tmp_path: Path) -> None:
    found = touch(tmp_path, "a/2.JPG", "a/3.jp2", "a/4.HEIC", "a/5.AVIF", "a/6.jfif", "a/7.mpo", "a/b/1.Png", "z.TIFF")
    touch(tmp_path, "notes.txt", "README", "a/._2.jpg", ".cache/4.png", "a/.thumbnails/5/6.png", "__MACOSX/a/7.png")
    (tmp_path / "folder.png").mkdir()
    root, paths, remark = list_images(tmp_path)
    assert (root, paths) == (tmp_path, found)
    assert list_images(str(tmp_path)) == (root, paths, remark)
    assert remark == (
        f"left out of {tmp_path}: 2 of other kinds (no ending, .txt), 4 hidden (._2.jpg, .cache, .thumbnails, __MACOSX)"
    )
    (tmp_path / "clean").mkdir()
    touch(tmp_path, "clean/1.png")
    assert list_images(tmp_path / "clean").remark == ""


def test_every_format_that_pillow_can_write_and_read_counts() -> None:
    Image.init()
    stubs = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # need programs of others, or are no pictures
    both = {end for end, kind in Image.EXTENSION.items() if kind in Image.OPEN and kind in Image.SAVE} - image_endings()
    assert {Image.EXTENSION[ending] for ending in both} <= stubs
    assert not image_endings() & {".pdf", ".txt", ".json", ".npy", ".mp4", ".db", ""}


def test_the_folder_itself_may_be_hidden(tmp_path: Path) -> None:
    found = touch(tmp_path, ".hidden/1.png")
    assert list_images(tmp_path / ".hidden").paths == found


def test_links_to_folders_are_followed_once_and_circles_end(tmp_path: Path) -> None:
    inside = touch(tmp_path, "photos/b/1.png", "photos/c/2.png")
    touch(tmp_path, "elsewhere/3.png")
    (tmp_path / "photos/a").symlink_to(tmp_path / "photos/b")  # sorted before the folder that it leads to
    (tmp_path / "photos/b/loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/again").symlink_to(tmp_path / "elsewhere")
    listing = list_images(tmp_path / "photos")
    assert listing.paths == [tmp_path / "photos/again/3.png", *inside]
    assert listing.remark.endswith(": 3 linked a second time")


def test_a_linked_file_counts_under_each_of_its_names(tmp_path: Path) -> None:
    (first,) = touch(tmp_path, "1.png")
    (tmp_path / "2.png").symlink_to(first)
    assert list_images(tmp_path).paths == [first, tmp_path / "2.png"]


def test_what_a_command_writes_is_not_its_input(tmp_path: Path) -> None:
    photo, other = touch(tmp_path, "1.png", "pictures/2.png")
    touch(tmp_path, "out/pictures/1.png", "out/pictures/2.png", "out/scores.csv", "out/.diffperception")
    (tmp_path / "link").symlink_to(tmp_path / "out/pictures")
    root, paths, remark = list_images(tmp_path, leave_out=tmp_path / "out")
    assert (root, paths) == (tmp_path, [photo, other])  # a folder's name alone means nothing
    assert remark == f"left out of {tmp_path}: 2 in the output folder {tmp_path / 'out'}, 1 linked a second time"
    assert list_images(f"{tmp_path}/**/*.png", leave_out=tmp_path / "link/..").paths == [photo, other]


@pytest.mark.parametrize("source", ["", "photos", "photos/1.png", "photos/*", "link", "photos/list.txt"])
def test_nothing_is_said_to_be_missing_that_is_in_the_output(tmp_path: Path, source: str) -> None:
    touch(tmp_path, "photos/1.png")
    (tmp_path / "photos/list.txt").write_text("1.png")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"are in the output folder .*whose files are never read: choose an --output"):
        list_images(str(tmp_path / source), leave_out=tmp_path / ("photos" if source else ""))


def test_a_file_and_a_pattern(tmp_path: Path) -> None:
    one, two, _ = touch(tmp_path, "a/1.png", "b/c/2.png", "b/c/2.txt")
    assert list_images(one) == (tmp_path / "a", [one], "")
    assert list_images(f"{tmp_path}/**/*.png") == (tmp_path, [one, two], "")
    root, paths, remark = list_images(f"{tmp_path}/b/*/*")
    assert (root, paths) == (tmp_path / "b/c", [two])
    assert remark.endswith("1 of other kinds (.txt)")
    (bracket,) = touch(tmp_path, "a/photo[1].png")
    assert list_images(bracket).paths == [bracket]


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("none", "there is no image or folder .*none$"),
        ("*.gif", "there is no image or folder .*gif, nor does it match"),
        ("empty", r"no image in the folder .*empty, but 1 of other kinds \(\.txt\)"),
        ("hidden", r"no image in the folder .*hidden, but 1 hidden \(\.git\)"),
        ("empty/*", r"no image that .*\* names, but 1 of other kinds"),
    ],
)
def test_nothing_to_list(tmp_path: Path, source: str, part: str) -> None:
    touch(tmp_path, "empty/notes.txt", "hidden/.git/1.png")
    with pytest.raises(FileNotFoundError, match=part):
        list_images(str(tmp_path / source))


def test_lists_of_names(tmp_path: Path) -> None:
    one, two, three = touch(tmp_path, "a/1.png", "b/2.png", "b/3.png")
    text, coco = tmp_path / "list.txt", tmp_path / "some.JSON"
    text.write_bytes("b/3.png\r\n\r\na\\1.png\r\nb/3.png\r\n".encode("utf-16"))
    assert list_images(tmp_path, text) == (tmp_path, [one, three], f"left out of {tmp_path}: 1 listed a second time")
    assert list_images(text).paths == [one, three]
    content = {"images": [{"id": 1, "file_name": "b/2.png"}], "annotations": [], "categories": []}
    coco.write_text(json.dumps(content))
    assert list_images(tmp_path, coco) == list_images(coco) == (tmp_path, [two], "")
    text.write_text(f"2\n{one}")  # in a folder of its own: without endings, and with a path of its own
    assert list_images(tmp_path / "b", text) == (tmp_path, [one, two], "")


def test_lists_that_will_not_do(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "1.jpg", "2.png")
    text = tmp_path / "list.txt"
    for content, message in [
        ("\n", "lists no image"),
        ("2.png\n3.png\n4.png", r"list\.txt lists .*3\.png, which is missing, among 2 in all"),
        ("1", r"lists 1, which may be any of .*1\.\w+, .*1\.\w+: give the ending"),
    ]:
        text.write_text(content)
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            list_images(tmp_path, text)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.txt"):
        list_images(tmp_path, tmp_path / "none.txt")
    (tmp_path / "a.json").write_text('{"images": [{"id": 1}], "annotations": [], "categories": []}')
    with pytest.raises(ValueError, match=r"a\.json has an image without a file_name"):
        list_images(tmp_path, tmp_path / "a.json")


def test_names_that_lead_out_of_the_folder_have_a_root_above_all(tmp_path: Path) -> None:
    one, two = touch(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a/list.txt").write_text("1.png\n../b/2.png\n")
    root, paths, _ = list_images(tmp_path / "a/list.txt")
    assert (root, paths) == (tmp_path, [one, two])


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_found_in_any_normal_form(tmp_path: Path, form: str) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    (path,) = touch(tmp_path, unicodedata.normalize(form, "Höhe/größe.png"))
    (tmp_path / "list.txt").write_text(unicodedata.normalize(other, "Höhe/größe.png"), encoding="utf-8")
    assert list_images(tmp_path, tmp_path / "list.txt").paths == [path]
    touch(tmp_path, "Höhe2.png", "Höhf.png", "Hö.png")
    assert [unicodedata.normalize("NFC", path.name) for path in list_images(tmp_path).paths] == [
        "Hö.png",
        "größe.png",
        "Höhe2.png",
        "Höhf.png",
    ]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is closed to the administrator")
def test_closed_folders_are_counted(tmp_path: Path) -> None:
    (path,) = touch(tmp_path, "1.png")
    (tmp_path / "closed").mkdir(mode=0)
    assert list_images(tmp_path) == (tmp_path, [path], f"left out of {tmp_path}: 1 without permission to read")
