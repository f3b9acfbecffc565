"""Which mask belongs to which image, by names alone: the files are empty."""

from pathlib import Path

import pytest

from diffperception.data.listing import files_below
from diffperception.data.pairing import find_pairs, require_pairs


def paired(root: Path, images: str, masks: str, same: bool = False, **suffixes: str) -> tuple[dict, list, list]:
    """Pairs, images without and masks without, by their names below their folders."""
    folders = root / "images", root / ("images" if same else "masks")
    for folder, names in zip(folders, (images, masks), strict=True):
        for name in names.split():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    found = find_pairs(files_below(folders[0], {".jpg", ".png", ".bmp"}), folders[0], folders[1], **suffixes)
    pairs = {str(i.relative_to(folders[0])): str(m.relative_to(folders[1])) for i, m in found.pairs}
    left = [path.name for path in found.unlabelled], [path.name for path in found.unused]
    return pairs, *left


@pytest.mark.parametrize(
    ("images", "masks", "pairs", "left"),
    [
        ("a.jpg b/c.png", "a.png b/c.npy", {"a.jpg": "a.png", "b/c.png": "b/c.npy"}, ([], [])),
        ("a.JPG B.png", "A.PNG b.TIF", {"a.JPG": "A.PNG", "B.png": "b.TIF"}, ([], [])),
        ("a.jpg A.jpg", "a.png A.png", {"A.jpg": "A.png", "a.jpg": "a.png"}, ([], [])),
        ("a.jpg a.png", "a.jpg.png a.png.png", {"a.jpg": "a.jpg.png", "a.png": "a.png.png"}, ([], [])),
        ("a.b.jpg", "a.b.png a.png", {"a.b.jpg": "a.b.png"}, ([], ["a.png"])),
        ("a.jpg b.jpg", "a.png c.png .b.png b.txt", {"a.jpg": "a.png"}, (["b.jpg"], ["c.png"])),
        ("u\u0308.jpg", "\u00fc.png", {"u\u0308.jpg": "\u00fc.png"}, ([], [])),
        ("a.jpg", "b/a.png", {}, (["a.jpg"], ["a.png"])),
    ],
)
def test_names_decide(tmp_path: Path, images: str, masks: str, pairs: dict, left: tuple) -> None:
    assert paired(tmp_path, images, masks) == (pairs, *left)


@pytest.mark.parametrize(
    ("images", "masks", "sentence"),
    [
        ("a.jpg a.png", "a.png", r"the images \S*a.jpg and \S*a.png have one mask, \S*a.png"),
        ("a.jpg A.jpg", "a.png", r"the images \S*A.jpg and \S*a.jpg have one mask"),
        ("a.jpg", "a.png a.npy", r"a.jpg has two masks, \S*a.npy and \S*a.png: keep one"),
        ("a.jpg", "a.png A.png", r"a.jpg has two masks, \S*a.png and \S*A.png: keep one"),
        ("a.jpg", "a.png a.jpg.png", r"a.jpg has two masks"),
        ("a.jpg b.png", "a.png b.jpg", r"the mask \S*b.jpg is of a lossy format"),
    ],
)
def test_what_is_not_plain_is_refused(tmp_path: Path, images: str, masks: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        paired(tmp_path, images, masks)


def test_suffixes_are_left_off(tmp_path: Path) -> None:
    images, masks = "x/a_leftImg8bit.png", "x/a_gtFine_labelIds.png x/a_gtFine_color.png x/b_gtFine_labelIds.png"
    pairs, without, unused = paired(
        tmp_path, images, masks, image_suffix="_leftImg8bit", mask_suffix="_gtFine_labelIds"
    )
    assert pairs == {"x/a_leftImg8bit.png": "x/a_gtFine_labelIds.png"}
    assert (without, unused) == ([], ["b_gtFine_labelIds.png"])


def test_masks_beside_their_images_are_no_images(tmp_path: Path) -> None:
    assert paired(tmp_path / "a", "a.jpg b.jpg", "a.png b.png", same=True)[:2] == (
        {"a.jpg": "a.png", "b.jpg": "b.png"},
        [],
    )
    found = paired(tmp_path / "b", "a.png b.png", "a_mask.png c_mask.png", same=True, mask_suffix="_mask")
    assert found == ({"a.png": "a_mask.png"}, ["b.png"], ["c_mask.png"])


@pytest.mark.parametrize(("images", "masks"), [("data/images", "data"), ("data", "data/masks"), ("i", "m")])
def test_one_folder_may_lie_in_the_other(tmp_path: Path, images: str, masks: str) -> None:
    for folder in (images, masks):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "a.png").touch()
    listed = files_below(tmp_path / images, {".png"})
    found = find_pairs(listed, tmp_path / images, tmp_path / masks)
    assert found.pairs == [(tmp_path / images / "a.png", tmp_path / masks / "a.png")]
    assert (found.unlabelled, found.unused) == ([], [])


def test_the_sentence_shows_names_of_both_sides_and_their_suffix(tmp_path: Path) -> None:
    for name in ("images/a.jpg", "images/b.jpg", "masks/a_mask.png", "masks/b_mask.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    root, masks = tmp_path / "images", tmp_path / "masks"
    found = find_pairs(files_below(root, {".jpg"}), root, masks)
    with pytest.raises(
        ValueError, match=r"such as a\.jpg, masks such as a_mask\.png; 2 would fit with `mask_suffix` _mask"
    ):
        require_pairs(found, root, masks)
    assert [note.split(" (")[0] for note in found.remarks()] == [
        "left out: 2 images without a mask",
        "left out: 2 masks without an image",
    ]
