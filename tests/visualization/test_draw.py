import numpy as np
import pytest
import torch
from PIL import Image

from diffperception import visualize
from diffperception.visualization.draw import Mark, class_colour

CLASSES = ["circle", "square"]
GREY_IMAGE = torch.full((3, 480, 640), 0.5)


def detections(*boxes, labels=None, scores=None):
    found = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels if labels is not None else [0] * len(boxes)),
    }
    return found if scores is None else found | {"scores": torch.tensor(scores)}


def has(picture: Image.Image, colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(picture) == colour).all(axis=-1).any())


def test_a_box_is_drawn_in_the_colour_of_its_class_where_it_is():
    picture = visualize.draw_detections(GREY_IMAGE, detections((100, 200, 300, 400), labels=[1]), CLASSES)
    assert picture.size == (640, 480)
    for point in ((200, 200), (200, 400), (100, 300), (300, 300)):
        assert picture.getpixel(point) == class_colour(1)
    assert picture.getpixel((200, 300)) == picture.getpixel((20, 20)) == (128, 128, 128)
    assert not has(picture, class_colour(0))


def test_low_scores_are_not_drawn_and_nothing_is_drawn_on_an_image_without_objects():
    found = detections((10, 10, 90, 90), (200, 200, 300, 300), labels=[0, 1], scores=[0.3, 0.6])
    picture = visualize.draw_detections(GREY_IMAGE, found, CLASSES, threshold=0.5)
    assert has(picture, class_colour(1))
    assert not has(picture, class_colour(0))
    empty = visualize.draw_detections(GREY_IMAGE, detections(scores=[]), CLASSES)
    assert np.unique(np.asarray(empty)).tolist() == [128]


def test_small_images_are_enlarged_with_their_boxes():
    picture = visualize.draw_detections(torch.zeros(3, 60, 100), detections((10, 20, 60, 50)), CLASSES)
    assert picture.size == (500, 300)
    assert picture.getpixel((150, 100)) == class_colour(0)


def test_large_images_are_made_smaller():
    picture = visualize.draw_detections(torch.zeros(3, 1000, 3200), detections((400, 400, 1200, 1000)), CLASSES)
    assert picture.size == (1600, 500)
    assert picture.getpixel((400, 200)) == class_colour(0)


def test_class_colours_differ_and_none_looks_wrong():
    colours = np.array([class_colour(k) for k in range(20)])
    assert len(np.unique(colours, axis=0)) == 20
    assert np.abs(colours - np.array(visualize.WRONG)).max(axis=1).min() > 60


def test_matching_takes_each_object_once_and_needs_its_class():
    target = detections((0, 0, 10, 10), (50, 50, 60, 60), (80, 80, 90, 90), labels=[0, 0, 1])
    found, right = visualize.match(
        target,
        detections(
            (0, 0, 10, 9), (0, 0, 10, 10), (80, 80, 90, 90), (50, 50, 55, 54), labels=[0] * 4, scores=[0.5, 0.9, 1, 1]
        ),
        torch.zeros(3, dtype=torch.bool),
    )
    assert found.tolist() == [True, False, False]
    assert right.tolist() == [False, True, False, False]


def test_misses_and_wrong_boxes_are_red():
    target = detections((50, 50, 200, 200), (300, 300, 400, 400))
    perfect = visualize.side_by_side(GREY_IMAGE, target, target | {"scores": torch.ones(2)}, CLASSES)
    assert not has(perfect, visualize.WRONG)
    assert perfect.width == 2 * 640 + 8
    half = detections((50, 50, 200, 200), (500, 10, 600, 90), scores=[0.9, 0.8])
    picture = visualize.side_by_side(GREY_IMAGE, target, half, CLASSES)
    left, right = picture.crop((0, 28, 640, 508)), picture.crop((648, 28, 1288, 508))
    assert left.getpixel((302, 300)) == visualize.WRONG
    assert right.getpixel((502, 10)) == visualize.WRONG
    assert left.getpixel((120, 50)) == right.getpixel((120, 50)) == class_colour(0)


def test_dashes_at_the_border_of_the_image_are_seen():
    picture = visualize.paint(GREY_IMAGE, [Mark((300, 200, 640, 480), visualize.WRONG, dashed=True)])
    edges = np.asarray(picture)[300:400, 639], np.asarray(picture)[479, 400:500]
    for edge in edges:
        assert 0.4 < (edge == visualize.WRONG).all(axis=-1).mean() < 0.8


def test_crowds_are_neither_found_nor_missed():
    target = detections((50, 50, 200, 200)) | {"iscrowd": torch.tensor([1])}
    picture = visualize.side_by_side(GREY_IMAGE, target, detections(scores=[]), CLASSES)
    assert has(picture, visualize.GREY)
    assert not has(picture, visualize.WRONG)


@pytest.mark.parametrize(("steps", "columns"), [(1, 3), (2, 4), (4, 6), (50, 6)])
def test_the_strip_shows_noise_steps_and_detections(steps, columns):
    step = {
        "boxes": torch.tensor([[10.0, 10, 50, 50], [60, 20, 90, 80]]),
        "predicted": torch.tensor([[20.0, 20, 50, 50], [60, 30, 90, 80]]),
        "scores": torch.tensor([0.1, 0.9]),
        "labels": torch.tensor([0, 1]),
    }
    trace = [{"t": t, **step} for t in np.linspace(999, 249, steps).astype(int).tolist()]
    found = detections((20, 20, 50, 50), scores=[0.9])
    strip = visualize.trajectory_strip(torch.rand(3, 90, 120), trace, found, CLASSES)
    assert strip.width >= columns * visualize.STRIP_SIDE + (columns - 1) * 8
    assert strip.width < (columns + 1) * visualize.STRIP_SIDE


def test_boxes_of_lower_scores_are_fainter():
    marks = [Mark((50, y, 300, y + 50), (255, 255, 255), opacity=o) for y, o in ((20, 0.2), (120, 0.5), (220, 1.0))]
    picture = visualize.paint(torch.zeros(3, 480, 640), marks)
    assert [picture.getpixel((100, y))[0] for y in (20, 120, 220)] == [51, 128, 255]


def test_texts_of_neighbours_keep_apart():
    taken = []
    for _ in range(4):
        taken.append(visualize._place((100, 100, 200, 200), 60, 18, (640, 480), taken))
    overlaps = [visualize._overlap(a, b) for i, a in enumerate(taken) for b in taken[:i]]
    assert overlaps == [0.0] * 6
    corner = visualize._place((600, 0, 640, 10), 90, 18, (640, 480), [])
    assert corner == (550, 0, 640, 18)


def test_pictures_are_stacked_without_cutting():
    pictures = [Image.new("RGB", (30, 10), (1, 2, 3)), Image.new("RGB", (20, 40), (4, 5, 6))]
    assert visualize.stack(pictures, gap=5).size == (55, 40)
    assert visualize.stack(pictures, vertical=True, gap=5).size == (30, 55)
    assert visualize.titled(pictures[0], "a title longer than the picture").width > 200


def test_curves_read_sparse_columns(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text(
        "epoch,step,loss,train/loss_l1,val/AP\n0,0,4.0,1.0,\n0,10,2.0,nan,\n0,10,,,0.25\n1,20,1.0,0.5,\n1,20,,,0.5\n"
    )
    assert visualize.read_metrics(log) == {
        "loss": ([0, 10, 20], [4.0, 2.0, 1.0]),
        "loss_l1": ([0, 20], [1.0, 0.5]),
        "AP": ([10, 20], [0.25, 0.5]),
    }
    both = visualize.curves(log)
    assert np.asarray(both).std() > 10
    log.write_text("step,train/loss,train/lr,val/AR100\n0,4.0,0.1,\n5,,,0.3\n")
    assert visualize.curves(log).width * 2 == both.width


def test_curves_without_data_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv"):
        visualize.curves(tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text("step,lr\n0,0.1\n")
    with pytest.raises(ValueError, match="nothing was logged"):
        visualize.curves(tmp_path / "metrics.csv")


def test_smoothing_keeps_constants_and_the_mean_of_a_line():
    assert visualize._smooth([3.0] * 100) == pytest.approx([3.0] * 100)
    assert visualize._smooth(list(range(100)))[50] == pytest.approx(50)
    assert visualize._smooth([1.0, 5.0]).tolist() == [1.0, 5.0]


def test_png_files_replace_whole(tmp_path):
    path = tmp_path / "new" / "picture.png"
    visualize.save_png(Image.new("RGB", (4, 4), (9, 9, 9)), path)
    visualize.save_png(Image.new("RGB", (8, 4), (9, 9, 9)), path)
    assert Image.open(path).size == (8, 4)
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


def audit_row(mode: str, passes: int, ap: float | None, spread: float | None) -> dict:
    settings = {"mode": mode, "num_boxes": 100, "renewal_threshold": 0.5, "ensemble": True, "eta": 1.0}
    return (
        settings
        | {"nms_threshold": 0.5, "head_passes": passes}
        | {"AP": {"mean": ap, "spread": spread}, "seconds_per_image": 0.1 * passes}
    )


def audit_colours(rows: list[dict]) -> dict[tuple[int, int, int], int]:
    """Pixels of each colour in the picture of an audit."""
    colours = visualize.audit_curves(rows).getcolors(1 << 24)
    assert colours is not None
    return {colour: count for count, colour in colours}


def test_an_audit_has_a_colour_a_mode_and_bars_where_there_is_a_spread():
    blue, orange = (31, 119, 180), (255, 127, 14)
    one = [audit_row("ddim", 1, 0.5, None), audit_row("ddim", 4, 0.6, None)]
    two = [*one, audit_row("fixed_time", 1, 0.5, 0.1), audit_row("fixed_time", 4, 0.55, 0.1)]
    assert blue in audit_colours(one)
    assert orange not in audit_colours(one)
    with_bars = audit_colours(two)[orange]
    for row in two:
        row["AP"]["spread"] = None
    assert audit_colours(two)[orange] < with_bars


def test_an_audit_of_nothing_to_find_is_empty_axes():
    assert audit_colours([audit_row("ddim", 1, None, None), audit_row("ddim", 2, None, None)])
