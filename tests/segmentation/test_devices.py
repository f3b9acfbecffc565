"""Segmenting and gathering pixels on every device: nothing is mixed, and an image is waited for a few times."""

import pytest
import torch

from diffperception.devices import autocast
from diffperception.segmentation import DiffusionFeatures, MeanIoU, PixelEnsemble, PixelSegmenter, TimmFeatures
from diffperception.segmentation.pixels import LabelledPixels
from tests.helpers.devices import Device
from tests.helpers.pixel_classifiers import diffusion, trained_like

MAKE = {"diffusion": diffusion, "timm": lambda: TimmFeatures("resnet18", (4, 8), window=32)}


def segmenter(features: DiffusionFeatures | TimmFeatures) -> PixelSegmenter:
    ensemble = trained_like(PixelEnsemble(features.channels, 3, 2))
    for weight in ensemble.parameters():
        weight.data *= 0.3
    return PixelSegmenter(features, ensemble, ["a", "b", "c"], short_side=40)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_an_image_is_waited_for_at_most_four_times(device: Device, make) -> None:
    model, image = segmenter(make()), torch.rand(3, 60, 75, generator=torch.Generator().manual_seed(0))
    expected = model.segment(image)
    device.move(model)
    model.segment(image)  # what is kept from one image to the next is made
    before = len(device.waits)
    found = model.segment(image)
    assert len(device.waits) - before <= 4, device.report()
    torch.testing.assert_close(device.host(found.uncertainty), expected.uncertainty, rtol=1e-3, atol=1e-3)
    counts = MeanIoU(3)
    counts.update(found.labels, expected.labels)
    assert counts.mean() > 0.95


def test_half_precision_is_close(device: Device) -> None:
    model, image = segmenter(diffusion()), torch.rand(3, 60, 75, generator=torch.Generator().manual_seed(0))
    expected = model.segment(image)
    device.move(model)
    with autocast(device.device, "bf16"):
        found = model.segment(image)
    assert (device.host(found.labels) == expected.labels).float().mean() > 0.8


def test_gathering_a_minibatch_waits_for_nothing(device: Device) -> None:
    features, image = diffusion(), torch.rand(3, 40, 45, generator=torch.Generator().manual_seed(0))
    mask = torch.randint(3, (40, 45)).to(torch.uint8)
    chosen = torch.arange(0, 1800, 50)
    expected, labels = LabelledPixels(features, [image], [mask], torch.float32, ["a"]).gather(chosen)
    pixels = LabelledPixels(device.move(features), [image], [mask], torch.float32, ["a"])
    chosen = device.move(chosen)
    before = len(device.waits)
    found = pixels.gather(chosen)
    assert len(device.waits) == before, device.report()
    torch.testing.assert_close(device.host(found[0]), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(device.host(found[1]), labels)
