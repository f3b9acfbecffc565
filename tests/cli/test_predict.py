import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from diffperception.cli.main import main
from diffperception.data import CocoDetection
from diffperception.data.annotations import tabulate
from diffperception.data.images import read_image
from diffperception.detection import FCOS, BoxSampler, DiffusionDet, DynamicHead
from diffperception.detection.evaluator import CocoEvaluator, results_rows
from diffperception.detection.inference import evaluate_detector
from diffperception.diffusion import name_seed
from tests.helpers.runs import TORCHRUN, python

CLASSES = ["circle", "square", "star"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny detector with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    head = partial(DynamicHead, stages=2, width=16, pool_size=3, dynamic_width=8, ffn_width=16, num_heads=2)
    DiffusionDet(CLASSES, "resnet18", head, num_boxes=12, min_size=64, max_size=96).save(path)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """Five images of different sizes and formats, one of them in a subfolder; one broken image; one text."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "c.bmp", "d.png", "more/a.png")):
        Image.effect_noise((60 + 10 * i, 80), 90).convert("RGB").save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:900])
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(model: Path, images: Path | str, output: Path, *options: str) -> int:
    where = ["--model", str(model), "--images", str(images), "--output", str(output)]
    return main(["predict", *where, "--workers", "0", "--device", "cpu", *options])


def read(output: Path) -> tuple[dict, list[dict]]:
    return json.loads((output / "images.json").read_text()), json.loads((output / "predictions.json").read_text())


def by_name(output: Path) -> dict[str, list]:
    images, rows = read(output)
    return {
        image["file_name"]: [(r["category_id"], r["bbox"], r["score"]) for r in rows if r["image_id"] == image["id"]]
        for image in images["images"]
    }


def test_a_folder_gives_results_pictures_and_trajectories(model, photos, tmp_path, capsys):
    output = tmp_path / "out"
    # One of the first four is broken.
    assert run(model, photos, output, "--num_trajectories", "2", "--num_pictures", "4", "--score_threshold", "0") == 0
    content, rows = read(output)
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.jpg", "c.bmp", "d.png", "more/a.png"]
    assert [image["width"] for image in content["images"]] == [60, 70, 80, 90, 100]
    assert tabulate(content, output).labels() == ([1, 2, 3], CLASSES)
    assert {row["image_id"] for row in rows} == {1, 2, 3, 4, 5}
    for row in rows:
        x, y, w, h = row["bbox"]
        assert 0 <= x < x + w <= content["images"][row["image_id"] - 1]["width"] + 1e-3
        assert 0 <= y < y + h <= 80 + 1e-3
    pictures = sorted(path.relative_to(output).as_posix() for path in output.rglob("*.png"))
    drawn = ["a.png", "b.png", "c.png"]
    assert pictures == [f"pictures/{name}" for name in drawn] + [f"trajectories/{name}" for name in drawn[:2]]
    printed = capsys.readouterr().out
    assert "1 image left out" in printed
    assert "broken.png" in printed


def test_results_can_be_scored(model, photos, tmp_path):
    output = tmp_path / "out"
    assert run(model, photos, output, "--num_pictures", "0", "--num_trajectories", "0") == 0
    content, rows = read(output)
    best = max(rows, key=lambda row: row["score"])
    content["annotations"] = [{"id": 1, **{key: best[key] for key in ("image_id", "category_id", "bbox")}}]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    assert CocoEvaluator(tmp_path / "truth.json").score_results(output / "predictions.json").metrics["AP"] == 1.0


def test_batches_and_other_images_do_not_change_detections(model, photos, tmp_path):
    plain = ("--num_pictures", "0", "--num_trajectories", "0", "--steps", "2")
    assert run(model, photos, tmp_path / "one", *plain) == 0
    assert run(model, photos, tmp_path / "three", *plain, "--batch_size", "3", "--workers", "1") == 0
    assert run(model, photos / "b.jpg", tmp_path / "alone", *plain) == 0
    assert run(model, photos / "b.jpg", tmp_path / "other", *plain, "--seed", "5") == 0
    one, three = by_name(tmp_path / "one"), by_name(tmp_path / "three")
    assert one.keys() == three.keys()
    for name in one:
        assert [row[0] for row in one[name]] == [row[0] for row in three[name]]
        assert torch.allclose(*(torch.tensor([row[1] for row in x[name]]) for x in (one, three)), atol=0.01)
    assert by_name(tmp_path / "alone")["b.jpg"] == one["b.jpg"]
    assert by_name(tmp_path / "other")["b.jpg"] != one["b.jpg"]


def test_two_processes_share_the_images(model, photos, tmp_path):
    options = ("--num_pictures", "4", "--num_trajectories", "1", "--device", "cpu", "--workers", "0")
    assert run(model, photos, tmp_path / "one", *options) == 0
    where = ["--model", str(model), "--images", str(photos), "--output", str(tmp_path / "two")]
    assert python(*TORCHRUN, "-m", "diffperception", "predict", *where, *options) == 0
    assert read(tmp_path / "two") == read(tmp_path / "one")
    assert len(list((tmp_path / "two/pictures").rglob("*.png"))) == 3


def test_steps_and_boxes_can_be_chosen(model, photos, tmp_path):
    run(model, photos / "a.png", tmp_path / "few", "--num_boxes", "3")
    run(model, photos / "a.png", tmp_path / "many", "--num_boxes", "40", "--steps", "2")
    assert len(read(tmp_path / "few")[1]) <= 3 < len(read(tmp_path / "many")[1])


def test_the_sampler_can_be_set(model, photos, tmp_path):
    image = photos / "a.png"
    settings = [
        "--steps",
        "2",
        "--renewal_threshold",
        "0",
        "--ensemble",
        "false",
        "--eta",
        "0.5",
        "--nms_threshold",
        "0.3",
    ]
    assert run(model, image, tmp_path / "out", *settings) == 0
    sampler = BoxSampler(2, 12, eta=0.5, renewal_threshold=0, ensemble=False, nms_threshold=0.3)
    pixels = TF.to_dtype(read_image(image), torch.float32, scale=True)
    (found,) = DiffusionDet.load(model).predict([pixels], [name_seed(0, image.name)], sampler)
    assert read(tmp_path / "out")[1] == results_rows(1, found, [1, 2, 3])
    drawn = [tmp_path / name / "trajectories/a.png" for name in ("out", "plain")]
    assert run(model, image, tmp_path / "plain", "--steps", "2") == 0
    assert drawn[0].read_bytes() != drawn[1].read_bytes()


def test_patterns_name_images(model, photos, tmp_path):
    assert run(model, photos / "**" / "a.png", tmp_path / "out") == 0
    assert list(by_name(tmp_path / "out")) == ["a.png", "more/a.png"]


def test_pictures_of_an_earlier_run_are_not_taken_for_images(model, photos):
    output = photos / "out"
    assert run(model, photos, output) == 0
    assert run(model, photos, output, "--overwrite") == 0
    assert len(read(output)[0]["images"]) == 5


def test_a_detector_without_noise_predicts_too(photos, tmp_path, capsys):
    torch.manual_seed(0)
    FCOS(CLASSES, backbone="resnet18", width=64, min_size=64, max_size=96).save(tmp_path / "fcos.safetensors")
    assert run(tmp_path / "fcos.safetensors", photos / "a.png", tmp_path / "out") == 0
    assert (tmp_path / "out/pictures/a.png").exists()
    assert not (tmp_path / "out/trajectories").exists()
    assert run(tmp_path / "fcos.safetensors", photos / "a.png", tmp_path / "steps", "--steps", "4") == 2
    assert "steps" in capsys.readouterr().err


def test_what_is_in_the_output_folder_stays(model, photos, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "predictions.json").write_text("precious")
    assert run(model, photos, output) == 2
    assert "not empty" in capsys.readouterr().err
    assert (output / "predictions.json").read_text() == "precious"
    assert [path.name for path in output.iterdir()] == ["predictions.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda photos: ("nowhere", ()), "there is no image or folder nowhere"),
        (lambda photos: (photos / "empty", ()), "there is no image in the folder"),
        (lambda photos: (photos / "broken.png", ()), "no image can be read"),
        (lambda photos: (photos, ("--model", "none.safetensors")), "there is no model file none.safetensors"),
        (lambda photos: (photos, ("--model", str(photos / "notes.txt"))), "not a whole safetensors file"),
        (lambda photos: (photos, ("--device", "toaster")), "no device 'toaster'"),
        (lambda photos: (photos, ("--steps", "0")), "steps"),
        (
            lambda photos: (photos, ("--nms_threshold", "7")),
            "option nms_threshold: expected a number from 0 to 1, got 7",
        ),
        (lambda photos: (photos, ("--output", str(photos / "notes.txt"))), "is a file"),
    ],
)
def test_a_mistake_ends_in_one_sentence(model, photos, tmp_path, capsys, change, words):
    (photos / "empty").mkdir()
    images, options = change(photos)
    assert run(model, images, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_the_tool_is_the_command(model, photos, tmp_path, monkeypatch):
    tool = Path(__file__).parents[2] / "tools" / "predict.py"
    arguments = ["--model", str(model), "--images", str(photos / "a.png"), "--output", str(tmp_path / "tool")]
    monkeypatch.setattr(sys, "argv", [str(tool), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tool), run_name="__main__")
    assert ended.value.code == 0
    assert run(model, photos / "a.png", tmp_path / "command") == 0
    assert by_name(tmp_path / "tool") == by_name(tmp_path / "command")


def data_set(photos: Path) -> tuple[Path, CocoDetection]:
    """A COCO file of some of the photos, with ids and an order of its own, and other images in their folder."""
    sizes = {"more/a.png": 100, "b.jpg": 70, "a.png": 60}
    images = [
        {"id": 40 - number, "file_name": name, "width": width, "height": 80}
        for number, (name, width) in enumerate(sizes.items())
    ]
    categories = [{"id": 7 - number, "name": name} for number, name in enumerate(CLASSES)]
    boxes = [{"image_id": image["id"], "category_id": 6, "bbox": [5, 5, 40, 50]} for image in images]
    path = photos / "data.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return path, CocoDetection(path, photos)


def sorted_rows(rows: list[dict]) -> list[tuple]:
    return sorted((row["image_id"], row["category_id"], row["score"], *row["bbox"]) for row in rows)


def test_predictions_with_the_ids_of_a_data_set_are_those_that_are_scored(model, photos, tmp_path):
    path, dataset = data_set(photos)
    plain = ("--num_pictures", "0", "--num_trajectories", "0", "--steps", "2")
    assert run(model, photos, tmp_path / "out", "--annotations", str(path), *plain) == 0
    content, rows = read(tmp_path / "out")
    assert [image["id"] for image in content["images"]] == [40, 39, 38]
    detector = DiffusionDet.load(model)
    scored = evaluate_detector(detector, dataset, sampler=detector.sampler_with(steps=2), batch_size=1)
    assert sorted_rows(scored.detections) == sorted_rows(rows)
    assert {row["category_id"] for row in rows} <= {5, 6, 7}
    again = CocoEvaluator(path).score_results(tmp_path / "out/predictions.json")
    assert again.metrics == scored.metrics
    assert again.notes == []


def test_predictions_without_the_data_set_get_its_ids_by_name(model, photos, tmp_path):
    path, _ = data_set(photos)
    assert run(model, photos, tmp_path / "out", "--num_pictures", "0", "--num_trajectories", "0") == 0
    content, rows = read(tmp_path / "out")
    name_of = {image["id"]: image["file_name"] for image in content["images"]}
    result = CocoEvaluator(path).score_results(tmp_path / "out/predictions.json")
    ids, classes = {"more/a.png": 40, "b.jpg": 39, "a.png": 38}, {1: 7, 2: 6, 3: 5}
    expected = [
        row | {"image_id": ids[name_of[row["image_id"]]], "category_id": classes[row["category_id"]]}
        for row in rows
        if name_of[row["image_id"]] in ids
    ]
    assert sorted_rows(result.detections) == sorted_rows(expected)
    assert "2 of 5 predicted images are not in data.json" in result.table()
    assert "Noise was drawn from the images' names" in result.table()


def test_annotations_of_other_classes_are_refused(model, photos, tmp_path, capsys):
    path, _ = data_set(photos)
    path.write_text(path.read_text().replace(CLASSES[0], "zebra"))
    assert run(model, photos, tmp_path / "out", "--annotations", str(path)) == 2
    assert f"it has no {CLASSES[0]}, and only it has zebra" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
