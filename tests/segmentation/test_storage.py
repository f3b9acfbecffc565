import pytest
import torch

from diffperception.segmentation.storage import KeptFeatures, in_bytes, parse_bytes, stored_bytes
from tests.segmentation.test_classifier import scene
from tests.segmentation.test_features import diffusion


def test_bytes_are_those_of_the_maps():
    features = diffusion()
    sizes = [(32, 32), (30, 45)]
    maps = [m for size in sizes for m in features.maps(torch.rand(3, *size)).maps]
    assert stored_bytes(features, sizes, torch.float16) == sum(m.half().nbytes for m in maps)
    assert stored_bytes(features, sizes, torch.float32) == sum(m.nbytes for m in maps)


def test_kept_maps_are_computed_once_an_image():
    features, image = diffusion(), scene()[0]
    kept = KeptFeatures(features)
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


@pytest.mark.parametrize(
    ("text", "number"), [("2GB", 2 * 10**9), ("1.5 mb", 1_500_000), ("300k", 300_000), ("1e6", 10**6), ("12 B", 12)]
)
def test_amounts_of_memory_are_read(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GB", "2 XB", "-1GB", "1.2.3GB"])
def test_other_words_are_no_amount(text):
    with pytest.raises(ValueError, match="2GB or 500MB"):
        parse_bytes(text)


def test_amounts_are_told_in_units_of_their_size():
    assert [in_bytes(n) for n in (999, 1000, 123_456_789, 2 * 10**9)] == ["999 bytes", "1.0 kB", "123.5 MB", "2.0 GB"]
