import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.transforms import v2

from diffperception.data import CocoDetection
from diffperception.data.images import BrokenImageError, read_image


def test_sample_has_the_files_boxes_labels_and_pixels(folder, content, save):
    dataset = CocoDetection(save(content), folder)
    assert (len(dataset), dataset.classes, dataset.category_ids) == (3, ["cat", "dog"], [10, 20])
    image, target = dataset[1]
    assert image.shape == (3, 50, 20)
    torch.testing.assert_close(image, torch.full((3, 50, 20), 100 / 255))
    assert target["image_id"] == 3
    torch.testing.assert_close(target["boxes"], torch.tensor([[1.0, 2, 11, 14], [0, 0, 20, 50]]))
    assert target["labels"].tolist() == [1, 0]
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["area"].tolist() == [100, 900]


def test_masks_are_read_where_asked_for(folder, content, save):
    box, counts = [[1, 2, 11, 2, 11, 14, 1, 14]], [0, 1000]  # a polygon, and run lengths of a crowd: all of 50 x 20
    outlines = [box, [[5, 5, 15, 5, 15, 15, 5, 15], [20, 5, 25, 5, 25, 15]], {"size": [50, 20], "counts": counts}]
    for annotation, outline in zip(content["annotations"], outlines, strict=True):
        annotation["segmentation"] = outline
    path = save(content)
    assert "masks" not in CocoDetection(path, folder)[1][1]
    dataset = CocoDetection(path, folder, masks=True)
    masks = dataset[1][1]["masks"]
    assert (type(masks), masks.dtype, masks.shape) == (torch.Tensor, torch.uint8, (2, 50, 20))
    assert masks[0].sum() == masks[0, 2:14, 1:11].sum() == 120
    assert masks[1].all()
    parts = dataset[0][1]["masks"][0]  # a square, and a triangle beside it
    assert parts[5:15, 5:15].all()
    assert 20 <= parts[5:15, 20:25].sum() <= 30
    assert dataset[2][1]["masks"].shape == (0, 32, 32)
    flipped = CocoDetection(path, folder, lambda *sample: v2.RandomHorizontalFlip(1.0)(*sample), masks=True)[1][1]
    assert torch.equal(flipped["masks"], masks.flip(2))
    compressed = coco_mask.encode(np.asfortranarray(masks[0].numpy()))
    content["annotations"][0]["segmentation"] = {"size": [50, 20], "counts": compressed["counts"].decode()}
    assert torch.equal(CocoDetection(save(content), folder, masks=True)[1][1]["masks"], masks)


def test_an_object_without_an_outline_is_named_where_masks_are_asked_for(folder, content, save):
    with pytest.raises(ValueError, match=r"annotations\[\d\] \(id \d\) of \S+annotations.json has no segmentation"):
        CocoDetection(save(content), folder, masks=True)


def test_image_without_objects_has_an_empty_target(folder, content, save):
    _, target = CocoDetection(save(content), folder)[2]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == target["area"].shape == target["iscrowd"].shape == (0,)


def test_boxes_are_clipped_and_those_without_area_are_dropped_and_counted(folder, content, save):
    content["annotations"][0]["bbox"] = [-5, 40, 10, 30]
    content["annotations"][1]["bbox"] = [5, 5, 0, 10]
    content["annotations"][2]["bbox"] = [25, 5, 10, 10]  # wholly to the right of its image
    dataset = CocoDetection(save(content), folder)
    assert dataset.boxes_dropped == 2
    assert dataset[1][1]["boxes"].tolist() == [[0, 40, 5, 50]]
    assert dataset[1][1]["labels"].tolist() == [1]


def test_labels_of_images_leave_crowds_and_dropped_boxes_out(folder, content, save):
    content["annotations"] += [
        {"id": 4, "image_id": 3, "category_id": 20, "bbox": [2, 2, 5, 5], "area": 25},
        {"id": 5, "image_id": 5, "category_id": 10, "bbox": [2, 2, 0, 5], "area": 0},
    ]
    labels = CocoDetection(save(content), folder).labels_of_images()
    assert [of_image.tolist() for of_image in labels] == [[0], [1, 1], []]


def test_images_that_lvis_names_by_their_url_are_found(folder, content, save):
    for image in content["images"]:
        path = folder / "train2017" / image.pop("file_name")
        path.parent.mkdir(exist_ok=True)
        (folder / path.name).rename(path)
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{path.name}"
    dataset = CocoDetection(save(content), folder)
    assert dataset.file_names == ["train2017/a.png", "train2017/b.png", "train2017/c.png"]
    assert dataset[1][0].shape == (3, 50, 20)


def test_transforms_get_uint8_and_the_sample_is_float(folder, content, save):
    def invert(image: torch.Tensor, target: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        assert image.dtype == torch.uint8
        return 255 - image, target

    image, target = CocoDetection(save(content), folder, transforms=invert)[0]
    torch.testing.assert_close(image, torch.full((3, 30, 40), 205 / 255))
    assert type(image) is type(target["boxes"]) is torch.Tensor


def test_workers_get_a_small_data_set(folder, content, save):
    content["annotations"] *= 10_000
    assert len(pickle.dumps(CocoDetection(save(content), folder))) < 30_000 * 50


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "resized"])
def test_broken_image_stops_with_its_name_or_is_replaced_by_the_next(folder, content, save, damage):
    path = folder / "a.png"
    damages: dict[str, Callable[[], Any]] = {
        "missing": path.unlink,
        "cut": lambda: path.write_bytes(path.read_bytes()[:-30]),
        "text": lambda: path.write_text("not a picture"),
        "resized": lambda: Image.new("RGB", (30, 40)).save(path),
    }
    damages[damage]()
    with pytest.raises(BrokenImageError, match=r"a\.png"):
        CocoDetection(save(content), folder)[0]

    skipping = CocoDetection(save(content), folder, on_broken="skip")
    with pytest.warns(UserWarning, match=r"a\.png.*skipped"):
        assert skipping[0][1]["image_id"] == 3
    assert skipping[0][1]["image_id"] == 3  # a second warning would fail the test


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_skipping_ends_when_no_image_can_be_read(folder, content, save):
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="no image"):
        CocoDetection(save(content), folder, on_broken="skip")[1]


@pytest.mark.parametrize(
    ("section", "entry", "change", "complaint"),
    [
        ("images", 0, {"id": 3}, "several images have the same id"),
        ("categories", 0, {"id": 10}, "several categories have the same id"),
        ("annotations", 0, {"image_id": 99}, "an image id that is not listed"),
        ("annotations", 0, {"category_id": 99}, "a category id that is not listed"),
        ("annotations", 0, {"bbox": [0, 0, float("nan"), 1]}, "not a list of four finite numbers"),
        ("annotations", 0, {"bbox": [0, 0, 1]}, "not a list of four finite numbers"),
        ("annotations", 0, {"bbox": None}, "not a list of four finite numbers"),
        ("images", 0, {"width": "wide"}, "not a whole number"),
    ],
)
def test_unusable_entries_are_refused_in_a_sentence(folder, content, save, section, entry, change, complaint):
    content[section][entry] |= change
    with pytest.raises(ValueError, match=complaint):
        CocoDetection(save(content), folder)


@pytest.mark.parametrize(
    ("section", "key"),
    [("images", "id"), ("images", "file_name"), ("annotations", "bbox"), ("categories", "name")],
)
def test_a_missing_key_is_named(folder, content, save, section, key):
    del content[section][0][key]
    with pytest.raises(ValueError, match=f'"{key}"'):
        CocoDetection(save(content), folder)


def test_empty_data_set_and_missing_folder_are_refused(folder, content, save):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CocoDetection(save(content), folder / "nowhere")
    with pytest.raises(ValueError, match="no images"):
        CocoDetection(save(content | {"images": [], "annotations": []}), folder)
    with pytest.raises(ValueError, match="no categories"):
        CocoDetection(save(content | {"categories": [], "annotations": []}), folder)


@pytest.mark.parametrize(
    ("mode", "suffix", "value", "rgb"),
    [
        ("L", "png", 200, (200, 200, 200)),
        ("1", "png", 1, (255, 255, 255)),
        ("RGBA", "png", (10, 20, 30, 51), (206, 208, 210)),  # a fifth of it, and four of white
        ("I;16", "png", 40000, (155, 155, 155)),
        ("I;16", "tiff", 65535, (255, 255, 255)),
        ("CMYK", "jpg", (0, 255, 255, 0), (254, 0, 0)),
        ("LA", "png", (90, 255), (90, 90, 90)),
        ("P", "png", 2, None),
    ],
)
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, mode, suffix, value, rgb):
    picture = Image.new(mode, (6, 4), value)
    if mode == "P":
        picture.putpalette([0, 0, 0, 1, 1, 1, 7, 8, 9])
        rgb = (7, 8, 9)
    picture.save(tmp_path / f"x.{suffix}")
    pixels = read_image(tmp_path / f"x.{suffix}")
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 4, 6))
    assert np.abs(pixels[:, 2, 3].numpy().astype(int) - rgb).max() <= 1


def test_picture_is_turned_upright(tmp_path: Path):
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: top left goes to top right
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    turned = read_image(tmp_path / "x.png")
    assert turned.shape == (3, 6, 4)
    assert turned[0, 0].tolist() == [0, 0, 0, 255]
