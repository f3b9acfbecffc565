"""Images of any size for networks that take whole multiples."""

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffperception.models import any_size

MULTIPLE, STRIDES = 8, [2, 4]


def means(images: Tensor) -> list[Tensor]:
    """What a network of these strides could give; it takes no other sizes."""
    assert all(side % MULTIPLE == 0 for side in images.shape[-2:])
    return [F.avg_pool2d(images, stride) for stride in STRIDES]


def test_images_of_whole_multiples_are_read_as_they_are() -> None:
    images = torch.rand(2, 3, 16, 24)
    for found, expected in zip(any_size(means, images, MULTIPLE, STRIDES), means(images), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (13, 40), (15, 17)])
def test_maps_of_other_sizes_cover_the_image_and_no_more(size: tuple[int, int]) -> None:
    maps = any_size(means, torch.ones(1, 3, *size), MULTIPLE, STRIDES)
    assert [m.shape[-2:] for m in maps] == [tuple(-(-side // stride) for side in size) for stride in STRIDES]


@pytest.mark.parametrize(("mode", "mean"), [("constant", 1 / 4), ("replicate", 1)])
def test_padding_is_zeros_or_the_last_pixels(mode: Literal["constant", "replicate"], mean: float) -> None:
    """The corner of a picture of ones, 5 x 5, has a quarter of a whole cell of 2 x 2 pixels."""
    finest, _ = any_size(means, torch.ones(1, 3, 5, 5), MULTIPLE, STRIDES, mode)
    assert finest[..., -1, -1].unique().tolist() == [mean]
