import pytest
import torch

from diffperception.models import UNet
from diffperception.segmentation.baseline import masked_cross_entropy, predict_labels, random_crop, segmentation_unet
from diffperception.training import BaselineOptions
from tests.helpers.networks import tiny_unet
from tests.helpers.pixel_classifiers import train_from_scratch
from tests.helpers.scenes import scene


def test_the_network_is_the_generators_but_for_its_last_layer():
    like = tiny_unet(out_channels=6)
    network = segmentation_unet(like, 5)
    ours, theirs = (dict(n.named_parameters()) for n in (network, like))
    assert theirs.keys() == ours.keys()
    assert {name for name in ours if ours[name].shape != theirs[name].shape} == {"out_conv.weight", "out_conv.bias"}
    assert network.out_channels == 5


def trained(steps: int) -> UNet:
    images, masks = zip(*(scene(i) for i in range(2)), strict=True)
    torch.manual_seed(0)
    network = segmentation_unet(tiny_unet(), 3)
    options = BaselineOptions(steps, 4, 16, lr=3e-3)
    return train_from_scratch(network, images, masks, options, 1)


def test_a_network_learns_three_colours():
    network = trained(25)
    image, mask = scene(7, height=27, width=37)
    labels = predict_labels(network, image)
    assert labels.shape == mask.shape
    assert (labels == mask).float().mean() > 0.9
    large = predict_labels(network, image, (54, 74))
    assert (large == mask.repeat_interleave(2, 0).repeat_interleave(2, 1)).float().mean() > 0.85


def test_a_seed_gives_the_same_network():
    one, same = (trained(2).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_crops_keep_image_and_mask_together():
    mask = torch.arange(20 * 12).view(20, 12)
    image = mask[None].expand(3, -1, -1).float()
    generator = torch.Generator().manual_seed(0)
    crops = [random_crop(image, mask, 16, generator) for _ in range(20)]
    for part, labels in crops:
        assert part.shape == (3, 16, 16)
        assert labels.shape == (16, 16)
        inside = labels != 255  # 255 > the 240 pixels there are
        assert inside.sum() == 16 * 12
        assert torch.equal(part[0][inside].long(), labels[inside])
    assert len({int(labels[labels != 255][0]) for _, labels in crops}) > 4


def test_ignored_pixels_do_not_count():
    logits = torch.randn(2, 3, 4, 4)
    labels = torch.randint(3, (2, 4, 4))
    half = labels.clone()
    half[1] = 255
    assert masked_cross_entropy(logits, half) == pytest.approx(
        float(masked_cross_entropy(logits[:1], labels[:1])), abs=1e-6
    )
    assert masked_cross_entropy(logits, torch.full_like(labels, 255)) == 0


def test_a_crop_that_does_not_halve_evenly_is_refused():
    image, mask = scene()
    with pytest.raises(ValueError, match="18"):
        train_from_scratch(tiny_unet(), [image], [mask], BaselineOptions(steps=1, crop=18), 0)
