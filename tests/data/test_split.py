from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffperception.data.image_folder import ImageDataOptions
from diffperception.data.masks import MaskDataOptions
from diffperception.data.split import held_out

NAMES = [f"folder {k % 7}/ü {k}.jpg" for k in range(200)]


def chosen(names: list[str], share: float, seed: int) -> set[str]:
    return {name for name, out in zip(names, held_out(names, share, seed), strict=True) if out}


@pytest.mark.parametrize(("share", "number"), [(0.1, 20), (0.333, 67), (0.001, 1), (0.999, 199)])
def test_the_share_is_exact_and_hangs_on_names_and_seed_alone(share, number):
    picked = chosen(NAMES, share, 0)
    assert len(picked) == number
    assert chosen(NAMES[::-1], share, 0) == picked
    assert number in (1, 199) or chosen(NAMES, share, 1) != picked


def test_images_that_are_added_move_few_others():
    before, after = chosen(NAMES[:190], 0.2, 3), chosen(NAMES, 0.2, 3)
    assert len(before - after) <= 3  # another choice would keep one in five
    assert len((after - before) - set(NAMES[190:])) <= 3


def test_a_larger_share_holds_a_smaller_one():
    assert chosen(NAMES, 0.1, 0) < chosen(NAMES, 0.2, 0)


@pytest.mark.parametrize("share", [0, 1, -0.1, 10])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="give a share between 0 and 1"):
        held_out(NAMES, share, 0)


def test_one_image_cannot_be_split():
    with pytest.raises(ValueError, match="only one image"):
        held_out(["a.jpg"], 0.5, 0)


def test_a_generators_images_are_split_into_two_parts_that_make_the_whole(tmp_path: Path):
    for k in range(10):
        Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(tmp_path / f"{k}.png")
    options = ImageDataOptions(images=tmp_path, val_share=0.3)
    train, val = options.open((8, 8), 3)
    assert val is not None
    assert (len(train), len(val)) == (7, 3)
    assert sorted([*train.paths, *val.paths]) == sorted(tmp_path.glob("*.png"))
    with pytest.raises(ValueError, match=r"either data\.val_images or data\.val_share"):
        ImageDataOptions(images=tmp_path, val_share=0.3, val_images=tmp_path).open((8, 8), 3)


def test_images_with_masks_are_split_into_two_parts_that_make_the_whole(tmp_path: Path):
    for k in range(10):
        for folder, pixels in (("images", np.full((8, 8, 3), k, np.uint8)), ("masks", np.eye(8, dtype=np.uint8))):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{k}.png")
    options = MaskDataOptions(tmp_path / "images", tmp_path / "masks", ["a", "b"], val_share=0.3, max_images=5)
    train, val = options.open(), options.open_val()
    assert val is not None
    assert (len(train), len(val)) == (5, 3)
    assert not set(train.names) & set(val.names)
    assert {len(options.open(seed)) for seed in range(3)} == {5}
    with pytest.raises(ValueError, match=r"either data\.val_images or data\.val_share"):
        replace(options, val_images=tmp_path).open_val()
