"""Reading image files in batches, and resizing to a short side."""

import struct
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import ExifTags, Image, features

from diffperception.data.images import (
    BrokenImageError,
    load_images,
    read_image,
    read_size,
    resize_short_side,
    short_side_size,
    to_float,
)


def write(path: Path, value: int, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_stay_in_their_batch(tmp_path: Path, workers: int) -> None:
    paths = [write(tmp_path / "0.png", 0), tmp_path / "none.png", write(tmp_path / "2.png", 51)]
    batches = list(load_images(paths, batch_size=2, workers=workers))
    assert [[sample.path for sample in batch] for batch in batches] == [paths[:2], paths[2:]]
    assert batches[0][1].image is None
    assert batches[0][1].problem == f"the image {paths[1]} is missing"
    torch.testing.assert_close(batches[1][0].image, torch.full((3, 4, 6), 0.2))


def test_there_are_no_more_workers_than_further_batches() -> None:
    files = [Path(str(number)) for number in range(9)]
    assert [load_images(files[:n], 4, workers=2).num_workers for n in (1, 4, 5, 9)] == [0, 0, 1, 2]


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (37, 101), (8, 8)])
@pytest.mark.parametrize("short_side", [8, 20, 100])
def test_the_size_of_a_resized_image_is_known_before(size: tuple[int, int], short_side: int) -> None:
    resized = resize_short_side(torch.rand(3, *size), short_side)
    assert resized.shape[1:] == short_side_size(*size, short_side)
    assert min(resized.shape[1:]) == short_side


def test_labels_are_resized_to_the_nearest_and_none_leaves_them() -> None:
    labels = torch.randint(20, (1, 30, 45))
    assert set(resize_short_side(labels, 10, nearest=True).unique().tolist()) <= set(labels.unique().tolist())
    assert resize_short_side(labels, None) is labels


def test_the_size_of_a_file_is_that_of_its_pixels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", 255, (7, 5))
    assert read_size(path) == read_image(path).shape[1:] == (5, 7)
    assert to_float(read_image(path)).unique().tolist() == [1.0]


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_the_size_of_a_photograph_on_its_side_is_that_of_what_is_seen(tmp_path: Path, ending: str) -> None:
    path, exif = tmp_path / f"a.{ending}", Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (7, 5)).save(path, exif=exif)
    assert read_size(path) == read_image(path).shape[1:] == (7, 5)


def grey_file(path: Path, values: object, **options: object) -> Path:
    Image.fromarray(np.asarray(values)).save(path, **options)
    return path


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
DECLARED = {
    "u8.png": GREY,
    "u16.png": GREY.astype(np.uint16) * 257,
    "u16.tif": np.where(GREY < 255, GREY.astype(np.uint16) * 257 + 200, 65535).astype(np.uint16),
    "u16.jp2": GREY.astype(np.uint16) * 257,
    "u16.pgm": GREY.astype(np.uint16) * 257,
    "i32.tif": GREY.astype(np.int32),
    "f32.tif": (GREY / 255).astype(np.float32),
    "f32.pfm": (GREY / 255).astype(np.float32),
}


@pytest.mark.parametrize("name", DECLARED)
def test_grey_of_any_depth_is_scaled_as_its_type_says(tmp_path: Path, name: str) -> None:
    image = read_image(grey_file(tmp_path / name, DECLARED[name]))
    assert image.shape == (3, 16, 16)
    assert all(np.array_equal(channel, GREY) for channel in image.numpy())


def test_twelve_bits_that_are_declared(tmp_path: Path) -> None:
    values = GREY.astype(np.uint32) * 4095 // 255
    bits = int("".join(f"{value:012b}" for value in values.ravel()), 2).to_bytes(16 * 16 * 12 // 8, "big")
    tags = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 12 * 9 + 4, 277: 1, 278: 16, 279: len(bits)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + bits)
    assert np.abs(read_image(tmp_path / "a.tif")[0].numpy().astype(int) - GREY).max() <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (GREY.astype(np.int32) * 257, r"32-bit grey from 0 to 65535, where 0 is black and 255 white: scale all"),
        (GREY.astype(np.int32) - 1, r"32-bit grey from -1 to 254"),
        (GREY.astype(np.float32), r"32-bit floating-point grey from 0 to 255, where 0 is black and 1 white"),
        (GREY.astype(np.float32) * 257, r"from 0 to 65535"),
        (GREY.astype(np.float32) / 255 - 0.1, r"from -0\.1 to 0\.9"),
        (np.where(GREY == 3, np.nan, GREY / 255).astype(np.float32), r"from nan to nan"),
        (np.where(GREY == 3, np.inf, GREY / 255).astype(np.float32), r"from 0 to inf"),
        (GREY.astype(np.uint16) * 16, r"16-bit grey up to 4080 only, of 65535, which would be almost black"),
        (GREY.astype(np.uint16), r"up to 255 only"),
    ],
    ids=str,
)
def test_values_whose_white_is_unknown_are_refused_and_never_black(
    tmp_path: Path, values: np.ndarray, message: str
) -> None:
    path = grey_file(tmp_path / "a.tif", values)
    with pytest.raises(BrokenImageError, match=message):
        read_image(path)
    assert read_size(path) == (16, 16)


def test_a_black_image_is_black_in_every_depth(tmp_path: Path) -> None:
    for number, kind in enumerate((np.uint8, np.uint16, np.int32, np.float32)):
        assert read_image(grey_file(tmp_path / f"{number}.tif", np.zeros((4, 4), kind))).max() == 0


def hiding(mode: str, hidden: int) -> tuple[Image.Image, dict[str, object]]:
    """A dark square on a transparent ground of a colour that is not seen, and the options to save it with."""
    dark, options = {"L": 40, "P": 8, "RGB": (40,) * 3, "LA": (40, 255), "RGBA": (40,) * 3 + (255,)}[mode], {}
    ground = {"L": hidden, "P": 7, "RGB": (7, 8, hidden), "LA": (hidden, 0), "RGBA": (hidden, 3, 4, 0)}[mode]
    image = Image.new(mode, (8, 8), ground)
    if mode == "P":
        image.putpalette([0] * 21 + [hidden, 3, 4] + [40] * 3)
    image.paste(dark, (2, 2, 6, 6))
    if mode in ("L", "P", "RGB"):
        options = {"transparency": ground}
    return image, options


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("P", "gif"), ("LA", "tif")]
    + [(mode, "png") for mode in ("L", "P", "RGB", "LA", "RGBA")]
    + [("RGBA", ending) for ending in ("tif", "webp", "tga")],
)
def test_what_is_transparent_is_white_whatever_colour_it_hides(tmp_path: Path, mode: str, ending: str) -> None:
    read = []
    for hidden in (0, 200):
        image, options = hiding(mode, hidden)
        options |= {"lossless": True, "exact": True} if ending == "webp" else {}
        image.save(tmp_path / f"a.{ending}", **options)
        read.append(read_image(tmp_path / f"a.{ending}"))
    assert torch.equal(*read)
    assert (read[0][:, 0, 0].tolist(), read[0][:, 4, 4].tolist()) == ([255] * 3, [40] * 3)


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    colour, alpha = pixels[..., :3].astype(float), pixels[..., 3:] / 255
    expected = colour * alpha + 255 * (1 - alpha)
    assert np.abs(read_image(tmp_path / "a.png").permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_an_opaque_alpha_changes_no_bit(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).convert(mode)
    options = {"transparency": bytes([255] * 256)} if mode == "P" else {}
    image.save(tmp_path / "a.png", **options)
    assert np.array_equal(read_image(tmp_path / "a.png").permute(1, 2, 0), image.convert("RGB"))


def test_transparent_grey_of_16_bits_is_white(tmp_path: Path) -> None:
    values = np.array([[1000, 65535, 257 * 9]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [255, 255, 9]


MODES = {
    "avif": "RGB RGBA",
    "bmp": "1 L P RGB RGBA",
    "dds": "L LA RGB RGBA",
    "gif": "1 L P",
    "heic": "RGB RGBA",
    "ico": "RGBA",
    "jp2": "L LA RGB RGBA I;16",
    "jpg": "L RGB CMYK YCbCr",
    "mpo": "RGB",
    "pcx": "1 L P RGB",
    "png": "1 L LA P RGB RGBA I;16",
    "ppm": "1 L RGB I;16",
    "qoi": "RGB RGBA",
    "sgi": "L RGB",
    "tga": "L LA P RGB RGBA",
    "tif": "1 L LA P PA RGB RGBA CMYK YCbCr LAB I;16 I F",
    "webp": "RGB RGBA",
}
# What Pillow before 13 writes and cannot read again, or reads of half a file.
AT_FAULT = {("ico", "RGBA"), ("tif", "YCbCr"), ("dds", "")} if int(PIL.__version__.split(".")[0]) < 13 else set()
WITH_EXIF = {"avif", "jpg", "mpo", "png", "tif", "webp"}


def upright(mode: str) -> Image.Image:
    """20 x 12 pixels, bright at the upper left, as far as the mode has grades."""
    ramp = np.add.outer(np.linspace(1, 0.1, 12), np.linspace(1, 0.1, 20)) / 2
    if mode == "F":
        return Image.fromarray(ramp.astype(np.float32))
    if mode == "I;16":
        return Image.fromarray((ramp * 65535).astype(np.uint16))
    grey = Image.fromarray((ramp * 255).astype(np.uint8))
    if mode in ("I", "PA", "LA"):
        return grey.convert(mode)
    return grey.convert("RGB").convert(mode)


@pytest.mark.parametrize(("ending", "mode"), [(end, mode) for end, modes in MODES.items() for mode in modes.split()])
def test_every_format_and_mode_is_read_and_its_size_known(tmp_path: Path, ending: str, mode: str) -> None:
    if ending == "heic":
        pytest.importorskip("pillow_heif", reason="HEIF needs an extra").register_heif_opener()
    if ending == "avif" and not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
    if (ending, mode) in AT_FAULT:
        pytest.skip("this Pillow cannot read what it writes")
    path, plain = tmp_path / f"a.{ending}", upright(mode)
    for orientation in range(1, 9) if ending in WITH_EXIF else [1]:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options = {"exif": exif} if ending in WITH_EXIF and orientation > 1 else {}
        plain.save(path, **options)
        image = read_image(path)
        assert read_size(path) == image.shape[1:] == ((12, 20) if orientation < 5 else (20, 12))
        if mode != "1" and orientation in (1, 3):
            corner, other = (image[:, y, x].float().mean() for y, x in ((1, 1), (-2, -2)))
            assert (corner - other > 150) if orientation == 1 else (other - corner > 150)


@pytest.mark.parametrize("ending", sorted({*MODES} - {"heic", "avif", "ico"}))
def test_half_a_file_is_no_image(tmp_path: Path, ending: str) -> None:
    if (ending, "") in AT_FAULT:
        pytest.skip("this Pillow reads half a file")
    path, mode = tmp_path / f"a.{ending}", MODES[ending].split()[-1]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode if mode not in ("I;16", "F") else "L").save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BrokenImageError, match=f"the image {path} cannot be read"):
        read_image(path)


def test_of_several_frames_the_first_is_read(tmp_path: Path) -> None:
    frames = [Image.new("L", (6, 4), value) for value in (10, 200)]
    for ending in ("gif", "tif", "png", "webp"):
        frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
        assert read_image(tmp_path / f"a.{ending}").unique().tolist() == [10]


def test_a_png_may_say_at_its_end_which_side_is_up(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png", exif=exif)
    content = (tmp_path / "a.png").read_bytes()
    start, end = content.index(b"eXIf") - 4, content.index(b"IEND") - 4
    stop = start + 12 + int.from_bytes(content[start : start + 4], "big")
    (tmp_path / "a.png").write_bytes(content[:start] + content[stop:end] + content[start:stop] + content[end:])
    assert read_size(tmp_path / "a.png") == read_image(tmp_path / "a.png").shape[1:] == (7, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: it is empty$"),
        (b"<!DOCTYPE html>\n<html>not found</html>", r"it is text that begins with '<!DOCTYPE html>"),
        ("Grüße".encode() * 50, "it is text that begins with"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS .* `git lfs pull`"),
        (bytes(range(256)), "of no format that Pillow knows, or its beginning is broken"),
        (b"II*\0" + bytes(64), "does not know its kind of TIFF"),
        (bytes(4) + b"ftypheic" + bytes(64), "cannot be read"),
        (bytes(4) + b"ftypavif" + bytes(64), "cannot be read"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (read_image, read_size):
        with pytest.raises(BrokenImageError, match=message):
            read(tmp_path / "a.jpg")
    with pytest.raises(BrokenImageError, match=r"none\.jpg is missing"):
        read_size(tmp_path / "none.jpg")


def test_without_the_extra_heif_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.jpg").write_bytes(bytes(4) + b"ftypheic" + bytes(64))
    with pytest.raises(BrokenImageError, match=r"a\.jpg .* HEIF, which .*: pip install 'diffperception\[heif\]'$"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.filterwarnings("error")
def test_large_images_are_read_and_too_large_ones_named(tmp_path: Path) -> None:
    """20,000 x 20,000 pixels are over what Pillow calls a bomb; only headers are read here."""
    limit = Image.MAX_IMAGE_PIXELS
    for side in (20_000, 40_000):
        (tmp_path / f"{side}.bmp").write_bytes(
            b"BM" + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(64)
        )
    assert read_size(tmp_path / "20000.bmp") == (20_000, 20_000)
    with pytest.raises(BrokenImageError, match=r"40000 x 40000 pixels, more than the 1073741824 .* cut it into tiles"):
        read_size(tmp_path / "40000.bmp")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read_size, [tmp_path / "20000.bmp"] * 200)) == {(20_000, 20_000)}
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_in_another_normal_form_is_the_same_file(tmp_path: Path, form: str) -> None:
    """macOS splits letters with marks, Windows and Linux mostly do not, and annotations go from one to the other."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    folder = tmp_path / unicodedata.normalize("NFC", "Übung")
    write(folder / unicodedata.normalize(form, "Höhe/größe.png"), 51)
    path = folder / unicodedata.normalize(other, "Höhe/größe.png")
    assert read_image(path).unique().tolist() == [51]
    assert read_size(path) == (4, 6)


def test_where_a_tiff_says_that_0_is_white_it_is(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for number, (grey, kind) in enumerate([(65535 - ramp, 0), (ramp, 1)]):
        Image.fromarray(grey).save(tmp_path / f"{number}.tif", tiffinfo={262: kind})
        with Image.open(tmp_path / f"{number}.tif") as image:
            assert image.tag_v2[262] == kind  # type: ignore[attr-defined]
        assert read_image(tmp_path / f"{number}.tif")[0].tolist() == (ramp // 257).tolist()
