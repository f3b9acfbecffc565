"""Matching points by features, on pictures whose correspondence is known."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffperception.cli.main import main
from diffperception.models import DiffusionModel, FeatureInfo
from diffperception.segmentation import FeatureExtractor, FeatureMaps, RGBFeatures
from diffperception.segmentation.correspondence import (
    WarpOptions,
    match_folder,
    match_points,
    measure_matches,
    pck,
    warped_pair,
)
from diffperception.visualization.draw import save_png, to_pil
from tests.helpers.networks import two_level_unet

STILL = WarpOptions(turn=0, scale=0, bend=0, recolour=0)


def picture(height: int = 40, width: int = 56) -> Tensor:
    torch.manual_seed(0)
    coarse = torch.rand(1, 3, 5, 7)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1)


class Places(FeatureExtractor):
    """Where a pixel is, as a direction: known features."""

    def __init__(self) -> None:
        super().__init__([FeatureInfo("place", 3, 1)])

    def encode(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[2:]
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        return [torch.stack([rows, columns, torch.ones_like(rows)]).expand(len(images), -1, -1, -1)]


def test_a_point_is_found_where_its_features_are() -> None:
    """By the mean cosine of maps of any stride and any scale, in pictures of other sizes, in any bands."""
    image = torch.zeros(3, 70, 80)
    maps = Places().maps(image)
    coarse = torch.nn.functional.avg_pool2d(maps.maps[0][None], 2)[0]
    maps = FeatureMaps([maps.maps[0], 100 * coarse], [1, 2], maps.size)
    points = torch.tensor([[0, 0], [69, 79], [35, 12], [64, 3]])
    assert torch.equal(match_points(maps, maps, points), points)
    wider = Places().maps(torch.zeros(3, 70, 159))
    found = match_points(replace(maps, maps=maps.maps[:1], strides=[1]), wider, points)
    assert (found - points * torch.tensor([1, 2])).abs().max() <= 1
    dense = maps.cosines(maps.directions(points))
    both = [torch.nn.functional.normalize(m, dim=0) for m in maps.dense().split(3)]
    expected = sum((b[:, points[:, 0], points[:, 1]].T @ b.flatten(1)).view(4, 70, 80) for b in both) / 2
    torch.testing.assert_close(dense, expected)


def test_pck_counts_within_a_share_of_the_longer_side() -> None:
    found, truth = torch.tensor([[0, 0], [0, 4], [3, 3]]), torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert pck(found, truth, (20, 40), 0.1) == pytest.approx(2 / 3)
    assert pck(found, truth, (20, 40), 0.11) == 1


def test_a_picture_that_is_not_warped_is_itself() -> None:
    image = picture()
    pair = warped_pair(image, STILL, seed=1)
    torch.testing.assert_close(pair.warped, image, atol=1e-4, rtol=0)
    torch.testing.assert_close(pair.truth, pair.points.double(), atol=1e-6, rtol=0)
    # Every pixel of this picture has a colour of its own.
    score, found = measure_matches(RGBFeatures(), [pair])
    assert score == 1
    assert torch.equal(found[0], pair.points)


def test_the_truth_is_where_the_warped_pixels_come_from() -> None:
    image = picture()
    pair = warped_pair(image, replace(WarpOptions(), recolour=0.0, points=200), seed=3)
    assert (pair.truth - pair.points).abs().max() > 2
    place = (pair.truth + 0.5) * 2 / torch.tensor([40, 56]) - 1
    there = torch.nn.functional.grid_sample(image[None], place.flip(-1)[None, None].float(), align_corners=False)
    warped = pair.warped[:, pair.points[:, 0], pair.points[:, 1]]
    torch.testing.assert_close(there[0, :, 0], warped, atol=1e-4, rtol=0)
    again, other = (warped_pair(image, WarpOptions(), seed) for seed in (3, 4))
    assert not torch.equal(again.warped, other.warped)
    assert torch.equal(again.warped, warped_pair(image, WarpOptions(), 3).warped)


def test_points_lie_where_the_picture_changes() -> None:
    image = torch.zeros(3, 40, 40)
    image[:, 10:30, 10:30] = 1
    pair = warped_pair(image, STILL, seed=0)
    edges = (pair.points - 19.5).abs().amax(1)
    assert edges.min() >= 8
    assert edges.max() <= 11


def test_what_is_warped_away_is_said() -> None:
    with pytest.raises(ValueError, match="nothing of the picture is left"):
        warped_pair(picture(), WarpOptions(scale=1e6), seed=0)


def test_the_command_names_what_features_should_beat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DiffusionModel(None, two_level_unet(), image_size=8).save(tmp_path / "g.safetensors")
    for index in range(2):
        save_png(to_pil(picture(24 + index, 32)), tmp_path / "in" / f"{index}.png")
    (tmp_path / "in" / "broken.png").write_text("nothing")
    arguments = [
        "correspond",
        "--features",
        "DiffusionFeatures",
        "--features.generator",
        str(tmp_path / "g.safetensors"),
    ]
    arguments += ["--features.blocks", "[1]", "--features.timesteps", "[50]", "--images", str(tmp_path / "in")]
    arguments += ["--output", str(tmp_path / "out"), "--warp.points", "5", "--workers", "0", "--device", "cpu"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("PCK@0.1", "untrained network", "colours", "2 warped pictures", "broken.png"))
    found = json.loads((tmp_path / "out" / "matches.json").read_text())
    assert found["pairs"] == 2
    assert (tmp_path / "out" / "matches.png").exists()
    report = match_folder(RGBFeatures(), tmp_path / "in", workers=0, device="cpu", warp=WarpOptions(points=5))
    assert report.pck["features"] == report.pck["colours"] == found["pck"]["colours"]
