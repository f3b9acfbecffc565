"""Captions in COCO's format, and what is said of files that will not do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffperception.data import SeededSamples, ShapesSettings, write_shapes
from diffperception.data.captions import check_captions, read_captions
from diffperception.data.check_images import check_images
from diffperception.data.image_folder import ImageDataOptions, ImageFolder

COCO = {  # as COCO writes it, with more keys than are read
    "info": {"year": 2017},
    "licenses": [{"id": 1}],
    "images": [
        {"license": 3, "file_name": "000000000009.jpg", "coco_url": "http://x/train2017/9.jpg", "id": 9, "height": 20},
        {"license": 3, "file_name": "sub/b.png", "id": 25, "width": 30},
        {"license": 3, "file_name": "c.png", "id": 30},
    ],
    "annotations": [
        {"image_id": 25, "id": 1, "caption": "A giraffe.\n"},
        {"image_id": 9, "id": 2, "caption": "Food in boxes"},
        {"image_id": 25, "id": 3, "caption": "一只长颈鹿"},
    ],
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "captions.json"
    path.write_text(json.dumps(COCO | changes))
    return path


def with_images(folder: Path) -> Path:
    for image in COCO["images"]:  # type: ignore[attr-defined]
        place = folder / image["file_name"]
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), image["id"], np.uint8)).save(place)
    return folder


def folder(images: Path, **options: Any) -> ImageFolder:
    return ImageFolder(ImageDataOptions(images, **options), (8, 8))


def test_captions_of_cocos_own_format_come_with_their_images(tmp_path: Path) -> None:
    images = folder(with_images(tmp_path), captions=written(tmp_path))
    samples, said = SeededSamples(images), {}
    for index in range(len(images)):
        for seed in range(12):
            image, target = samples[index, seed]
            said.setdefault(round(float(image[0, 0, 0]) * 255), set()).add(target["caption"])
            assert samples[index, seed][1] == target
    assert said == {9: {"Food in boxes"}, 25: {"A giraffe.", "一只长颈鹿"}}
    assert "1 images" in images.remark
    assert "no caption" in images.remark


def test_captions_change_no_crop(tmp_path: Path) -> None:
    with_images(tmp_path)
    plain, captioned = folder(tmp_path), folder(tmp_path, captions=written(tmp_path))
    for index, path in enumerate(captioned.paths):
        one, other = SeededSamples(plain)[plain.paths.index(path), 5], SeededSamples(captioned)[index, 5]
        assert (one[0] == other[0]).all()
        assert "caption" not in one[1]


def test_the_shapes_own_captions_are_read(tmp_path: Path) -> None:
    settings = ShapesSettings(
        train=4, val=2, min_side=40, max_side=40, min_size=18, captions=True, held_out=["red star"]
    )
    write_shapes(tmp_path / "s", settings, workers=1)
    assert not write_shapes(tmp_path / "s", settings)
    for part, count in settings.splits.items():
        english, chinese = (tmp_path / f"s/annotations/captions_{part}{end}.json" for end in ("", "_zh"))
        ids = [[entry["id"] for entry in json.loads(file.read_text())["annotations"]] for file in (english, chinese)]
        assert ids[0] == ids[1] == list(range(1, 5 * count + 1))
        images = folder(tmp_path / "s" / part, captions=chinese, horizontal_flip=0.0)
        assert len(images) == count
        assert "一个" in images[0][1]["caption"]
        colors = json.loads((tmp_path / f"s/annotations/instances_{part}.json").read_text())["annotations"]
        assert all(f"{entry['color']} " in " ".join(read_captions(english)) for entry in colors)
    assert "red star" not in " ".join(read_captions(tmp_path / "s/annotations/captions_train.json"))


BROKEN: list[tuple[dict[str, Any], str]] = [
    (
        {"annotations": [{"image_id": 9, "id": 4, "bbox": [0, 0, 1, 1]}]},
        r'annotations\[0\] \(id 4\): it has no "caption"',
    ),
    ({"annotations": [{"image_id": 9, "caption": " "}]}, "not a text that is not empty"),
    ({"annotations": [{"image_id": 9, "caption": 7}]}, "caption.* is 7"),
    ({"annotations": [{"image_id": 77, "caption": "a"}]}, "77, is of no image"),
    ({"annotations": []}, "holds no caption"),
    ({"images": [{"id": 9}]}, 'no "file_name"'),
    ({"images": [{"id": 9, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}]}, "earlier image too"),
    ({"images": [{"id": 9, "file_name": "a.png"}, {"id": 25, "file_name": "a.png"}]}, "earlier image too"),
    ({"images": 3}, "must hold the lists images, annotations"),
]


@pytest.mark.parametrize(("changes", "said"), BROKEN)
def test_a_broken_file_is_refused_by_training_and_named_by_the_check(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        read_captions(path)
    assert all(problem.level == "error" for problem in check_captions(path))
    assert check_captions(path)
    report = check_images(ImageDataOptions(with_images(tmp_path), captions=path))
    assert report.errors


def test_captions_of_other_images_are_refused(tmp_path: Path) -> None:
    with_images(tmp_path)
    content = json.dumps({"images": [{"id": 1, "file_name": "c.png"}], "annotations": []})
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match="no caption of any image"):
        folder(tmp_path, captions=written(tmp_path), annotations=tmp_path / "list.json")


@pytest.mark.parametrize("caption", ["A cat LEFT of a dog", "猫在狗的左边"])
def test_images_whose_captions_tell_sides_are_not_mirrored(tmp_path: Path, caption: str) -> None:
    path = written(tmp_path, annotations=[{"image_id": 9, "caption": caption}])
    with pytest.raises(ValueError, match=r"horizontal_flip is 0\.5"):
        folder(with_images(tmp_path), captions=path)
    folder(tmp_path, captions=path, horizontal_flip=0.0, vertical_flip=0.5)
    report = check_images(ImageDataOptions(tmp_path, captions=path))
    assert [(problem.level, problem.kind) for problem in report.problems if problem.kind != "left out"] == [
        ("warning", "mirrored")
    ]
    assert not report.errors


def test_images_to_measure_on_need_captions_too(tmp_path: Path) -> None:
    options = ImageDataOptions(with_images(tmp_path), captions=written(tmp_path), val_images=tmp_path)
    with pytest.raises(ValueError, match="val_captions"):
        options.open((8, 8), 3)
