"""Segments by normalised cuts, and their score by Hungarian matching."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffperception.cli.main import main
from diffperception.segmentation import RGBFeatures
from diffperception.segmentation.normalized_cut import best_cut, recursive_cuts
from diffperception.segmentation.zero_shot import (
    CutOptions,
    HungarianIoU,
    cut_folder,
    grid_points,
    match_segments,
    resize_labels,
    segment_by_cuts,
)
from diffperception.visualization.draw import save_png, to_pil

COLOURS = torch.tensor([[0.1, 0.1, 0.9], [0.9, 0.2, 0.1], [0.1, 0.8, 0.1]])
PARTS = torch.zeros(20, 30, dtype=torch.int64)
PARTS[4:12, 3:14] = 1
PARTS[9:18, 18:28] = 2
CUT = CutOptions(threshold=0.5, exponent=4, cells=600)


def scene() -> Tensor:
    return COLOURS[PARTS].permute(2, 0, 1)


def block_graph(sizes: list[int], between: float) -> np.ndarray:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.where(labels[:, None] == labels, 1.0, between)


def test_the_best_cut_of_two_blocks_is_between_them_and_costs_what_it_should() -> None:
    affinity = block_graph([3, 7], 0.1)
    side, cost = best_cut(affinity) or (np.empty(0), 0)
    assert set(np.flatnonzero(side)) in ({0, 1, 2}, {*range(3, 10)})
    between = 21 * 0.1
    assert cost == pytest.approx(between / (9 + between) + between / (49 + between))
    assert best_cut(np.ones((1, 1))) is None


def test_cuts_go_on_until_they_cost_too_much() -> None:
    affinity = block_graph([4, 6, 5], 0.05)
    affinity[:4, 4:10] = affinity[4:10, :4] = 0.3  # two blocks that are more alike
    assert recursive_cuts(affinity, 2e-3).tolist() == [0] * 15
    assert recursive_cuts(affinity, 0.3).tolist() == [0] * 10 + [1] * 5
    assert recursive_cuts(affinity, 0.6).tolist() == [0] * 4 + [1] * 6 + [2] * 5
    order = np.random.default_rng(0).permutation(15)
    shuffled = recursive_cuts(affinity[np.ix_(order, order)], 0.6)
    same = shuffled[:, None] == shuffled
    assert np.array_equal(same, np.repeat(range(3), [4, 6, 5])[order][:, None] == np.repeat(range(3), [4, 6, 5])[order])


@pytest.mark.parametrize("centred", [False, True])
def test_parts_of_one_colour_are_the_segments(centred: bool) -> None:
    options = CutOptions(CUT.threshold, CUT.exponent, CUT.cells, centred)
    for cells in (CUT.cells, 60):  # fewer places than pixels: pixels go to what they are like
        found = segment_by_cuts(
            RGBFeatures().maps(scene()), CutOptions(options.threshold, options.exponent, cells, centred)
        )
        assert found.shape == PARTS.shape
        assert torch.equal(match_segments(found, PARTS), PARTS)
        assert found.max() == 2


def test_a_plain_or_black_picture_is_one_segment() -> None:
    for value in (0.0, 0.5):
        assert not segment_by_cuts(RGBFeatures().maps(torch.full((3, 9, 7), value)), CUT).any()


def test_places_are_as_many_as_asked_for_and_evenly_spread() -> None:
    maps = RGBFeatures().maps(torch.zeros(3, 20, 30))
    assert len(grid_points(maps, 10_000)) == 600
    few = grid_points(maps, 24)
    assert few.tolist()[:2] == [[2, 2], [2, 7]]
    assert len(few) == 24
    with pytest.raises(ValueError, match="1 x 1 pixels has a single cell"):
        grid_points(RGBFeatures().maps(torch.zeros(3, 1, 1)), 100)


def test_matching_gives_each_class_one_segment() -> None:
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 255, 255]])
    segments = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 3]])
    assert match_segments(segments, mask).tolist() == [[0, 0, 0, -1, 1, 1, 1, -1]]
    counts = HungarianIoU(3)
    counts.update(segments, mask)
    assert counts.per_class()[:2] == [0.75, 1.0]
    assert counts.mean() == 0.875
    # A single segment cannot be both classes: the larger takes it.
    counts = HungarianIoU(2)
    counts.update(torch.zeros_like(mask), mask)
    assert counts.per_class() == pytest.approx([4 / 6, 0])


def test_labels_are_resized_to_the_nearest() -> None:
    labels = torch.tensor([[0, 1], [2, 3]])
    assert torch.equal(resize_labels(labels, (4, 6)), labels.repeat_interleave(2, 0).repeat_interleave(3, 1))
    assert torch.equal(resize_labels(labels.repeat_interleave(2, 0), (2, 2)), labels)


def test_commands_cut_a_folder_and_score_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_png(to_pil(scene()), tmp_path / "in" / "a.png")
    save_png(to_pil(scene().flip(2)), tmp_path / "in" / "b.jpg.png")
    save_png(Image.fromarray(PARTS.byte().numpy()), tmp_path / "masks" / "a.png")
    save_png(Image.fromarray(PARTS.flip(1).byte().numpy()), tmp_path / "masks" / "b.jpg.png")
    cut = ["--cut.exponent", "4", "--cut.cells", "600", "--features", "RGBFeatures", "--device", "cpu"]
    arguments = ["--images", str(tmp_path / "in"), *cut]
    assert (
        main(["evaluate", *arguments, "--masks", str(tmp_path / "masks"), "--classes", "ground", "red", "green"]) == 0
    )
    said = capsys.readouterr().out
    assert said.count("100.0 %") == 2  # of the features and of the colours, which are the same here
    (tmp_path / "in" / "broken.png").write_text("nothing")
    output = tmp_path / "out"
    assert main(["segment", *arguments, "--output", str(output), "--num_pictures", "1", "--workers", "0"]) == 0
    assert "broken.png" in capsys.readouterr().out
    found = torch.from_numpy(np.array(Image.open(output / "masks" / "a.png"))).long()
    assert torch.equal(match_segments(found, PARTS), PARTS)
    assert [path.name for path in (output / "overlays").iterdir()] == ["a.png"]
    with open(output / "segments.csv", newline="") as file:
        assert list(csv.reader(file)) == [["image", "segments"], ["a.png", "3"], ["b.jpg.png", "3"]]
    # Given again, nothing is left to do; at a smaller side segments come back to the images' own size.
    before = (output / "masks" / "a.png").stat().st_mtime_ns
    cut_folder(RGBFeatures(), tmp_path / "in", output, CutOptions(0.5, 4, 600), num_pictures=1, device="cpu")
    assert (output / "masks" / "a.png").stat().st_mtime_ns == before
    small = cut_folder(RGBFeatures(), tmp_path / "in", tmp_path / "small", CUT, short_side=10, device="cpu")
    assert small.segments["a.png"] >= 3
    assert Image.open(tmp_path / "small" / "masks" / "a.png").size == (30, 20)
