"""Folders of images and masks: pairs, labels, choices, sizes, and what is said of masks that will not do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffperception.data.masks import MaskDataOptions, MaskFolder, check_names, read_mask

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"


def write(path: Path, pixels: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, pixels) if path.suffix == ".npy" else Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images with masks of values 0, 1, 2 and 255; the second mask is an array, the third in a folder."""
    rng = np.random.default_rng(0)
    for i, (image, mask) in enumerate({"0.png": "0.png", "1.jpg": "1.npy", "sub/2.bmp": "sub/2.png"}.items()):
        write(tmp_path / "images" / image, rng.integers(0, 255, (12, 16 + i, 3), dtype=np.uint8))
        write(tmp_path / "masks" / mask, rng.choice(np.array([0, 1, 2, 255], np.uint8), (12, 16 + i)))
    for i in range(3, 8):
        write(tmp_path / "images" / f"{i}.png", rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        write(tmp_path / "masks" / f"{i}.png", rng.integers(0, 3, (12, 16), dtype=np.uint8))
    return tmp_path


def opened(folder: Path, num_classes: int = 3, seed: int = 0, **options: Any) -> MaskFolder:
    names = [str(k) for k in range(num_classes)]
    return MaskFolder(MaskDataOptions(folder / "images", folder / "masks", names, **options), seed)


def test_images_and_masks_of_the_same_name_are_pairs(folder: Path) -> None:
    data = opened(folder)
    assert data.names == ["0.png", "1.jpg", "3.png", "4.png", "5.png", "6.png", "7.png", "sub/2.bmp"]
    image, mask = data[7]
    assert (image.dtype, image.shape, mask.dtype, mask.shape) == (torch.float32, (3, 12, 18), torch.int64, (12, 18))
    assert (255 * image).round().byte().permute(1, 2, 0).tolist() == np.asarray(
        Image.open(folder / "images/sub/2.bmp")
    ).tolist()
    assert mask.tolist() == np.asarray(Image.open(folder / "masks/sub/2.png")).tolist()
    assert data[1][1].tolist() == np.load(folder / "masks/1.npy").tolist()


def test_images_and_masks_are_sequences(folder: Path) -> None:
    data = opened(folder)
    assert len(data.images) == len(list(data.masks)) == len(data) == 8
    assert torch.equal(data.images[-1], data[7][0])
    assert [m.shape for m in data.masks[:2]] == [(12, 16), (12, 17)]


def test_values_lead_to_labels(tmp_path: Path) -> None:
    write(tmp_path / "images/a.png", np.zeros((1, 4, 3), np.uint8))
    write(tmp_path / "masks/a.png", np.array([[0, 255, 7, 255]], np.uint8))
    data = opened(tmp_path, 2, mask_values={0: 0, 255: 1}, ignore=7)
    assert data[0][1].tolist() == [[0, 1, 255, 1]]
    write(tmp_path / "masks/a.png", np.array([[0, 1, 2, 1]], np.uint8))
    assert opened(tmp_path, 3, ignore=0)[0][1].tolist() == [[255, 1, 2, 1]]


def test_masks_of_negative_wide_and_true_values_are_read(tmp_path: Path) -> None:
    write(tmp_path / "images/a.png", np.zeros((1, 3, 3), np.uint8))
    for mask in (np.array([[-1, 0, 1]], np.int8), np.array([[-1.0, 0.0, 1.0]])):
        write(tmp_path / "masks/a.npy", mask)
        assert opened(tmp_path, 2, ignore=-1)[0][1].tolist() == [[255, 0, 1]]
    (tmp_path / "masks/a.npy").unlink()
    write(tmp_path / "masks/a.png", np.array([[40000, 0, 1]], np.uint16))
    assert opened(tmp_path, 2, ignore=40000)[0][1].tolist() == [[255, 0, 1]]
    write(tmp_path / "masks/a.png", np.array([[True, False, True]]))
    assert opened(tmp_path, 2)[0][1].tolist() == [[1, 0, 1]]
    palette = Image.fromarray(np.array([[2, 0, 1]], np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "masks/a.png")
    assert opened(tmp_path, 3)[0][1].tolist() == [[2, 0, 1]]


def test_a_larger_number_chooses_the_same_and_others(folder: Path) -> None:
    chosen = [opened(folder, max_images=number, seed=1).names for number in (2, 5, 99)]
    assert [len(names) for names in chosen] == [2, 5, 8]
    assert chosen[2][:5] == chosen[1]
    assert chosen[1][:2] == chosen[0]
    assert len({tuple(opened(folder, max_images=3, seed=seed).names) for seed in range(9)}) > 5


@pytest.mark.parametrize("name", ["list.txt", "list.json"])
def test_a_file_lists_the_images(folder: Path, name: str) -> None:
    listed = ["sub/2.bmp", "0.png"]
    coco = {"images": [{"file_name": name} for name in listed], "annotations": [], "categories": []}
    (folder / name).write_text(json.dumps(coco) if name.endswith("json") else "\n".join([*listed, ""]))
    (folder / "masks/3.png").unlink()  # of no concern
    assert opened(folder, annotations=folder / name).names == ["0.png", "sub/2.bmp"]
    (folder / "images/0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists .*0\.png, which is missing"):
        opened(folder, annotations=folder / name)


def test_images_and_masks_are_resized_together(tmp_path: Path) -> None:
    """Halves of an image stay where they are, the mask has no new values, and the image is smooth."""
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, 30:] = 250
    picture[::2] //= 2  # stripes that antialiasing makes even
    write(tmp_path / "images/a.png", picture)
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 30:] = 2
    mask[0, 0] = 255
    write(tmp_path / "masks/a.png", mask)
    image, labels = opened(tmp_path, short_side=10)[0]
    assert (image.shape, labels.shape) == ((3, 10, 15), (10, 15))
    assert set(labels.unique().tolist()) <= {0, 2, 255}
    assert labels[:, :7].sum() == 0
    assert (labels[:, 8:] == 2).all()
    assert image[:, 1:-1, 9:].std() < 0.01
    assert image[:, :, :6].max() == 0


def test_masks_within_the_images_folder_are_no_images(folder: Path) -> None:
    (folder / "masks").rename(folder / "images/masks")
    data = MaskDataOptions(folder / "images", folder / "images/masks", list("abc")).open()
    assert len(data) == 8


def test_a_turned_photograph_has_the_mask_of_what_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter of a turn
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "images/a.jpg", exif=exif)
    write(tmp_path / "masks/a.png", np.zeros((20, 10), np.uint8))
    image, mask = opened(tmp_path)[0]
    assert image.shape[1:] == mask.shape == (20, 10)


def test_an_image_without_a_mask_is_named_or_left_out(folder: Path) -> None:
    (folder / "masks/4.png").unlink()
    (folder / "masks/6.png").unlink()
    with pytest.raises(ValueError, match=r"4\.png has no mask in .*masks, nor have 1 others: add masks"):
        opened(folder)
    assert len(opened(folder, unlabelled="skip")) == 6


def test_no_pair_is_an_error(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no image in .* has a mask in .*empty: a mask has its image's path and name"):
        MaskDataOptions(folder / "images", folder / "empty", list("abc"), unlabelled="skip").open()
    with pytest.raises(FileNotFoundError, match="no folder of masks"):
        MaskDataOptions(folder / "images", folder / "nowhere", list("abc")).open()


def test_a_mask_of_another_size_is_named(folder: Path) -> None:
    write(folder / "masks/5.png", np.zeros((16, 12), np.uint8))
    with pytest.raises(ValueError, match=r"5\.png has 16 x 12 pixels, but its image .*5\.png has 12 x 16"):
        opened(folder)


def test_unknown_values_are_named(folder: Path) -> None:
    write(folder / "masks/5.png", np.full((12, 16), 9, np.uint8))
    with pytest.raises(ValueError, match=r"masks/5\.png has the unknown value 9; known are 0, 1, 2, 255: name all"):
        opened(folder)
    with pytest.raises(ValueError, match=r"masks/0\.png has the unknown values 1, 2; known are 0, 255"):
        opened(folder, 2, mask_values={0: 0, 255: 1})
    with pytest.raises(ValueError, match="`mask_values` leads to 2, but the classes are 0 to 1"):
        opened(folder, 2, mask_values={0: 0, 255: 2})


def test_the_value_of_ignored_pixels_is_no_class(folder: Path) -> None:
    assert len(opened(folder, 255)) == 8
    with pytest.raises(ValueError, match="there are 256 classes, but masks of labels hold at most 255"):
        opened(folder, 256)


def test_masks_without_a_label_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "images/a.png", np.zeros((2, 2, 3), np.uint8))
    write(tmp_path / "masks/a.png", np.full((2, 2), 255, np.uint8))
    with pytest.raises(
        ValueError, match=r"masks have no pixel of a class, all are ignored: .* 255 \(4 pixels, ignored\)"
    ):
        opened(tmp_path)


def test_what_is_no_mask_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rgb.png", np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    with pytest.raises(ValueError, match=r"rgb\.png has colours \(#000102, #030405, #060708, \.\.\.\): say with"):
        read_mask(tmp_path / "rgb.png")
    write(tmp_path / "one_hot.npy", np.eye(3, dtype=np.uint8)[[[0, 1, 2]]])
    with pytest.raises(ValueError, match=r"one_hot\.npy has numbers of shape \(1, 3, 3\): a mask has one channel"):
        read_mask(tmp_path / "one_hot.npy")
    write(tmp_path / "half.npy", np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match=r"half\.npy has numbers that are not whole"):
        read_mask(tmp_path / "half.npy")
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    (tmp_path / "broken.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:40])
    for name in ("objects.npy", "broken.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_mask(tmp_path / name)


@pytest.mark.skipif(not BCCD.is_dir(), reason="../shared/data is not there")
def test_the_blood_cells_have_masks() -> None:
    listed = BCCD / "annotations/instances_test.json"
    data = MaskDataOptions(BCCD / "images", BCCD / "masks", list("abc"), listed, max_images=5, short_side=160).open()
    for image, mask in zip(data.images, data.masks, strict=True):
        assert image.shape[1:] == mask.shape == (160, 213)
        assert mask.unique().tolist() == [0, 1, 2]


def test_black_and_white_masks_are_refused_with_what_to_say(tmp_path: Path) -> None:
    """255 is ignored, so the object would never be learned and the score be that of the background alone."""
    write(tmp_path / "images/a.png", np.zeros((2, 4, 3), np.uint8))
    write(tmp_path / "masks/a.png", np.array([[0, 255, 0, 0]] * 2, np.uint8))
    sentence = r"no pixel of class 1: they hold 0 \(6 pixels\) and 255 \(2 pixels, ignored\); .* '\{0: 0, 255: 1\}'"
    options = MaskDataOptions(tmp_path / "images", tmp_path / "masks", ["0", "1"])
    with pytest.raises(ValueError, match=sentence):
        options.open()
    with pytest.raises(ValueError, match=sentence):
        MaskFolder(options)
    assert opened(tmp_path, 2, mask_values={0: 0, 255: 1})[0][1].tolist() == [[0, 1, 0, 0]] * 2
    assert "have pixels of 0 alone, none of 1, 2" in opened(tmp_path, 3).notes[0]
    write(tmp_path / "masks/a.png", np.array([[0, 255, 1, 0]] * 2, np.uint8))
    assert options.open().notes == []


def test_two_classes_are_needed_to_learn_but_not_in_every_choice(folder: Path) -> None:
    for path in (folder / "masks").glob("*.png"):
        write(path, np.zeros_like(np.asarray(Image.open(path))))
    options = MaskDataOptions(folder / "images", folder / "masks", list("abc"), max_images=3)
    names = next(
        set(f.names) for seed in range(99) if not {"1.jpg", "sub/2.bmp"} & set((f := options.open(seed)).names)
    )
    assert len(names) == 3, "masks of other images show the classes"
    (folder / "masks/1.npy").unlink()
    (folder / "masks/sub/2.png").unlink()
    with pytest.raises(ValueError, match=r"masks have no pixel of class b, c: they hold 0 \(\d+ pixels\)"):
        MaskDataOptions(folder / "images", folder / "masks", list("abc"), unlabelled="skip", max_images=3).open()


def test_painted_masks_are_read_by_their_colours(tmp_path: Path) -> None:
    write(tmp_path / "images/a.png", np.zeros((1, 3, 3), np.uint8))
    colours = np.array([[[0, 0, 0], [255, 0, 0], [224, 224, 192]]], np.uint8)
    values = {"#000000": 0, "#FF0000": 1, "#e0e0c0": 255}
    palette = Image.fromarray(colours).quantize()
    for picture in (Image.fromarray(colours), Image.fromarray(colours).convert("RGBA"), palette):
        (tmp_path / "masks").mkdir(exist_ok=True)
        picture.save(tmp_path / "masks/a.png")
        assert opened(tmp_path, 2, mask_values=values)[0][1].tolist() == [[0, 1, 255]]
    with pytest.raises(ValueError, match="both colours and numbers"):
        opened(tmp_path, 2, mask_values={"#000000": 0, 1: 1})
    with pytest.raises(ValueError, match=r"names 'red', which is no number or colour"):
        opened(tmp_path, 2, mask_values={"red": 0})
    with pytest.raises(ValueError, match=r"unknown values? #ff0000, #e0e0c0|unknown values? #e0e0c0, #ff0000"):
        opened(tmp_path, 2, mask_values={"#000000": 0, "#0000ff": 1})


def test_numbers_that_are_other_colours_in_other_files_are_said(tmp_path: Path) -> None:
    for name, colours in {"a": ["#000000", "#ff0000"], "b": ["#000000", "#0000ff"]}.items():
        write(tmp_path / f"images/{name}.png", np.zeros((1, 2, 3), np.uint8))
        mask = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
        mask.putpalette(bytes.fromhex("".join(colour[1:] for colour in colours)))
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / f"masks/{name}.png")
        alike = opened(tmp_path, 2, unlabelled="skip").notes if name == "a" else None
        assert not alike
    (note,) = opened(tmp_path, 2).notes
    assert f"1 is #ff0000 in {tmp_path / 'masks/a.png'} and #0000ff in {tmp_path / 'masks/b.png'}" in note
    assert opened(tmp_path, 2, mask_values={"#000000": 0, "#ff0000": 1, "#0000ff": 1}).notes == []


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
@pytest.mark.parametrize("ending", [".png", ".PNG", ".tif", ".npy"])
def test_a_grey_mask_is_read_whatever_its_mode(tmp_path: Path, mode: str, ending: str) -> None:
    wanted = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    write(tmp_path / "images/a.png", np.zeros((2, 3, 3), np.uint8))
    path = tmp_path / f"masks/a{ending}"
    path.parent.mkdir()
    if ending == ".npy":
        np.save(path, wanted[..., None].astype({"1": bool, "L": float}.get(mode, int)))
    elif mode == "1":
        Image.fromarray(wanted.astype(bool)).save(path)
    elif mode == "I;16":
        Image.fromarray(wanted.astype(np.uint16)).save(path)
    elif mode == "P":
        picture = Image.fromarray(wanted, "P")
        picture.putpalette([255, 0, 0, 0, 255, 0])
        picture.save(path)
    else:
        Image.fromarray(wanted).convert(mode).save(path)
    assert opened(tmp_path, 2)[0][1].tolist() == wanted.tolist()


def test_a_mask_is_turned_as_its_own_exif_says(tmp_path: Path) -> None:
    """Of a square image the sizes cannot tell; a mask that says nothing is drawn on what is seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    labels = np.array([[0, 1], [0, 0]], np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "images/a.png", exif=exif)
    write(tmp_path / "masks/a.png", labels)
    assert opened(tmp_path, 2)[0][1].tolist() == labels.tolist()
    Image.fromarray(labels).save(tmp_path / "masks/a.png", exif=exif)
    assert opened(tmp_path, 2)[0][1].tolist() == np.rot90(labels, -1).tolist()
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "images/a.png", exif=exif)
    write(tmp_path / "masks/a.png", np.array([[0, 1, 0]] * 2, np.uint8))
    with pytest.raises(
        ValueError, match=r"a\.png has 2 x 3 pixels, but its image .* has 3 x 2: they must be alike; EXIF turns"
    ):
        opened(tmp_path, 2)


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (["a", " "], "class 1 has an empty name"),
        (["a", ""], "class 1 has an empty name"),
        (["a ", "b"], "the name of class 0, 'a ', has blanks around it"),
        (["a", "b\nc"], "the name of class 1, .* ends of lines"),
        (["a" * 300, "b"], "has a name of 300 letters"),
        (["a", "b", "a"], "two classes are named a"),
    ],
)
def test_names_of_classes_are_names(classes: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_names(classes)
    assert check_names(["no", "1e3", "می‌خواهم", "Car", "car"]) == ["no", "1e3", "می‌خواهم", "Car", "car"]
