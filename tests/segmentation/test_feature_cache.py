import pytest
import torch

from diffperception.segmentation import RGBFeatures
from diffperception.segmentation.feature_cache import (
    CachedFeatures,
    file_bytes,
    image_key,
    in_bytes,
    parse_bytes,
    save_maps,
    stored_bytes,
)
from diffperception.segmentation.maps import FeatureMaps
from tests.helpers.pixel_classifiers import diffusion
from tests.helpers.scenes import Pyramid, scene


def test_bytes_are_those_of_the_maps():
    features = diffusion()
    sizes = [(32, 32), (30, 45)]
    maps = [m for size in sizes for m in features.maps(torch.rand(3, *size)).maps]
    assert stored_bytes(features, sizes, torch.float16) == sum(m.half().nbytes for m in maps)
    assert stored_bytes(features, sizes, torch.float32) == sum(m.nbytes for m in maps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [(1, 1), (30, 45), (70, 32)])
def test_bytes_of_a_file_are_those_on_disk(tmp_path, dtype, size):
    for features in (diffusion(), RGBFeatures()):
        save_maps(
            features.maps(torch.rand(3, *size)).to(dtype),
            features.info,
            tmp_path / "maps.safetensors",
            image_key(torch.rand(3, *size)),
        )
        assert file_bytes(features, size, dtype) == (tmp_path / "maps.safetensors").stat().st_size


def test_kept_maps_are_computed_once_an_image():
    features, image = diffusion(), scene()[0]
    kept = CachedFeatures(features)
    wanted = features.maps(image)
    first = kept.maps(image)
    for parameter in features.parameters():
        parameter.data.zero_()
    again, other = kept.maps(image.clone()), kept.maps(image + 0.1)
    assert kept.strides == features.strides
    assert first.size == wanted.size
    for a, b, c, d in zip(wanted.maps, first.maps, again.maps, other.maps, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
        assert torch.equal(b, c)
        assert not d.any()


def test_maps_too_large_to_keep_are_refused():
    image = torch.rand(3, 8, 8)
    with pytest.raises(ValueError, match=r"a feature of an image is not finite in torch\.float16: .* float32"):
        CachedFeatures(Pyramid(scale=-1e6)).maps(image)
    assert CachedFeatures(Pyramid(scale=1e6), torch.float32).maps(image).maps[0].abs().max() > 65504


@pytest.mark.parametrize("value", [65600.0, -1e9, float("nan")])
def test_one_value_is_enough_to_refuse_maps(value):
    cells = torch.zeros(2, 3, 3)
    cells[1, 2, 0] = value
    maps = FeatureMaps([torch.zeros(1, 6, 6), cells], [1, 2], (6, 6))
    with pytest.raises(ValueError, match=r"a feature of a\.png is not finite"):
        maps.stored(torch.float16, "a.png")


@pytest.mark.parametrize(
    ("text", "number"), [("2GB", 2 * 10**9), ("1.5 mb", 1_500_000), ("300k", 300_000), ("1e6", 10**6), ("12 B", 12)]
)
def test_amounts_of_memory_are_read(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GB", "2 XB", "-1GB", "1.2.3GB", "1e999"])
def test_other_words_are_no_amount(text):
    with pytest.raises(ValueError, match="2GB or 500MB"):
        parse_bytes(text)


def test_amounts_are_told_in_units_of_their_size():
    assert [in_bytes(n) for n in (999, 1000, 123_456_789, 2 * 10**9)] == ["999 bytes", "1.0 kB", "123.5 MB", "2.0 GB"]
