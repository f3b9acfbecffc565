"""Curves: what is read, and what is drawn of it."""

from pathlib import Path

import numpy as np
import pytest

from diffperception.visualization.curves import _in_words, _smooth, read_metrics, sweep_curves, training_curves


def test_curves_read_sparse_columns(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text(
        "epoch,step,loss,train/loss_l1,val/AP\n0,0,4.0,1.0,\n0,10,2.0,nan,\n0,10,,,0.25\n1,20,1.0,0.5,\n1,20,,,0.5\n"
    )
    assert read_metrics(log) == {
        "loss": ([0, 10, 20], [4.0, 2.0, 1.0]),
        "train/loss_l1": ([0, 20], [1.0, 0.5]),
        "val/AP": ([10, 20], [0.25, 0.5]),
    }
    both = training_curves(log)
    assert np.asarray(both).std() > 10
    log.write_text("step,train/loss,train/lr,val/AR100\n0,4.0,0.1,\n5,,,\n")
    assert training_curves(log).width * 2 == both.width


def test_metrics_that_begin_with_one_word_share_a_panel(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    names = ["AP", "AP50", "APs", "AR100", "miou", "depth_rmse", "depth_rel", "accuracy_0.0-0.2", "accuracy"]
    log.write_text(f"step,{','.join(f'val/{name}' for name in names)}\n5{',0.5' * len(names)}\n")
    together = training_curves(log).width
    log.write_text("step,val/AP\n5,0.5\n")
    assert together == 5 * training_curves(log).width


def test_curves_without_data_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv"):
        training_curves(tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text("step,lr\n0,0.1\n")
    with pytest.raises(ValueError, match="nothing was logged"):
        training_curves(tmp_path / "metrics.csv")


def test_smoothing_keeps_constants_and_the_mean_of_a_line() -> None:
    assert _smooth([3.0] * 100) == pytest.approx([3.0] * 100)
    assert _smooth(list(range(100)))[50] == pytest.approx(50)
    assert _smooth([1.0, 5.0]).tolist() == [1.0, 5.0]


def sweep_row(mode: str, passes: int, ap: float | None, spread: float | None) -> dict:
    settings = {"mode": mode, "num_boxes": 100, "renewal_threshold": 0.5, "ensemble": True, "eta": 1.0}
    return (
        settings
        | {"nms_threshold": 0.5, "head_passes": passes}
        | {"AP": {"mean": ap, "spread": spread}, "seconds_per_image": 0.1 * passes}
    )


def sweep_colors(rows: list[dict]) -> dict[tuple[int, int, int], int]:
    """Pixels of each color in the picture of a sweep."""
    colors = sweep_curves(rows).getcolors(1 << 24)
    assert colors is not None
    return {color: count for count, color in colors}


def test_a_sweep_has_a_color_per_mode_and_bars_where_there_is_a_spread() -> None:
    blue, orange = (31, 119, 180), (255, 127, 14)
    one = [sweep_row("ddim", 1, 0.5, None), sweep_row("ddim", 4, 0.6, None)]
    two = [*one, sweep_row("fixed_time", 1, 0.5, 0.1), sweep_row("fixed_time", 4, 0.55, 0.1)]
    assert blue in sweep_colors(one)
    assert orange not in sweep_colors(one)
    with_bars = sweep_colors(two)[orange]
    for row in two:
        row["AP"]["spread"] = None
    assert sweep_colors(two)[orange] < with_bars


def test_a_legend_tells_pure_noise_from_the_times_that_boxes_start_from() -> None:
    assert _in_words("start_time", None) == "from noise"
    assert _in_words("start_time", 300) == "start_time 300"
    assert _in_words("renewal_threshold", None) == "renewal_threshold None"


def test_a_sweep_of_nothing_to_find_is_empty_axes() -> None:
    assert sweep_colors([sweep_row("ddim", 1, None, None), sweep_row("ddim", 2, None, None)])
