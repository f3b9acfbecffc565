"""Folders of images: crops, classes, and what is said of images that will not do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from diffperception.data import SeededSamples
from diffperception.data.image_folder import ImageDataOptions, ImageFolder, class_folders
from diffperception.data.images import BrokenImageError
from diffperception.data.listing import list_images


def write(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def opened(folder: Path, image_size: tuple[int, int], channels: int = 3, **options: Any) -> ImageFolder:
    return ImageFolder(ImageDataOptions(folder, **options), image_size, channels)


def test_a_crop_is_a_part_of_the_image(tmp_path: Path) -> None:
    pixels = torch.from_numpy(write(tmp_path / "a.png", 12, 17)).permute(2, 0, 1) / 255
    samples = SeededSamples(opened(tmp_path, (8, 8), short_side=12, horizontal_flip=0.0))
    parts = pixels.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4)  # (5, 10, 3, 8, 8), every part there is
    seen = set()
    for seed in range(60):
        crop, target = samples[0, seed]
        places = torch.isclose(parts, crop).flatten(2).all(2).nonzero()
        assert len(places) == 1
        seen.add(tuple(places[0].tolist()))
        assert target == {"label": None, "image_id": 0, "path": str(tmp_path / "a.png")}
    assert len(seen) > 25  # of 50 places


@pytest.mark.parametrize("cached", [0, 1])
def test_a_sample_is_a_function_of_its_seed(tmp_path: Path, cached: int) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.png", 20, 20, number)
    samples = SeededSamples(opened(tmp_path, (8, 8), short_side=16, vertical_flip=0.5, cached=cached))
    first = [samples[index, seed][0] for seed in range(5) for index in (0, 1)]
    again = [samples[index, seed][0] for seed in range(5) for index in (0, 1)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize(
    ("short_side", "size"), [(None, (8, 8)), (16, (8, 8)), (None, (8, 16)), (16, (16, 4))], ids=str
)
def test_images_are_resized_until_a_crop_fits(tmp_path: Path, short_side: int | None, size: tuple[int, int]) -> None:
    write(tmp_path / "wide.png", 20, 30)
    folder = opened(tmp_path, size, short_side=short_side)
    assert folder[0][0].shape == (3, *size)
    resized = folder._read(0).shape[1:]
    assert min(resized) == (short_side or max(8, round(20 * max(size[0] / 20, size[1] / 30))))


def test_grey(tmp_path: Path) -> None:
    pixels = write(tmp_path / "a.png", 8, 8)
    image = opened(tmp_path, (8, 8), channels=1, horizontal_flip=0.0)[0][0]
    luma = torch.from_numpy(pixels @ np.array([0.299, 0.587, 0.114])) / 255
    torch.testing.assert_close(image[0].double(), luma, atol=1.01 / 255, rtol=0)


def test_folders_are_classes(tmp_path: Path) -> None:
    for name in ("b/deep/1.png", "a/2.png", "b/3.jpg"):
        write(tmp_path / name, 8, 8)
    folder = opened(tmp_path, (8, 8), labelled=True)
    assert folder.classes == class_folders(tmp_path) == ["a", "b"]
    assert [folder[i][1]["label"] for i in range(3)] == [0, 1, 1]
    write(tmp_path / "4.png", 8, 8)
    with pytest.raises(ValueError, match="outside of any class"):
        opened(tmp_path, (8, 8), labelled=True)


def test_hidden_and_empty_folders_are_no_classes_and_hidden_files_no_images(tmp_path: Path) -> None:
    for name in ("b/1.png", ".cache/2.png", "a/.thumbnails/3.png"):
        write(tmp_path / name, 8, 8)
    (tmp_path / "b" / "._1.png").write_bytes(b"what macOS writes beside a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "b" / "folder.png").mkdir()
    assert class_folders(tmp_path) == ["b"]
    assert list_images(tmp_path).paths == [tmp_path / "b" / "1.png"]


@pytest.mark.parametrize("flip", ["horizontal_flip", "vertical_flip"])
def test_flips_are_as_frequent_as_asked_for(tmp_path: Path, flip: str) -> None:
    write(tmp_path / "a.png", 8, 8)
    pixels = opened(tmp_path, (8, 8), horizontal_flip=0.0)[0][0]
    folder = opened(tmp_path, (8, 8), **{"horizontal_flip": 0.0, "vertical_flip": 0.0} | {flip: 0.3})  # type: ignore[arg-type]
    mirrored = pixels.flip(2 if flip == "horizontal_flip" else 1)
    samples = [SeededSamples(folder)[0, seed][0] for seed in range(200)]
    assert all(torch.equal(image, pixels) or torch.equal(image, mirrored) for image in samples)
    assert 35 < sum(torch.equal(image, mirrored) for image in samples) < 85


def test_the_options_of_training_reach_the_folder(tmp_path: Path) -> None:
    for side in ("train", "val"):
        write(tmp_path / side / "class" / "a.png", 20, 30)
    options = ImageDataOptions(
        tmp_path / "train",
        val_images=tmp_path / "val",
        short_side=16,
        labelled=True,
        horizontal_flip=0.0,
        vertical_flip=1.0,
        on_broken="skip",
        cached=7,
    )
    for folder in options.open((8, 8), 1):
        assert folder is not None
        assert folder._read(0).shape == (1, 16, 24)
        plain = opened(folder.options.images, (8, 8), short_side=16, channels=1, horizontal_flip=0.0)
        for seed in range(4):
            assert torch.equal(SeededSamples(folder)[0, seed][0], SeededSamples(plain)[0, seed][0].flip(1))
        assert (folder.classes, folder.options.on_broken, folder.options.cached) == (["class"], "skip", 7)


def test_deep_grey_that_cannot_be_scaled_is_found_before_training(tmp_path: Path) -> None:
    write(tmp_path / "good.png", 8, 8)
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(tmp_path / "dark.tif")
    with pytest.raises(BrokenImageError, match=r"dark\.tif has 16-bit grey up to 1000 only.* data\.on_broken skip$"):
        opened(tmp_path, (8, 8))
    assert opened(tmp_path, (8, 8), on_broken="skip").skipped == 1


def test_broken_images_stop_or_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "good.png", 8, 8)
    (tmp_path / "header.png").write_bytes(b"no picture")
    with pytest.raises(BrokenImageError, match=r"header\.png cannot be read.*: remove it, or .* data\.on_broken skip$"):
        opened(tmp_path, (8, 8))
    assert opened(tmp_path, (8, 8), on_broken="skip").skipped == 1
    write(tmp_path / "body.png", 64, 64)
    whole = (tmp_path / "body.png").read_bytes()
    (tmp_path / "body.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "header.png").unlink()
    with pytest.raises(BrokenImageError, match=r"body\.png cannot be read.*: remove it, or .* data\.on_broken skip$"):
        opened(tmp_path, (8, 8))[0]
    assert opened(tmp_path, (8, 8), on_broken="skip")[0][1]["path"].endswith("good.png")
    (tmp_path / "good.png").unlink()
    with pytest.raises(BrokenImageError, match=r"body\.png cannot be read"):
        opened(tmp_path, (8, 8), on_broken="skip")[0]


def test_what_will_not_do_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no image or folder"):
        opened(tmp_path / "none", (8, 8))
    with pytest.raises(FileNotFoundError, match="there is no image"):
        opened(tmp_path, (8, 8))
    write(tmp_path / "tiny.png", 3, 9)
    with pytest.raises(ValueError, match="holds no folders"):
        class_folders(tmp_path)
    with pytest.raises(ValueError, match=r"tiny\.png has 3 x 9 pixels"):
        opened(tmp_path, (8, 8))
    write(tmp_path / "good.png", 4, 9)
    assert opened(tmp_path, (8, 8), on_broken="skip").paths == [tmp_path / "good.png"]
    with pytest.raises(FileNotFoundError, match="no image large enough"):
        opened(tmp_path, (32, 32), on_broken="skip")
    with pytest.raises(ValueError, match="set its in_channels to 3 or 1"):
        opened(tmp_path, (4, 4), channels=4)
    with pytest.raises(ValueError, match="make it at least 8"):
        opened(tmp_path, (8, 8), short_side=6)


@pytest.mark.parametrize(
    ("size", "fits"),
    [((16, 16), False), ((16, 63), False), ((15, 64), False), ((64, 16), False), ((16, 64), True)],
    ids=str,
)
def test_an_image_has_half_the_height_and_half_the_width_of_a_crop(
    tmp_path: Path, size: tuple[int, int], fits: bool
) -> None:
    write(tmp_path / "a.png", *size)
    if fits:
        assert len(opened(tmp_path, (32, 128))) == 1
    else:
        with pytest.raises(ValueError, match=f"has {size[0]} x {size[1]} pixels, less than half of the 32 x 128"):
            opened(tmp_path, (32, 128))


def test_a_photograph_on_its_side_is_measured_as_it_is_seen(tmp_path: Path) -> None:
    orientation = Image.Exif()
    orientation[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (16, 64)).save(tmp_path / "a.jpg", exif=orientation)  # 64 wide once it is turned
    assert opened(tmp_path, (32, 128))[0][0].shape == (3, 32, 128)
