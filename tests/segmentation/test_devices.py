"""Segmenting and gathering pixels on every device: nothing is mixed, and an image is waited for a few times."""

from pathlib import Path

import pytest
import torch

from diffperception.data.masks import MaskDataOptions, MaskFolder
from diffperception.devices import autocast
from diffperception.segmentation import DiffusionFeatures, MeanIoU, PixelEnsemble, PixelSegmenter, TimmFeatures
from diffperception.segmentation.inference import evaluate_segmenter, segment_folder
from diffperception.segmentation.pixels import LabelledPixels
from diffperception.segmentation.probe import expected_seconds, probe_features
from tests.helpers.devices import Device
from tests.helpers.pixel_classifiers import diffusion, trained_like
from tests.helpers.scenes import write_scenes

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


def test_pictures_and_the_probe_have_the_precision_asked_for(tmp_path: Path) -> None:
    write_scenes(tmp_path, range(2))
    model, used = segmenter(diffusion()), set()
    convolution = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda *call: used.add(call[2].dtype))
    folder = MaskFolder(MaskDataOptions(tmp_path / "images", tmp_path / "masks", ["a", "b", "c"]))
    evaluate_segmenter(model, folder, tmp_path / "score", 1, 0, "bf16")
    segment_folder(model, tmp_path / "images", tmp_path / "out", rank=True, workers=0, precision="bf16")
    images, masks = list(folder.images), list(folder.masks)
    expected_seconds(model.features, images, "bf16")
    probe_features(model.features, images, masks, 3, pixels=50, precision="bf16")
    assert used == {torch.bfloat16}


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
