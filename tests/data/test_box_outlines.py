"""Outlines of objects from their boxes and masks of all of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffperception.data import CocoDetection
from diffperception.data.box_outlines import share_out
from diffperception.data.formats.conversion import convert_annotations


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """An image with two cells that touch, one without a mask, one without area and one of another kind."""
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:30, 5:25], mask[12:28, 25:45], mask[0:4, 50:60] = 1, 2, 1
    for folder, pixels in (("images", np.zeros((40, 60, 3), np.uint8)), ("masks", mask)):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    boxes = [(1, [4, 8, 24, 24]), (1, [22, 10, 24, 20]), (1, [50, 30, 8, 8]), (1, [10, 10, 0, 0]), (2, [0, 0, 50, 30])]
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 60, "height": 40}],
        "categories": [{"id": 1, "name": "white"}, {"id": 2, "name": "red"}],
        "annotations": [
            {"id": k, "image_id": 7, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for k, (category, box) in enumerate(boxes, 1)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    return tmp_path


def test_objects_share_a_mask_by_their_boxes(cells: Path):
    annotations, images, made = cells / "a.json", cells / "images", cells / "made.json"
    result = convert_annotations(annotations, made, images, masks=cells / "masks", mask_classes=["white"])
    assert (result.classes, result.num_objects) == (["white"], 4)
    assert result.notes == [
        "1 objects of other classes are left out",
        "2 objects have nothing of a mask in their box",
        "1 images have a mask beyond these boxes, which is left out",
    ]
    target = CocoDetection(made, images, masks=True)[0][1]
    masks = target["masks"].numpy()
    assert target["boxes"].tolist() == [[4, 8, 28, 32], [22, 10, 46, 30], [50, 30, 58, 38]]
    assert target["area"].tolist() == masks.sum((1, 2)).tolist()
    whole = np.asarray(Image.open(cells / "masks" / "a.png")) > 0
    assert (masks[0, 10:30, 5:22] == 1).all()
    assert (masks[1, 12:28, 28:45] == 1).all()
    assert (masks[:2].sum(0)[8:32, 4:46] == whole[8:32, 4:46]).all()  # each pixel once
    assert masks[2].sum() == masks[:, 0:4].sum() == 0


def test_a_pixel_in_two_boxes_is_of_the_nearer_centre():
    boxes = torch.tensor([[0.0, 0, 8, 8], [4, 0, 20, 8], [5, 5, 5, 5]])
    parts = share_out(torch.ones(8, 20, dtype=torch.bool), boxes)
    # At x the first is |x - 4| / 4 away, the second |x - 12| / 8: as far at 20 / 3.
    assert parts[0, 4].tolist() == [x < 7 for x in range(20)]
    assert parts[1, 4].tolist() == [x >= 7 for x in range(20)]
    assert parts[2].sum() == 0
    assert share_out(torch.ones(8, 20, dtype=torch.bool), boxes[:0]).shape == (0, 8, 20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_classes": ["blue"]}, "a.json has no class 'blue': its classes are white, red"),
        ({"to": "yolo"}, "outlines from masks are written to COCO alone"),
        ({"masks": "small"}, "a.png is 6x4 pixels, but its image 60x40"),
        ({"masks": "none"}, "there is no folder of masks"),
    ],
)
def test_what_does_not_fit_is_one_sentence(cells: Path, options: dict, words: str):
    (cells / "small").mkdir()
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(cells / "small" / "a.png")
    masks = cells / options.pop("masks", "masks")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        convert_annotations(cells / "a.json", cells / "made.json", cells / "images", masks=masks, **options)
    assert not (cells / "made.json").exists()
