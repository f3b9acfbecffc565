"""Reading image files in batches, and resizing to a short side."""

from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image

from diffperception.data.images import (
    load_images,
    read_image,
    read_size,
    resize_short_side,
    short_side_size,
    to_float,
)


def write(path: Path, value: int, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_stay_in_their_batch(tmp_path: Path, workers: int) -> None:
    paths = [write(tmp_path / "0.png", 0), tmp_path / "none.png", write(tmp_path / "2.png", 51)]
    batches = list(load_images(paths, batch_size=2, workers=workers))
    assert [[sample.path for sample in batch] for batch in batches] == [paths[:2], paths[2:]]
    assert batches[0][1].image is None
    assert batches[0][1].problem == f"the image {paths[1]} is missing"
    torch.testing.assert_close(batches[1][0].image, torch.full((3, 4, 6), 0.2))


def test_there_are_no_more_workers_than_further_batches() -> None:
    files = [Path(str(number)) for number in range(9)]
    assert [load_images(files[:n], 4, workers=2).num_workers for n in (1, 4, 5, 9)] == [0, 0, 1, 2]


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (37, 101), (8, 8)])
@pytest.mark.parametrize("short_side", [8, 20, 100])
def test_the_size_of_a_resized_image_is_known_before(size: tuple[int, int], short_side: int) -> None:
    resized = resize_short_side(torch.rand(3, *size), short_side)
    assert resized.shape[1:] == short_side_size(*size, short_side)
    assert min(resized.shape[1:]) == short_side


def test_labels_are_resized_to_the_nearest_and_none_leaves_them() -> None:
    labels = torch.randint(20, (1, 30, 45))
    assert set(resize_short_side(labels, 10, nearest=True).unique().tolist()) <= set(labels.unique().tolist())
    assert resize_short_side(labels, None) is labels


def test_the_size_of_a_file_is_that_of_its_pixels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", 255, (7, 5))
    assert read_size(path) == read_image(path).shape[1:] == (5, 7)
    assert to_float(read_image(path)).unique().tolist() == [1.0]


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_the_size_of_a_photograph_on_its_side_is_that_of_what_is_seen(tmp_path: Path, ending: str) -> None:
    path, exif = tmp_path / f"a.{ending}", Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (7, 5)).save(path, exif=exif)
    assert read_size(path) == read_image(path).shape[1:] == (7, 5)
