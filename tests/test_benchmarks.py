"""Timing; and the benchmark of segmentation at small sizes: both ways are the same classifier."""

import time

import pytest

from diffperception.benchmarks import segmentation
from diffperception.benchmarks.timing import Row, best_seconds, ratio_table


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SIDE": 16, "BLOCKS": [(8, 8), (6, 4), (4, 2)], "MEMBERS": 2, "CLASSES": 3, "IMAGES": 2, "TRAINED": 20}
    for name, value in sizes.items():
        monkeypatch.setattr(segmentation, name, value)


@pytest.mark.usefixtures("small")
def test_both_ways_are_the_same_classifier() -> None:
    rows, difference = segmentation.compare_ways(repeats=1, minibatches=40, say=lambda what: None)
    assert 0 < difference < 1e-5
    assert [row.target for row in rows] == [None, None, None, 5, 10]
    of_image, of_minibatch, _, whole, _ = rows
    for way in ("dense", "ours"):
        parts = (getattr(of_image, way) * segmentation.IMAGES, getattr(of_minibatch, way) * segmentation.TRAINED)
        assert getattr(whole, way) == pytest.approx(sum(parts))
    table = segmentation.report(rows, difference, memory=1.5)
    assert "largest difference of logits: " in table
    assert "1.50 GiB (at most 4 GB" in table


@pytest.mark.usefixtures("small")
def test_memory_is_measured_on_the_whole_task() -> None:
    assert 0.1 < segmentation.peak_memory(threads=1) < 64


def test_the_best_of_several_times_counts_and_short_functions_are_repeated() -> None:
    waits = iter([0.3, 0.6, 0.12, 0.6])
    assert 0.12 <= best_seconds([lambda: time.sleep(next(waits))], repeats=3)[0] < 0.6
    calls: list[int] = []
    quick, slow = best_seconds([lambda: calls.append(0), lambda: time.sleep(0.01)], repeats=2)
    assert len(calls) > 1 + 2  # once to warm up, and more than once a repeat
    assert quick < 0.01 <= slow


def test_ratios_are_of_the_unit() -> None:
    table = ratio_table([Row("theirs (unit)", 0.5), Row("ours", 0.25, target=0.8), Row("our head", 2.0)])
    assert table.split("\n") == [
        "               seconds  units  at most",
        "theirs (unit)      0.5   1.00",
        "ours              0.25   0.50      0.8",
        "our head             2   4.00",
    ]
