"""Windows over large pictures, and random ones for training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from diffperception.data import CocoDetection
from diffperception.data.tiles import MIN_SEEN, RandomTile, Tiling, Window, seen_share


@pytest.mark.parametrize("seed", range(60))
def test_windows_cover_every_pixel_evenly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 300, size=2).tolist()
    tile = int(rng.integers(2, 120))
    overlap = int(rng.integers(0, tile) * rng.uniform())
    windows = Tiling(tile, overlap).windows(height, width)
    assert len(windows) == len(set(windows))
    seen = np.zeros((height, width), dtype=int)
    for left, top, right, bottom in windows:
        assert (right - left, bottom - top) == (min(tile, width), min(tile, height))
        assert min(left, top) >= 0
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1
    assert seen.sum() == sum((right - left) * (bottom - top) for left, top, right, bottom in windows)  # none beyond
    for axis in (0, 1):
        steps = np.diff(sorted({window[axis] for window in windows}))
        if len(steps):
            assert steps.max() <= tile - overlap
            assert steps.max() - steps.min() <= 1


def test_no_more_windows_than_are_needed() -> None:
    assert Tiling(100, 0).windows(100, 200) == [Window(0, 0, 100, 100), Window(100, 0, 200, 100)]
    assert len(Tiling(100, 20).windows(180, 260)) == 2 * 3
    assert len(Tiling(100, 20).windows(181, 261)) == 3 * 4


def test_without_a_tile_pictures_are_whole() -> None:
    assert Tiling().windows(5000, 7000) == [Window(0, 0, 7000, 5000)]


@pytest.mark.parametrize("overlap", [64, 100, -1])
def test_an_overlap_as_large_as_the_window_is_refused(overlap: int) -> None:
    with pytest.raises(ValueError, match=f"overlap is {overlap}: it must be from 0 to below tile, which is 64"):
        Tiling(64, overlap)


def test_an_overlap_without_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap is 10, but pictures are taken whole: give tile too"):
        Tiling(None, 10)


def test_small_windows_overlap_by_half_where_nothing_is_said() -> None:
    assert Tiling(256).windows(600, 900) == Tiling(256, 64).windows(600, 900)
    assert Tiling(64).windows(600, 900) == Tiling(64, 32).windows(600, 900)


def test_random_tiles_around_objects_show_them_whole_and_every_one() -> None:
    boxes = np.array([[0, 0, 20, 30], [300, 100, 340, 150], [480, 390, 500, 400]], dtype=np.float32)
    met = np.zeros(3, dtype=bool)
    for seed in range(60):
        torch.manual_seed(seed)
        window = RandomTile(64, 1.0).draw(boxes, 400, 500)
        assert (window.right - window.left, window.bottom - window.top) == (64, 64)
        assert min(window) >= 0
        assert (window.right, window.bottom) <= (500, 400)
        assert seen_share(boxes, window).max() == 1
        met |= seen_share(boxes, window) == 1
    assert met.all()


def test_random_tiles_anywhere_reach_every_corner() -> None:
    seen, boxes = np.zeros((50, 45), dtype=bool), np.array([[1.0, 1, 5, 5]])
    for seed in range(600):
        torch.manual_seed(seed)
        left, top, right, bottom = RandomTile(40, 0.0).draw(boxes, 50, 45)
        seen[top:bottom, left:right] = True
    assert seen.all()


@pytest.mark.parametrize("box", [[10, 10, 400, 40], [10, 10, 400, 390]])
def test_an_object_larger_than_the_tile_fills_it(box: list[int]) -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        left, _, right, _ = RandomTile(64, 1.0).draw(np.array([box], dtype=np.float32), 400, 500)
        assert left >= 10
        assert right <= 400


def test_a_picture_no_larger_than_the_tile_is_whole_and_draws_nothing() -> None:
    torch.manual_seed(3)
    assert RandomTile(64, 0.5).draw(np.array([[0, 0, 5, 5.0]]), 64, 30) == Window(0, 0, 30, 64)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def large_data(folder: Path) -> tuple[Path, Path]:
    """One picture whose objects are painted, each in a shade of its own, with their outlines."""
    pixels, annotations = np.zeros((240, 320, 3), dtype=np.uint8), []
    for number, (x, y) in enumerate([(x, y) for x in range(0, 300, 40) for y in range(5, 220, 40)], 1):
        pixels[y : y + 20, x : x + 30] = number
        outline = [[x, y, x + 30, y, x + 30, y + 20, x, y + 20]]
        common = {"id": number, "image_id": 1, "category_id": number % 2, "iscrowd": 0, "area": 600}
        annotations.append(common | {"bbox": [x, y, 30, 20], "segmentation": outline})
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / "large.png")
    image = {"id": 1, "file_name": "large.png", "width": 320, "height": 240}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": i, "name": str(i)} for i in (0, 1)]}
    (folder / "large.json").write_text(json.dumps(content))
    return folder / "large.json", folder


def test_samples_are_windows_whose_boxes_and_masks_follow(tmp_path: Path) -> None:
    dataset = CocoDetection(*large_data(tmp_path), masks=True, tile=RandomTile(96, 0.5))
    whole = CocoDetection(*large_data(tmp_path))
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = dataset[0]
        assert image.shape == (3, 96, 96)
        assert target["masks"].shape == (len(target["boxes"]), 96, 96)
        shades = (image[0] * 255).round().int()
        shown = {}
        for box, mask, label in zip(target["boxes"], target["masks"], target["labels"], strict=True):
            around = masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1])
            assert torch.equal(around, box)
            (shade,) = shades[mask.bool()].unique().tolist()
            assert label == shade % 2
            shown[shade] = int(mask.sum())
        for shade, area in zip(*(x.tolist() for x in shades[shades > 0].unique(return_counts=True)), strict=True):
            assert (shade in shown) == (area >= MIN_SEEN * 600)
            assert shown.get(shade, area) == area
    assert len(whole[0][1]["boxes"]) == 48


def test_a_tile_leaves_smaller_pictures_as_they_are(tmp_path: Path) -> None:
    files = large_data(tmp_path)
    (image, target), (same, kept) = CocoDetection(*files)[0], CocoDetection(*files, tile=RandomTile(320, 1.0))[0]
    assert torch.equal(image, same)
    assert all(torch.equal(target[name], kept[name]) for name in ("boxes", "labels", "area"))


def test_stored_samples_are_the_bytes_of_the_others(tmp_path: Path) -> None:
    dataset = CocoDetection(*large_data(tmp_path))
    stored, target = dataset.stored(0)
    image, same = dataset[0]
    assert stored.dtype == torch.uint8
    torch.testing.assert_close(stored / 255, image)
    assert torch.equal(target["boxes"], same["boxes"])
