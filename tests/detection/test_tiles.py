"""Detection in windows: what they find is what the whole picture shows."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from diffperception.cli.main import main
from diffperception.data.tiles import Tiling, Window
from diffperception.detection import BoxSampler, Detector
from diffperception.detection.inference import detect_folder
from diffperception.detection.tiles import MAX_DETECTIONS, merge_windows, predict_images
from tests.detection.scenes import random_image, tiny_detector
from tests.detection.test_parts import masked_detector

SIDE = (230, 310)  # of the pictures
COLORS = np.array([[255, 0, 0], [0, 255, 0]], dtype=np.uint8)  # of the classes


class RectangleDetector(Detector):
    """Finds rectangles of pure red and green exactly, from their pixels alone; larger parts score higher."""

    def __init__(self, classes: Sequence[str] = ("red", "green")):
        super().__init__(classes)
        self.batches: list[list[tuple[int, int]]] = []

    def loss(
        self, images: list[Tensor], targets: list[dict], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    def predict(
        self, images: list[Tensor], seeds: Sequence[int] | None = None, sampler: BoxSampler | None = None
    ) -> list[dict[str, Tensor]]:
        self.batches.append([(image.shape[1], image.shape[2]) for image in images])
        return [self._rectangles(image) for image in images]

    def _rectangles(self, image: Tensor) -> dict[str, Tensor]:
        boxes, labels = [], []
        for label, color in enumerate(COLORS):
            inside = (image * 255 == torch.from_numpy(color)[:, None, None]).all(0).numpy()
            for down, across in ndimage.find_objects(ndimage.label(inside)[0]):
                boxes.append([across.start, down.start, across.stop, down.stop])
                labels.append(label)
        found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        scores = 0.5 + 0.4 * ((found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1]) / 1e5).clamp(max=1)
        best = scores.argsort(descending=True, stable=True)
        return {"boxes": found[best], "scores": scores[best], "labels": torch.tensor(labels, dtype=torch.int64)[best]}


def rectangles(seed: int, most: int, count: int = 40) -> np.ndarray:
    """A picture (H, W, 3) of disjoint rectangles of 5 to `most` pixels a side, one pixel apart at least."""
    rng = np.random.default_rng(seed)
    height, width = SIDE
    taken, pixels = np.zeros(SIDE, dtype=bool), np.zeros((*SIDE, 3), dtype=np.uint8)
    for _ in range(count):
        h, w = rng.integers(5, most + 1, size=2)
        y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        if not taken[max(y - 1, 0) : y + h + 1, max(x - 1, 0) : x + w + 1].any():
            taken[y : y + h, x : x + w] = True
            pixels[y : y + h, x : x + w] = COLORS[rng.integers(2)]
    return pixels


def found_in(detector: Detector, image: Tensor, tiling: Tiling, batch_size: int = 4) -> dict[str, Tensor]:
    return predict_images(detector, [image], [0], None, tiling, batch_size)[0]


def as_set(found: dict[str, Tensor]) -> list[tuple[float, ...]]:
    return sorted((*box, label) for box, label in zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True))


@pytest.mark.parametrize(("tile", "overlap", "most"), [(64, 24, 24), (100, 40, 40), (64, 24, 60), (90, 10, 80)])
def test_windows_find_the_rectangles_of_the_whole_picture_once(tile: int, overlap: int, most: int) -> None:
    """Those longer than the overlap too, which no window shows whole."""
    detector = RectangleDetector()
    for seed in range(6):
        image = torch.from_numpy(rectangles(seed, most)).permute(2, 0, 1)
        whole = found_in(detector, image / 255, Tiling())
        assert len(whole["boxes"]) > 10
        assert as_set(found_in(detector, image, Tiling(tile, overlap))) == as_set(whole)


def test_rectangles_on_every_border_and_corner_of_the_windows_come_once() -> None:
    pixels = np.zeros((*SIDE, 3), dtype=np.uint8)
    tiling, size, expected = Tiling(80, 30), 26, set()
    windows = tiling.windows(*SIDE)
    for number, (left, top, right, bottom) in enumerate(windows):
        for x, y in ((left, top), (right, bottom), ((left + right) // 2, top)):
            x, y = max(x - size // 2, 0), max(y - size // 2, 0)
            room = pixels[max(y - 1, 0) : y + size + 1, max(x - 1, 0) : x + size + 1]
            if not room.any() and x + size <= SIDE[1] and y + size <= SIDE[0]:
                pixels[y : y + size, x : x + size] = COLORS[number % 2]
                expected.add((x, y, x + size, y + size, number % 2))
    assert len(expected) > len(windows) / 2
    found = found_in(RectangleDetector(), torch.from_numpy(pixels).permute(2, 0, 1), tiling)
    assert as_set(found) == sorted(expected)


def test_only_windows_reach_the_detector_and_no_more_than_a_batch() -> None:
    detector = RectangleDetector()
    found_in(detector, torch.zeros(3, *SIDE, dtype=torch.uint8), Tiling(64, 16), batch_size=5)
    assert {size for batch in detector.batches for size in batch} == {(64, 64)}
    assert max(map(len, detector.batches)) == 5
    assert sum(map(len, detector.batches)) == len(Tiling(64, 16).windows(*SIDE))


def test_detections_in_windows_do_not_depend_on_the_batch_size() -> None:
    detector, image = tiny_detector(), random_image(70, 90)
    one, three = (found_in(detector, image, Tiling(40, 8), batch_size) for batch_size in (1, 3))
    assert len(one["boxes"]) > 20
    for name in one:
        torch.testing.assert_close(one[name], three[name], atol=1e-3, rtol=1e-4)
    images = [image, random_image(60, 50, seed=1)]
    forth = predict_images(detector, images, [3, 4], None, Tiling(40, 8), 2)
    back = predict_images(detector, images[::-1], [4, 3], None, Tiling(40, 8), 2)[::-1]
    for a, b in zip(forth, back, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    other = predict_images(detector, images, [5, 4], None, Tiling(40, 8), 2)
    assert not torch.equal(forth[0]["scores"], other[0]["scores"])
    assert torch.equal(forth[1]["scores"], other[1]["scores"])


def test_the_noise_of_windows_differs() -> None:
    """A picture that repeats itself is not predicted from the same boxes over and over."""
    detector, part = tiny_detector(), random_image(32, 32)
    found = detector.predict([part, part], [0, 0])
    assert torch.equal(found[0]["boxes"], found[1]["boxes"])
    merged = found_in(detector, part.repeat(1, 1, 2), Tiling(32, 0))
    left = merged["boxes"][:, 0] < 32
    assert sorted(merged["scores"][left].tolist()) != sorted(merged["scores"][~left].tolist())


def test_a_picture_no_larger_than_the_tile_is_predicted_as_without() -> None:
    detector, image = tiny_detector(), random_image(48, 64)
    (plain,) = predict_images(detector, [image], [7], None, Tiling(), 1)
    (tiled,) = predict_images(detector, [image], [7], None, Tiling(64, 16), 1)
    assert all(torch.equal(plain[name], tiled[name]) for name in plain)


def detections(*rows: tuple[list[float], float, int]) -> dict[str, Tensor]:
    boxes, scores, labels = zip(*rows, strict=True) if rows else ([], [], [])
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


WINDOWS = [Window(0, 0, 100, 100), Window(60, 0, 160, 100)]


def test_a_whole_object_replaces_the_piece_that_another_window_shows() -> None:
    piece, whole = ([75.0, 10, 100, 40], 0.9, 0), ([15.0, 10, 55, 40], 0.7, 0)
    merged = merge_windows([detections(piece), detections(whole)], WINDOWS, 0.5)
    assert merged["boxes"].tolist() == [[75, 10, 115, 40]]
    assert merged["scores"].tolist() == pytest.approx([0.7])


def test_pieces_stay_where_the_neighbour_sees_another_class_or_hardly_anything() -> None:
    piece = ([75.0, 10, 100, 40], 0.9, 0)
    for other in (([15.0, 10, 90, 40], 0.7, 1), ([15.0, 10, 90, 40], 0.1, 0), ([15.0, 60, 90, 90], 0.7, 0)):
        merged = merge_windows([detections(piece), detections(other)], WINDOWS, 0.5)
        assert len(merged["boxes"]) == 2


def test_boxes_at_the_border_of_the_picture_are_not_cut() -> None:
    """A small one beside a large one of its class in the other window stays what it is."""
    edge = ([0.0, 10, 30, 40], 0.9, 0)
    assert len(merge_windows([detections(edge), detections()], WINDOWS, 0.5)["boxes"]) == 1
    corner = merge_windows([detections(), detections(([60.0, 0, 100, 100], 0.5, 1))], WINDOWS, 0.5)
    assert corner["boxes"].tolist() == [[120, 0, 160, 100]]


def test_nothing_found_is_nothing_found() -> None:
    merged = merge_windows([detections(), detections()], WINDOWS, 0.5)
    assert merged["boxes"].shape == (0, 4)


def test_the_best_detections_of_a_picture_stay() -> None:
    rng = np.random.default_rng(0)
    rows = [
        ([x := float(i % 95), y := float(i // 95), x + 1, y + 1], float(rng.uniform(0.1, 1)), 0) for i in range(5000)
    ]
    merged = merge_windows([detections(*rows), detections()], WINDOWS, None)
    assert len(merged["scores"]) == MAX_DETECTIONS
    assert merged["scores"].min() >= torch.tensor([score for _, score, _ in rows]).sort().values[-MAX_DETECTIONS]
    assert (merged["scores"].diff() <= 0).all()


def write_pictures(folder: Path) -> tuple[Path, Path]:
    """Pictures of rectangles larger and smaller than a tile, and their boxes as a COCO file."""
    (folder / "images").mkdir(parents=True)
    images, annotations, detector = [], [], RectangleDetector()
    for number in range(3):
        pixels = rectangles(number, 30)[:: 1 + (number == 2), :: 1 + (number == 2)]
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        height, width = pixels.shape[:2]
        images.append({"id": number + 1, "file_name": f"{number}.png", "width": width, "height": height})
        found = detector.predict([torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255])[0]
        for (x1, y1, x2, y2), label in zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True):
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            row = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": label + 1}
            annotations.append(row | box)
    categories = [{"id": k, "name": name} for k, name in enumerate(("red", "green"), 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "data.json").write_text(json.dumps(content))
    return folder / "data.json", folder / "images"


def test_a_score_in_windows_is_that_of_their_results(tmp_path: Path) -> None:
    annotations, images = write_pictures(tmp_path)
    RectangleDetector().save(tmp_path / "model.safetensors")
    options = ["--tile", "130", "--overlap", "40", "--device", "cpu", "--workers", "0", "--trust", "tests"]
    common = ["--model", str(tmp_path / "model.safetensors"), "--images", str(images), *options]
    predicted, direct, scored = tmp_path / "predicted", tmp_path / "direct", tmp_path / "scored"
    truth = ["--annotations", str(annotations)]
    assert main(["predict", *common, "--output", str(predicted)]) == 0
    assert main(["evaluate", *common, *truth, "--output", str(direct)]) == 0
    results = ["--results", str(predicted / "predictions.json"), "--output", str(scored)]
    assert main(["evaluate", *truth, *results]) == 0
    metrics = [json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (direct, scored)]
    assert metrics[0] == metrics[1]
    assert metrics[0]["AP"] == 1
    assert len(list((predicted / "pictures").iterdir())) == 3


def test_trajectories_are_drawn_of_whole_pictures_alone(tmp_path: Path) -> None:
    for name, width in (("large", 90), ("small", 30)):
        Image.effect_noise((width, 30), 90).convert("RGB").save(tmp_path / f"{name}.png")
    detect_folder(tiny_detector(), tmp_path, tmp_path / "out", workers=0, tile=40, overlap=8)
    assert [path.name for path in (tmp_path / "out" / "trajectories").iterdir()] == ["small.png"]


def test_masks_and_sweeps_over_windows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, images = write_pictures(tmp_path)
    with pytest.raises(ValueError, match="gives masks, which are not put together over windows"):
        detect_folder(masked_detector(), images, tmp_path / "out", workers=0, tile=64, overlap=8)
    assert not (tmp_path / "out").exists()
    detector = tiny_detector(classes=["red", "green"])
    detector.save(tmp_path / "model.safetensors")
    where = ["--model", str(tmp_path / "model.safetensors"), "--annotations", str(annotations), "--images", str(images)]
    assert main(["evaluate", *where, "--tile", "64", "--overlap", "8", "--steps", "1", "2"]) == 2
    assert "a sweep takes images whole" in capsys.readouterr().err
    assert main(["evaluate", *where, "--tile", "64", "--overlap", "64"]) == 2
    assert "overlap is 64: it must be from 0 to below tile" in capsys.readouterr().err
