import math

import pytest
import torch
from torch import Tensor, nn

from diffperception.segmentation import (
    DiffusionFeatures,
    PixelEnsemble,
    PixelSegmenter,
    RGBFeatures,
    Segmentation,
)
from diffperception.segmentation.ensemble import combine_members
from diffperception.segmentation.maps import FeatureMaps
from diffperception.segmentation.mlp import EnsembleBatchNorm
from diffperception.segmentation.pixels import LabelledPixels, checked_masks
from tests.helpers.pixel_classifiers import generator, member, random_maps, trained_like
from tests.helpers.scenes import Pyramid, scene

# Native resolution


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (37, 18), (5, 61)])
@pytest.mark.parametrize("classes", [3, 34])
def test_logits_equal_those_of_every_member_on_dense_features(size, classes):
    maps = random_maps(*size)
    ensemble = trained_like(PixelEnsemble(25, classes, members=3))
    ensemble.band_pixels = 300  # several bands
    logits = ensemble.logits(maps)
    assert logits.shape == (3, classes, *size)
    rows = maps.dense().flatten(1).T
    for index in range(3):
        dense = member(ensemble.mlps, index).eval()(rows).detach()
        torch.testing.assert_close(logits[index].flatten(1).T, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 61), (153, 37), (16, 16)])
def test_maps_need_no_more_cells_than_the_image_has(size):
    """Of 153 rows, a map of stride 2 has cells for 154 and one of stride 8 for 160."""
    maps, ensemble = random_maps(*size).cropped(), trained_like(PixelEnsemble(25, 3, members=2))
    height, width = size
    assert [m.shape[1:] for m in maps.maps] == [(-(-height // s), -(-width // s)) for s in maps.strides]
    ensemble.band_pixels = 300
    logits = ensemble.logits(maps)
    assert logits.shape == (2, 3, *size)
    rows = maps.dense().flatten(1).T
    for index in range(2):
        dense = member(ensemble.mlps, index).eval()(rows).detach()
        torch.testing.assert_close(logits[index].flatten(1).T, dense, rtol=1e-5, atol=1e-5)


def test_maps_in_half_precision_are_close():
    maps, ensemble = random_maps(37, 18), trained_like(PixelEnsemble(25, 3, members=2))
    exact = ensemble.logits(maps)
    assert 0 < (ensemble.logits(maps.to(torch.float16)) - exact).abs().max() < 1e-2 * exact.std()


def test_batched_norm_equals_each_members_own():
    norm = EnsembleBatchNorm(3, 5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    singles = [nn.BatchNorm1d(5) for _ in range(3)]
    for i, single in enumerate(singles):
        single.weight.data, single.bias.data = norm.weight.data[i].clone(), norm.bias.data[i].clone()
    for _ in range(2):
        x = 3 * torch.randn(3, 64, 5) + 1
        torch.testing.assert_close(norm(x), torch.stack([s(part) for s, part in zip(singles, x, strict=True)]))
    torch.testing.assert_close(norm.running_var, torch.stack([s.running_var for s in singles]))
    norm.eval()
    expected = torch.stack([s.eval()(part) for s, part in zip(singles, x, strict=True)])
    torch.testing.assert_close(norm(x), expected)
    scale, shift = norm.as_affine()
    torch.testing.assert_close(x * scale[:, None] + shift[:, None], expected)


# Summary of the members


def test_uncertainty_of_members_that_agree_and_of_two_that_do_not():
    sure, unsure = torch.tensor([50.0, 0.0]), torch.zeros(2)
    agree = torch.stack([unsure, unsure])[:, None, None]
    differ = torch.stack([sure, sure.flip(0)])[:, None, None]
    mixed = torch.stack([sure, unsure])[:, None, None]
    assert combine_members(agree)[1].item() == pytest.approx(0, abs=1e-6)
    assert combine_members(differ)[1].item() == pytest.approx(math.log(2), abs=1e-6)
    mean = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert combine_members(mixed)[1].item() == pytest.approx(mean - math.log(2) / 2, abs=1e-6)


def test_labels_are_the_majoritys_whatever_the_mean_says():
    logits = torch.tensor([[0.0, 0.1, -9], [0.0, 0.1, -9], [9.0, 0.0, -9]])[:, None, None]
    labels, _, probabilities, votes = combine_members(logits)
    assert votes.flatten().tolist() == [1, 2, 0]
    assert labels.item() == 1
    assert probabilities.argmax() == 0
    torch.testing.assert_close(probabilities, logits.softmax(-1).mean(0))


def test_an_image_is_summarised_band_by_band():
    maps, ensemble = random_maps(37, 18), trained_like(PixelEnsemble(25, 3, members=4))
    labels, uncertainty, mean, votes = combine_members(ensemble.logits(maps).permute(0, 2, 3, 1))
    ensemble.band_pixels = 300
    found = ensemble.segment(maps, probabilities=True)
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.votes, votes.permute(2, 0, 1).to(torch.uint8))
    torch.testing.assert_close(found.uncertainty, uncertainty, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.probabilities, mean.permute(2, 0, 1), rtol=1e-4, atol=1e-5)
    assert ensemble.segment(maps).probabilities is None


def test_an_images_score_is_the_mean_of_its_top_tenth():
    uncertainty = torch.arange(100.0).view(4, 25)[:, torch.randperm(25)]
    nothing = torch.empty(0)
    assert Segmentation(nothing, uncertainty, nothing).score == pytest.approx(94.5)
    assert Segmentation(nothing, torch.tensor([[2.0, 1.0]]), nothing).score == 2


# Training


def test_gathered_pixels_are_those_of_the_maps_and_masks():
    features = Pyramid()
    pairs = [scene(0), scene(1, 13, 22)]
    pairs[0][1][:, 7] = 255
    pairs[1][1][3] = 255
    images, masks = [p[0] for p in pairs], [p[1].to(torch.uint8) for p in pairs]
    pixels = LabelledPixels(features, images, masks, torch.float32, ["a", "b"])
    labelled = [(mask != 255).nonzero() for mask in masks]
    assert len(pixels) == sum(map(len, labelled))
    x, labels = pixels.gather(torch.arange(len(pixels)))
    expected = torch.cat([features.maps(i).at_points(p) for i, p in zip(images, labelled, strict=True)])
    order = pixels.channel_order(features.info)
    torch.testing.assert_close(x, expected[:, order])
    assert labels.tolist() == [int(m[tuple(p)]) for m, points in zip(masks, labelled, strict=True) for p in points]


def test_twenty_pixels_of_a_class_are_enough_and_nineteen_are_not():
    mask = torch.zeros(10, 10, dtype=torch.int64)
    mask.view(-1)[:20], mask.view(-1)[20:39] = 1, 2
    (checked,), notes = checked_masks([torch.zeros(3, 10, 10)], [mask], "012", 20, ["a"])
    assert torch.equal(checked == 1, mask == 1)
    assert torch.equal(checked == 255, mask == 2)
    assert notes[0].startswith("a has only 19 pixels of class 2")


def test_three_of_many_regions_are_named_and_the_others_counted():
    mask = torch.arange(100, 300).view(10, 20) % 100  # 100 classes
    mask[:5] = 100
    images, masks, names = [torch.zeros(3, 10, 20)] * 2, [mask, mask], ["a.png", "b.png"]
    few = "a.png has only 1 pixel of class {}; they are ignored."
    classes = [str(label) for label in range(110)]
    checked, notes = checked_masks(images, masks, classes, 2, names)
    assert [m.unique().tolist() for m in checked] == [[100, 255]] * 2
    assert notes == [
        *(few.format(label) for label in (0, 1, 2)),
        "likewise in 197 more cases.",
        "no image has pixels of class 0, 1, 2 and 106 other classes, which will hardly be predicted.",
    ]
    with pytest.raises(ValueError, match=r"label some\. (a.png .*){3} likewise in 199 more cases\.$"):
        checked_masks(images, masks, classes, 999, names)


def test_other_faults_end_in_one_sentence():
    with pytest.raises(ValueError, match="takes 13 features a pixel, but the extractor gives 12"):
        PixelEnsemble(13, 3, 1).segment(Pyramid().maps(scene()[0]))
    with pytest.raises(ValueError, match="2 to 255 classes"):
        PixelEnsemble(13, 1)
    with pytest.raises(ValueError, match="1 to 255 members, not 256"):
        PixelEnsemble(1, 2, 256)


# In one file


def test_an_exported_segmenter_works_alone(tmp_path):
    features = DiffusionFeatures(generator(), (1, 3), (50,), window=16, seed=7)
    segmenter = PixelSegmenter(features, trained_like(PixelEnsemble(features.channels, 2, 2)), ["sky", "sea"])
    features.reader.noise.mul_(-0.5)  # other than what the seed would give again
    segmenter.save(tmp_path / "model.safetensors")
    image = torch.rand(3, 20, 37)
    expected = segmenter.segment(image, probabilities=True)
    loaded = PixelSegmenter.load(tmp_path / "model.safetensors")
    found = loaded.segment(image, probabilities=True)
    assert loaded.classes == ["sky", "sea"]
    assert torch.equal(loaded.features.reader.noise, features.reader.noise)
    torch.testing.assert_close(found.probabilities, expected.probabilities)
    assert found.score == pytest.approx(expected.score)


def test_a_segmenters_parts_must_fit():
    with pytest.raises(ValueError, match=r"takes 4 features .* gives 3"):
        PixelSegmenter(RGBFeatures(), PixelEnsemble(4, 2), ["a", "b"])
    with pytest.raises(ValueError, match="two classes are named b: give every class a name of its own"):
        PixelSegmenter(RGBFeatures(), PixelEnsemble(3, 3), ["b", "a", "b"])


def test_a_whole_large_image_never_has_its_dense_features_in_memory(monkeypatch):
    """No tensor made while predicting is half as large as the dense features would be."""
    maps = FeatureMaps([torch.randn(512, 32, 32)], [8], (256, 256))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **kwargs or {})
            largest = max(largest, result.numel() if isinstance(result, Tensor) else 0)
            return result

    ensemble = PixelEnsemble(512, 3, 4)
    with Watch():
        ensemble.segment(maps)
    assert 0 < largest < 512 * 256 * 256 / 10
