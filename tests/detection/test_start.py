"""Starting from boxes instead of pure noise: what enters the first step, what equals prediction without them."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffperception.cli.main import main
from diffperception.data import CocoDetection
from diffperception.detection import FCOS, BoxSampler, DiffusionDet
from diffperception.detection.boxes import decode_boxes, encode_boxes
from diffperception.detection.evaluator import results_rows
from diffperception.detection.inference import detect_folder, evaluate_detector
from diffperception.detection.start import best_boxes, read_start
from diffperception.detection.sweep import combine, sweep_sampler
from diffperception.detection.targets import image_sizes
from diffperception.diffusion import SampleNoise, sample_seed
from tests.detection.scenes import assert_same_detections, random_boxes, random_image, tiny_detector
from tests.training.tiny_data import CLASSES, write_tiny_data

IMAGES = [random_image(64, 96, 1), random_image(70, 50, 2)]
BOXES = random_boxes(3, 96, 64)
SEEDS = [4, 5]
LAST = 999  # T - 1


@pytest.fixture(scope="module")
def detector() -> DiffusionDet:
    return tiny_detector()


def entering(detector: DiffusionDet, start: list[Tensor | None], **settings: object) -> Tensor:
    """The boxes that enter the first step, in pixels of the images as they were given."""
    encoded = detector.encode(IMAGES)
    sampled = detector.sample(encoded, SEEDS, replace(detector.sampler, **settings), start)
    return sampled[0].noisy_boxes * (encoded.sizes / encoded.seen)[:, None]


def assert_equal(a: list[dict], b: list[dict]) -> None:
    assert all(torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x.keys() | y.keys())


@pytest.mark.parametrize(("mode", "steps"), [("ddim", 1), ("ddim", 4), ("fixed_time", 2), ("fresh_boxes", 2)])
def test_pure_noise_at_the_last_time_is_prediction_as_always(detector: DiffusionDet, mode: str, steps: int) -> None:
    sampler = BoxSampler(steps, 15, mode=mode)
    plain = detector.predict(IMAGES, SEEDS, sampler)
    assert_equal(detector.predict(IMAGES, SEEDS, sampler, start=[torch.empty(0, 4), None], start_time=LAST), plain)
    assert len(plain[0]["boxes"])


def test_spread_noise_changes_the_boxes_and_not_the_noise_of_the_steps(detector: DiffusionDet) -> None:
    plain, spread = (BoxSampler(3, 15, spread=on).draw(SEEDS) for on in (False, True))
    assert torch.equal(plain[1::2], spread[1::2])
    assert not torch.isclose(plain[::2], spread[::2]).any()
    drawn = entering(detector, [None, None], start_time=LAST, spread=True)
    sizes = image_sizes(IMAGES)
    expected = decode_boxes(BoxSampler(1, 20, spread=True).draw(SEEDS)[0], sizes, 2.0)
    whole = (expected[..., 2:] - expected[..., :2]).amin(-1) >= 1  # others are widened to a pixel
    torch.testing.assert_close(drawn[whole], expected[whole])
    both = detector.predict(IMAGES, SEEDS, BoxSampler(2, 15, spread=True))
    assert_same_detections(both[1:], detector.predict(IMAGES[1:], SEEDS[1:], BoxSampler(2, 15, spread=True)))


def test_an_image_without_boxes_is_as_always_beside_one_that_has_some(detector: DiffusionDet) -> None:
    plain = detector.predict(IMAGES, SEEDS, steps=2)
    mixed = detector.predict(IMAGES, SEEDS, steps=2, start=[BOXES, torch.empty(0, 4)], start_time=LAST)
    assert_equal(mixed[1:], plain[1:])
    alone = detector.predict(IMAGES[:1], SEEDS[:1], steps=2, start=[BOXES], start_time=LAST)
    assert_same_detections(mixed[:1], alone)
    assert not torch.equal(mixed[0]["scores"], plain[0]["scores"])


@pytest.mark.parametrize("time", [0, 300, LAST])
def test_boxes_are_noised_as_in_training_and_the_rest_is_noise(detector: DiffusionDet, time: int) -> None:
    found = entering(detector, [BOXES, None], start_time=time)
    sizes, scale = image_sizes(IMAGES), detector.signal_scale
    noise = SampleNoise(SEEDS)(torch.empty(2, 20, 4))
    alpha, sigma = (float(x(torch.tensor(time))) for x in (detector.schedule.alpha, detector.schedule.sigma))
    noised = alpha * encode_boxes(BOXES[None], sizes[:1], scale) + sigma * noise[:1, :3]
    wide = (found[0, :3, 2:] - found[0, :3, :2] > 1.001).all(1)  # those that no step would widen
    assert wide.any()
    torch.testing.assert_close(found[0, :3][wide], decode_boxes(noised, sizes[:1], scale)[0][wide], atol=1e-3, rtol=0)
    plain = entering(detector, [None, None], start_time=time)
    assert torch.equal(found[0, 3:], plain[0, 3:])
    assert torch.equal(found[1], plain[1])


def test_boxes_are_in_pixels_of_the_images_that_are_given_and_stay_there_at_the_first_times() -> None:
    found = entering(tiny_detector(min_size=32, max_size=40), [BOXES, None], start_time=0)
    torch.testing.assert_close(found[0, :3], BOXES, atol=4.0, rtol=0)


def test_steps_go_from_the_time_that_is_given_to_the_clean_end(detector: DiffusionDet) -> None:
    encoded = detector.encode(IMAGES)
    for steps, times in [(1, [300]), (2, [300, 149]), (4, [300, 224, 149, 74])]:
        sampler = BoxSampler(steps, 20, start_time=300)
        assert [step.t for step in detector.sample(encoded, SEEDS, sampler, [BOXES, None])] == times
    assert len(detector.predict(IMAGES, SEEDS, steps=4, start=[None, None], start_time=3)) == 2
    with pytest.raises(ValueError, match=r"between 1 and 4 steps from the time 3 on, not 5"):
        detector.predict(IMAGES, SEEDS, steps=5, start=[None, None], start_time=3)


def test_a_detector_that_keeps_what_it_is_given_keeps_a_users_boxes_at_a_low_time(detector: DiffusionDet) -> None:
    class Keeper(type(detector.head)):
        def forward(self, pyramid, boxes, t, last_only=False):
            output = super().forward(pyramid, boxes, t, last_only)
            return replace(output, boxes=boxes.expand_as(output.boxes))

    keeper = tiny_detector(head=Keeper(3, 2, 32, dynamic_width=8, ffn_width=32, num_heads=4), num_boxes=3)
    sampler = BoxSampler(2, eta=0.0, renewal_threshold=None, ensemble=False, nms_threshold=None)
    (found,) = keeper.predict(IMAGES[:1], SEEDS[:1], sampler, start=[BOXES], start_time=1)
    nearest = torch.cdist(found["boxes"], BOXES, p=1)
    assert set(nearest.argmin(1).tolist()) == {0, 1, 2}
    assert nearest.amin(1).max() < 15


@pytest.mark.parametrize(
    ("start", "time", "words"),
    [
        ([BOXES], 300, "start has boxes of 1 images, but there are 2"),
        ([BOXES[:, :3], None], 300, "start of image 0 has the shape (3, 3): it must be (n, 4)"),
        ([None, BOXES], 300, "start of image 1 has a box ["),
        ([torch.tensor([[30.0, 5, 20, 9]]), None], 300, "[30, 5, 20, 9] that is no xyxy box in the 96x64 pixels"),
        ([torch.tensor([[30.0, 5, torch.nan, 9]]), None], 300, "is no xyxy box"),
        ([random_boxes(21, 96, 64), None], 300, "start of image 0 has 21 boxes, more than num_boxes, 20"),
        ([BOXES, None], 1000, "start_time is 1000: it must be from 0 to 999"),
        ([BOXES, None], -1, "start_time is -1"),
        ([BOXES, None], None, "need a start_time, from 0 to 999"),
        (None, 300, "start_time is 300, but there are no boxes to start from"),
    ],
)
def test_what_cannot_be_started_from_is_said(
    detector: DiffusionDet, start: list[Tensor | None], time: int | None, words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        detector.predict(IMAGES, SEEDS, start=start, start_time=time)


def test_boxes_that_reach_out_by_less_than_a_pixel_are_clipped(detector: DiffusionDet) -> None:
    over = torch.tensor([[-0.5, 3.0, 96.5, 40.0]])
    clipped = torch.tensor([[0.0, 3.0, 96.0, 40.0]])
    first, second = (entering(detector, [boxes, None], start_time=100) for boxes in (over, clipped))
    assert torch.equal(first, second)


def test_a_trajectory_starts_there_too(detector: DiffusionDet) -> None:
    sampler = replace(detector.sampler, steps=2, start_time=200)
    steps, found = detector.trajectory(IMAGES[0], 4, sampler, BOXES)
    assert [step["t"] for step in steps] == [200, 99]
    assert torch.equal(found["boxes"], detector.predict(IMAGES[:1], [4], sampler, start=[BOXES])[0]["boxes"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A data set, a detector of its classes, and a results file: the detector's own boxes of all images but one."""
    folder = tmp_path_factory.mktemp("start")
    annotations, images = write_tiny_data(folder, images=4)
    model = tiny_detector(classes=list(CLASSES.values()), num_boxes=12)
    model.save(folder / "model.safetensors")
    rows = []
    for image, target in list(CocoDetection(annotations, images))[:3]:
        (found,) = model.predict([image], seeds=[9])
        rows += results_rows(target["image_id"], found, list(CLASSES))[::-1]  # the best last
    (folder / "results.json").write_text(json.dumps(rows))
    names = {"annotations": annotations, "images": images}
    return names | {name.split(".")[0]: folder / name for name in ("model.safetensors", "results.json")}


def test_the_best_boxes_of_a_results_file_are_started_from(data: dict[str, Path]) -> None:
    dataset = CocoDetection(data["annotations"], data["images"])
    start = read_start(data["results"], dataset.table)
    rows = json.loads(data["results"].read_text())
    assert list(start) == dataset.image_ids[:3]
    best = max((row for row in rows if row["image_id"] == 11), key=lambda row: row["score"])
    x, y, w, h = best["bbox"]
    torch.testing.assert_close(start[11][0], torch.tensor([x, y, x + w, y + h]), atol=1e-3, rtol=0)
    few = best_boxes(start, [11, 13], 2)
    assert torch.equal(few[0], start[11][:2])
    assert few[1].shape == (0, 4)


def test_evaluation_and_sweep_start_from_the_file(data: dict[str, Path], tmp_path: Path) -> None:
    detector, dataset = DiffusionDet.load(data["model"]), CocoDetection(data["annotations"], data["images"])
    sampler = detector.sampler_with(start_time=250, steps=2, num_boxes=5)
    result = evaluate_detector(detector, dataset, sampler=sampler, start=data["results"], batch_size=1)
    assert result.notes == [f"3 of 4 images start from boxes of {data['results']}, the others from noise."]
    start, expected = read_start(data["results"], dataset.table), []
    for image, target in dataset:
        number = target["image_id"]
        (found,) = detector.predict([image], [sample_seed(0, number)], sampler, start=best_boxes(start, [number], 5))
        expected += results_rows(number, found, dataset.category_ids)
    assert result.detections == expected
    content = json.loads(data["annotations"].read_text())
    content["annotations"] = [row | {"id": i, "area": 9} for i, row in enumerate(expected, 1) if i % 2]
    (tmp_path / "truth.json").write_text(json.dumps(content))  # of which the second row below finds about a half
    sweep = sweep_sampler(
        detector,
        CocoDetection(tmp_path / "truth.json", data["images"]),
        combine(detector, {"start_time": [250, 800], "steps": [1, 2], "num_boxes": 5}),
        [0],
        start=data["results"],
    )
    assert [asdict(row.sampler)["start_time"] for row in sweep.rows] == [250, 250, 800, 800]
    assert 0.4 < sweep.rows[1].ap.mean < 1
    assert max(row.ap.mean for row in [sweep.rows[0], *sweep.rows[2:]]) < 0.4
    assert sweep.table().splitlines()[0].split()[:4] == ["mode", "boxes", "start", "steps"]


def test_a_sweep_has_pure_noise_beside_the_file(data: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    detector, dataset = DiffusionDet.load(data["model"]), CocoDetection(data["annotations"], data["images"])
    both = combine(detector, {"start_time": ["noise", 800], "steps": 2})
    assert both == [detector.sampler_with(steps=2), detector.sampler_with(steps=2, start_time=800)]
    files = ["--model", str(data["model"]), "--annotations", str(data["annotations"]), "--images", str(data["images"])]
    options = ["--device", "cpu", "--workers", "0", "--start_time", "noise", "800", "--steps", "2"]
    assert main(["evaluate", *files, *options, "--start", str(data["results"])]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[2] for line in printed.splitlines()[:3]] == ["start", "noise", "800"]
    assert f"start: 3 of 4 images start from boxes of {data['results']}, the others from noise. What made" in printed
    mixed = sweep_sampler(detector, dataset, both, [0], start=data["results"])
    (noise,) = sweep_sampler(detector, dataset, both[:1], [0]).rows
    assert mixed.rows[0].ap.by_seed == noise.ap.by_seed
    with pytest.raises(ValueError, match="need a start_time, from 0 to 999"):
        sweep_sampler(detector, dataset, both[:1], [0], start=data["results"])


def test_the_commands_start_from_predictions_of_another_run(
    data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(data["model"]), "--device", "cpu", "--workers", "0"]
    photos = ["predict", *model, "--images", str(data["images"])]
    plain = ["--num_pictures", "0", "--num_trajectories", "0"]
    assert main([*photos, "--output", str(tmp_path / "first"), *plain]) == 0
    predictions = tmp_path / "first/predictions.json"
    warm = ["--start", str(predictions), "--start_time", "200", "--steps", "2"]
    capsys.readouterr()
    assert main([*photos, "--output", str(tmp_path / "warm"), *warm, "--num_pictures", "1"]) == 0
    assert f"4 of 4 images start from boxes of {predictions}, the others from noise" in capsys.readouterr().out
    assert (tmp_path / "warm/trajectories/0.png").is_file()
    first, second = (json.loads((tmp_path / n / "predictions.json").read_text()) for n in ("first", "warm"))
    assert first != second
    score = ["evaluate", *model, "--annotations", str(data["annotations"]), "--images", str(data["images"])]
    assert main([*score, *warm, "--batch_size", "1", "--output", str(tmp_path / "scores"), "--num_pictures", "1"]) == 0
    assert "4 of 4 images start from boxes of" in capsys.readouterr().out
    with_ids = ["--annotations", str(data["annotations"]), *warm, *plain]
    assert main([*photos, "--output", str(tmp_path / "ids"), *with_ids]) == 0
    assert json.loads((tmp_path / "ids/predictions.json").read_text()) == json.loads(
        (tmp_path / "scores/detections.json").read_text()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--start_time", "200"], "there are no boxes to start from"),
        (["--start", "RESULTS"], "need a start_time, from 0 to 999"),
        (["--start", "RESULTS", "--start_time", "1000"], "start_time is 1000: it must be from 0 to 999"),
        (["--start", "RESULTS", "--start_time", "200"], "that says which images its ids mean"),
        (["--start", "RESULTS", "--start_time", "200", "--tile", "16"], "leave the option tile out"),
        (["--start", "absent.json", "--start_time", "200"], "absent.json"),
        (["--start_time", "many"], "option start_time: expected a whole number from 0 on or noise, got many"),
        (["--start", "RESULTS", "--start_time", "noise"], "need a start_time, from 0 to 999"),
    ],
)
def test_a_start_that_cannot_be_is_one_sentence(
    data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    given = [str(data["results"]) if word == "RESULTS" else word for word in options]
    where = ["--model", str(data["model"]), "--images", str(data["images"]), "--output", str(tmp_path / "out")]
    assert main(["predict", *where, "--device", "cpu", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_results_file_of_other_images_is_refused(data: dict[str, Path], tmp_path: Path) -> None:
    rows = json.loads(data["results"].read_text())
    (tmp_path / "far.json").write_text(json.dumps([rows[0] | {"bbox": [10, 10, 500, 5]}]))
    dataset, detector = CocoDetection(data["annotations"], data["images"]), DiffusionDet.load(data["model"])
    sampler = detector.sampler_with(start_time=250)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'far.json'}: image 10 has a box [10, 10, 510, 15]")):
        evaluate_detector(detector, dataset, sampler=sampler, start=tmp_path / "far.json")


def test_a_detector_that_starts_from_nothing_says_so(data: dict[str, Path], tmp_path: Path) -> None:
    fcos = FCOS(list(CLASSES.values()), "test_resnet", width=64, min_size=None).eval()
    with pytest.raises(ValueError, match="FCOS has no option start_time"):
        fcos.sampler_with(start_time=3)
    with pytest.raises(ValueError, match="FCOS starts from no boxes"):
        detect_folder(fcos, data["images"], tmp_path / "out", start=data["results"])
