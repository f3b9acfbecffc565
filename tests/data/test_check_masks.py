"""What `check` says of images with masks and of folders of images; and that `train` judges alike."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffperception.cli.main import main
from diffperception.data.check_images import check_images
from diffperception.data.check_masks import check_masks
from diffperception.data.image_folder import ImageDataOptions
from diffperception.data.masks import MaskDataOptions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of 6 x 4 pixels with masks of two classes, 8 pixels of the second in each."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    labels = np.zeros((6, 4), np.uint8)
    labels[:2] = 1
    for number in range(3):
        Image.fromarray(np.full((6, 4, 3), 40 * number, np.uint8)).save(tmp_path / f"images/{number}.png")
        Image.fromarray(labels).save(tmp_path / f"masks/{number}.png")
    return tmp_path


def repaint(folder: Path, name: str, value: int) -> None:
    Image.fromarray(np.full((6, 4), value, np.uint8)).save(folder / "masks" / name)


def black_and_white(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        Image.fromarray(255 * np.asarray(Image.open(path))).save(path)


def one_class(folder: Path) -> None:
    for number in range(3):
        repaint(folder, f"{number}.png", 0)


def turned(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / "images/0.png").save(folder / "images/0.png", exif=exif)


FAULTS = {
    "sound": (lambda folder: None, set()),
    "no mask": (lambda folder: (folder / "masks/0.png").unlink(), {"image without a mask"}),
    "no image": (lambda folder: (folder / "images/0.png").unlink(), set()),
    "two masks": (lambda folder: np.save(folder / "masks/0.npy", np.zeros((6, 4))), {"no pairs"}),
    "two images": (lambda folder: Image.new("RGB", (4, 6)).save(folder / "images/0.jpg"), {"no pairs"}),
    "broken mask": (lambda folder: (folder / "masks/0.png").write_bytes(b"\x89PNG"), {"broken mask"}),
    "broken image": (lambda folder: (folder / "images/0.png").write_bytes(b"\x89PNG"), {"broken image"}),
    "colours": (lambda folder: Image.new("RGB", (4, 6), "red").save(folder / "masks/0.png"), {"painted mask"}),
    "size": (lambda folder: Image.new("L", (6, 4)).save(folder / "masks/0.png"), {"mask size"}),
    "turned": (turned, {"mask size"}),
    "value": (lambda folder: repaint(folder, "0.png", 7), {"unknown value"}),
    "halves": (lambda folder: np.save(folder / "masks/0.npy", np.full((6, 4), 0.5)), {"no pairs"}),
    "one ignored": (lambda folder: repaint(folder, "0.png", 255), set()),
    "all ignored": (lambda folder: [repaint(folder, f"{n}.png", 255) for n in range(3)], {"classes"}),
    "black and white": (black_and_white, {"classes"}),
    "one class": (one_class, {"classes"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_what_training_refuses(folder: Path, fault: str) -> None:
    damage, kinds = FAULTS[fault]
    damage(folder)
    options = MaskDataOptions(folder / "images", folder / "masks", ["ground", "thing"])
    assert {problem.kind for problem in check_masks(options).errors} == kinds
    refused = False
    try:
        opened = options.open()
        list(opened.images)
    except (OSError, ValueError):
        refused = True
    assert refused == bool(kinds)


def test_pixels_are_counted_and_values_told(folder: Path) -> None:
    Image.new("RGB", (4, 6)).save(folder / "masks/extra.png")
    repaint(folder, "1.png", 255)
    report = check_masks(MaskDataOptions(folder / "images", folder / "masks", ["ground", "thing", "sky"]))
    assert report.summary is not None
    lines = [line.split() for line in report.summary.text().splitlines()]
    assert lines[1:5] == [
        ["ground", "32", "66.7", "%", "2"],
        ["thing", "16", "33.3", "%", "2"],
        ["sky", "0", "0.0", "%", "0"],
        ["ignored", "24"],
    ]
    assert [problem.kind for problem in report.warnings] == ["mask without an image", "class without pixels"]
    assert "0 (32 pixels), 1 (16 pixels) and 255 (24 pixels, ignored)" in report.warnings[1].message


def test_the_images_measured_on_need_not_have_all_classes(folder: Path) -> None:
    one = folder / "one"
    one.mkdir()
    Image.fromarray(np.zeros((6, 4), np.uint8)).save(one / "0.png")
    options = MaskDataOptions(
        folder / "images", folder / "masks", ["a", "b"], val_images=folder / "images", val_masks=one
    )
    options.unlabelled = "skip"
    assert options.open_val() is not None
    assert check_masks(options).errors == []
    options.val_masks = None
    assert [problem.kind for problem in check_masks(options).errors] == ["half of val"]
    with pytest.raises(ValueError, match="both"):
        options.open_val()


def test_the_parts_of_a_split_are_judged_as_training_does(folder: Path) -> None:
    options = MaskDataOptions(folder / "images", folder / "masks", ["a", "b"], val_share=0.4)
    held_out = options.open_val()
    assert held_out is not None
    (name,) = held_out.names
    assert check_masks(options).problems == []
    repaint(folder, name, 0)
    (warning,) = check_masks(options).problems
    assert warning.message.startswith(f"the masks in {folder / 'masks'} that are held out have pixels of a alone")
    for number in range(3):
        if f"{number}.png" != name:
            repaint(folder, f"{number}.png", 1)
    for classes in (["a", "b"], []):
        assert [problem.kind for problem in check_masks(replace(options, classes=classes)).errors] == ["split"]
    with pytest.raises(ValueError, match="that are not held out have no pixel of class a"):
        options.open()
    (error,) = check_masks(replace(options, val_share=1.5)).errors
    assert error.message.startswith("val_share is 1.5: ")


def test_colours_that_are_named_need_no_names_of_classes(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path))[..., None] * np.array([255, 0, 0], np.uint8)).save(path)
    values = {"#000000": 0, "#ff0000": 1}
    report = check_masks(MaskDataOptions(folder / "images", folder / "masks", [], mask_values=values))
    assert report.problems == []
    assert report.summary is not None
    assert "class 1" in report.summary.text()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--task segmentation --masks masks --classes a b", 0),
        ("--masks masks", 0),
        ("--masks masks --classes a b --mask_values {0:1,1:9}", 1),
        ("--task generation --image_size 8", 0),
        ("--image_size [16,16]", 1),
        ("--labelled", 1),
        ("--task detection", 2),
        ("--task boxes", 2),
    ],
)
def test_the_command_asks_for_what_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: str, code: int
) -> None:
    monkeypatch.chdir(folder)
    report = [] if code == 2 else ["--report", "report.json"]
    assert main(["check", "--images", "images", *words.split(), *report]) == code
    if report:
        levels = [problem["level"] for problem in json.loads((folder / "report.json").read_text())["problems"]]
        assert ("error" in levels) == bool(code)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, set()),
        ({"labelled": True}, {"refused"}),
        ({"short_side": 2}, {"refused"}),
        ({"images": Path("nowhere")}, {"no images"}),
        ({"val_images": Path("nowhere")}, {"no images"}),
    ],
)
@pytest.mark.parametrize("on_broken", ["stop", "skip"])
@pytest.mark.parametrize("damage", ["nothing", "broken", "small"])
def test_check_of_images_names_what_training_refuses(
    folder: Path, changes: dict[str, Any], kinds: set[str], on_broken: Any, damage: str
) -> None:
    if damage == "broken":
        (folder / "images/0.png").write_bytes(b"\x89PNG")
    if damage == "small":
        Image.new("RGB", (1, 1)).save(folder / "images/0.png")
    unusable = damage != "nothing" and on_broken == "stop" and changes.get("images") is None
    options = ImageDataOptions(**{"images": folder / "images", "on_broken": on_broken, **changes})
    found = {problem.kind for problem in check_images(options, (4, 4)).errors}
    assert found == (({"unusable image"} | (kinds - {"refused"})) if unusable else kinds)
    refused = False
    try:
        options.open((4, 4), 3)
    except (OSError, ValueError):
        refused = True
    assert refused == bool(found)


def test_modes_sizes_and_classes_of_images_are_counted(tmp_path: Path) -> None:
    for name, mode, size in (("a/0.png", "RGB", (8, 4)), ("a/1.png", "L", (4, 4)), ("b/0.png", "RGB", (9, 9))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new(mode, size).save(tmp_path / name)
    text = check_images(ImageDataOptions(tmp_path, labelled=True)).text()
    assert [line.split() for line in text.splitlines() if line][:6] == [
        ["class", "images"],
        ["a", "2"],
        ["b", "1"],
        ["images", "3"],
        ["image", "sizes", "4x4", "to", "9x9"],
        ["modes", "2", "RGB,", "1", "L"],
    ]
