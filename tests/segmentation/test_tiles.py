"""Segmentation of large pictures in windows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffperception.cli.main import main
from diffperception.data.images import read_image
from diffperception.data.masks import MaskDataOptions
from diffperception.data.tiles import Tiling
from diffperception.segmentation import PixelEnsemble, PixelSegmenter, RGBFeatures, evaluate_segmenter, segment_folder
from diffperception.segmentation.features import FeatureExtractor
from diffperception.visualization.draw import save_png, to_pil
from tests.helpers.scenes import Pyramid, scene

CLASSES = ["a", "b", "c"]
NAMES = ("labels", "uncertainty", "votes", "probabilities")


def segmenter(features: FeatureExtractor, short_side: int | None = None) -> PixelSegmenter:
    torch.manual_seed(0)
    ensemble = PixelEnsemble(features.channels, len(CLASSES), 3)
    with torch.no_grad():
        for weights in ensemble.parameters():
            weights.normal_()
    return PixelSegmenter(features, ensemble, CLASSES, short_side).eval()


@pytest.mark.parametrize(("tile", "overlap"), [(16, 0), (16, 7), (30, 8), (20, 14)])
def test_features_of_a_pixel_alone_give_the_same_in_windows(tile: int, overlap: int) -> None:
    model, image = segmenter(RGBFeatures()), scene(0, 50, 71)[0]
    whole = model.segment(image, probabilities=True)
    tiled = model.segment(image, probabilities=True, tiling=Tiling(tile, overlap))
    assert len(whole.labels.unique()) > 1
    assert torch.equal(whole.labels, tiled.labels)
    assert torch.equal(whole.votes, tiled.votes)
    for name in ("uncertainty", "probabilities"):
        torch.testing.assert_close(getattr(whole, name), getattr(tiled, name), atol=1e-5, rtol=1e-4)


def test_windows_that_overlap_by_what_a_pixel_depends_on_leave_no_seam() -> None:
    """Here 8 pixels: the cells of stride 4, and their neighbours; all windows begin at multiples of it."""
    model, image = segmenter(Pyramid()), scene(0, 48, 64)[0]
    whole = model.segment(image, probabilities=True)
    tiled = model.segment(image, probabilities=True, tiling=Tiling(32, 16))
    assert all(start % 4 == 0 for window in Tiling(32, 16).windows(48, 64) for start in window)
    torch.testing.assert_close(whole.probabilities, tiled.probabilities, atol=1e-4, rtol=1e-3)
    assert torch.equal(whole.labels, tiled.labels)


def test_a_picture_no_larger_than_the_tile_is_segmented_as_without() -> None:
    model, image = segmenter(Pyramid()), scene(0, 30, 45)[0]
    whole, tiled = model.segment(image, True), model.segment(image, True, Tiling(45, 8))
    assert all(torch.equal(getattr(whole, name), getattr(tiled, name)) for name in NAMES)


def test_windows_are_of_the_picture_at_the_short_side() -> None:
    model, image = segmenter(RGBFeatures(), short_side=20), scene(0, 60, 90)[0]
    whole, tiled = model.segment(image), model.segment(image, tiling=Tiling(30, 8))
    assert torch.equal(whole.labels, tiled.labels)  # one window: 20 x 30 pixels
    assert model.segment(image, tiling=Tiling(12, 4)).labels.shape == (60, 90)


def test_the_network_sees_windows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    features, seen = Pyramid(), []
    encode = features.encode
    monkeypatch.setattr(features, "encode", lambda images: seen.append(images.shape[2:]) or encode(images))
    segmenter(features).segment(torch.zeros(3, 200, 150, dtype=torch.uint8), tiling=Tiling(64, 16))
    assert set(seen) == {(64, 64)}
    assert len(seen) == len(Tiling(64, 16).windows(200, 150))


def test_shares_are_the_picture_once_and_lie_in_their_windows() -> None:
    for overlap in (0, 1, 7, 15):
        tiling, seen = Tiling(16, overlap), np.zeros((50, 33), dtype=int)
        for window, share in zip(tiling.windows(50, 33), tiling.shares(50, 33), strict=True):
            seen[share.top : share.bottom, share.left : share.right] += 1
            inner = share.within(window)
            assert 0 <= inner.left < inner.right <= 16
            assert 0 <= inner.top < inner.bottom <= 16
            depths = [inner.left, inner.top, 16 - inner.right, 16 - inner.bottom]
            edges = [window.left == 0, window.top == 0, window.right == 33, window.bottom == 50]
            assert all(depth >= overlap // 2 for depth, edge in zip(depths, edges, strict=True) if not edge)
        assert (seen == 1).all()


def test_folders_are_segmented_and_scored_in_windows(tmp_path: Path) -> None:
    for number in range(2):
        image, mask = scene(number, 40, 60)
        save_png(to_pil(image), tmp_path / "images" / f"{number}.png")
        save_png(Image.fromarray(mask.byte().numpy()), tmp_path / "masks" / f"{number}.png")
    segmenter(RGBFeatures()).save(tmp_path / "model.safetensors")
    options = ["--model", str(tmp_path / "model.safetensors"), "--images", str(tmp_path / "images"), "--device", "cpu"]
    for name, tiles in (("whole", []), ("tiles", ["--tile", "24", "--overlap", "8"])):
        assert main(["predict", *options, "--output", str(tmp_path / name), "--workers", "0", "--rank", *tiles]) == 0
    for name in ("masks/0.png", "overlays/1.png"):
        assert torch.equal(read_image(tmp_path / "whole" / name), read_image(tmp_path / "tiles" / name))
    scores = [(tmp_path / name / "scores.csv").read_text() for name in ("whole", "tiles")]
    assert scores[0] == scores[1]
    folder = MaskDataOptions(tmp_path / "images", tmp_path / "masks", CLASSES).open()
    model = tmp_path / "model.safetensors"
    assert evaluate_segmenter(model, folder, workers=0) == evaluate_segmenter(
        model, folder, workers=0, tile=24, overlap=8
    )
    with pytest.raises(ValueError, match="overlap is 24: it must be from 0 to below tile, which is 24"):
        segment_folder(model, tmp_path / "images", tmp_path / "other", tile=24, overlap=24)
    assert not (tmp_path / "other").exists()
