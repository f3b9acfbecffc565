"""What is exported: features of a saved generator, images at its scale, and what comes back at theirs."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from diffperception.data.masks import MaskDataOptions
from diffperception.diffusion import linear_schedule
from diffperception.models import DiffusionModel, FeatureInfo, UNet
from diffperception.segmentation import (
    DiffusionFeatures,
    FeatureExtractor,
    PixelEnsemble,
    PixelSegmenter,
    RGBFeatures,
)
from diffperception.training import FitOptions, fit_ensemble


def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(channels=32, channel_mult=(1, 1), num_res_blocks=1, attention=(), num_head_channels=32).eval()


def test_a_saved_generator_knows_its_schedule_window_and_null_class(tmp_path: Path) -> None:
    generator = DiffusionModel(["a", "b"], unet(), schedule="cosine", image_size=(8, 13 + 3), null_class=True)
    generator.save(tmp_path / "model.safetensors")
    features = DiffusionFeatures(tmp_path / "model.safetensors", (0, 3), (50, 200))
    expected = DiffusionFeatures(generator, (0, 3), (50, 200), 16, label=2)
    assert features.window == 16
    assert features.generator.schedule.alpha(50) == generator.schedule.alpha(50) != linear_schedule().alpha(50)
    image = torch.rand(3, 20, 24)
    for got, want in zip(features.maps(image).maps, expected.maps(image).maps, strict=True):
        assert torch.equal(got, want)


def test_times_of_another_path_than_the_generators_are_refused(tmp_path: Path) -> None:
    """Those that are tried and taken by default are of discrete paths."""
    DiffusionModel(None, unet(), schedule="flow", prediction="flow", image_size=16).save(tmp_path / "flow.safetensors")
    with pytest.raises(ValueError, match=r"\[50, 150, 250\] lie outside of this path: .* from 0 to 1"):
        DiffusionFeatures(tmp_path / "flow.safetensors", (0,))


def test_a_unet_alone_has_the_linear_schedule(tmp_path: Path) -> None:
    network = unet()
    network.save(tmp_path / "unet.safetensors")
    features = DiffusionFeatures(tmp_path / "unet.safetensors", (0,), (50,), window=10)
    schedule = linear_schedule(1000)
    assert features.reader.levels == [(float(schedule.alpha(50)), float(schedule.sigma(50)), 50.0)]
    assert all(
        torch.equal(a, b) for a, b in zip(features.generator.network.parameters(), network.parameters(), strict=True)
    )


def test_features_need_a_unet(tmp_path: Path) -> None:
    PixelSegmenter(RGBFeatures(), PixelEnsemble(3, 2, 1), ["a", "b"]).save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds a PixelSegmenter: give the file of a generator or a UNet"):
        DiffusionFeatures(tmp_path / "model.safetensors")


class Edges(FeatureExtractor):
    """A user's own: how much brighter a pixel is than its surroundings of some size, by a weight of its own."""

    def __init__(self, side: int = 3) -> None:
        super().__init__([FeatureInfo("edges", 3, 1)])
        self.side = side
        self.gain = torch.nn.Parameter(torch.ones(1))

    def encode(self, images: torch.Tensor) -> list[torch.Tensor]:
        blurred = F.avg_pool2d(images, self.side, 1, self.side // 2, count_include_pad=False)
        return [self.gain * (images - blurred)]


def test_a_users_own_features_are_trained_on_saved_and_loaded(tmp_path: Path) -> None:
    features = Edges(5)
    features.gain.data.fill_(7)
    image = torch.rand(3, 20, 24)
    mask = (image[0] > 0.5).long()
    classifier = fit_ensemble(features, [image], [mask], 2, 2, FitOptions(max_minibatches=20))
    model = PixelSegmenter(features, classifier, ["dark", "bright"])
    model.save(tmp_path / "model.safetensors")
    package = __name__.split(".")[0]
    with pytest.raises(ValueError, match=rf"names the class {__name__}:Edges: pass allow=\('{package}',\)"):
        PixelSegmenter.load(tmp_path / "model.safetensors")
    loaded = PixelSegmenter.load(tmp_path / "model.safetensors", allow=(package,))
    assert isinstance(loaded.features, Edges)
    assert loaded.features.side == 5
    ours, theirs = (m.segment(image, probabilities=True) for m in (model, loaded))
    assert torch.equal(ours.probabilities, theirs.probabilities)


def test_images_are_worked_on_at_one_scale_and_answered_at_theirs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PixelSegmenter(RGBFeatures(), PixelEnsemble(3, 3, 5), ["a", "b", "c"], short_side=12)
    for parameter in model.classifier.parameters():
        parameter.data *= 30  # fresh members are all but certain that they do not know
    model.save(tmp_path / "model.safetensors")
    model = PixelSegmenter.load(tmp_path / "model.safetensors")
    image = torch.rand(3, 24, 36)
    small = model.classifier.segment(model.features.maps(TF.resize(image, [12], antialias=True)), probabilities=True)
    found = model.segment(image, probabilities=True)
    assert found.labels.shape == found.uncertainty.shape == (24, 36)
    votes = F.interpolate(small.votes[None].float(), (24, 36), mode="bilinear")[0]
    assert torch.equal(found.labels, votes.argmax(0))
    uncertainty = F.interpolate(small.uncertainty[None, None], (24, 36), mode="bilinear")[0, 0]
    torch.testing.assert_close(found.uncertainty, uncertainty)
    assert torch.equal(found.votes, small.votes)
    assert found.probabilities.shape == small.votes.shape == (3, 12, 18)
    np.testing.assert_allclose(found.probabilities.sum(0), 1, atol=1e-5)
    assert (small.votes.sum(0) == 5).all()
    assert torch.equal(small.votes.argmax(0), small.labels)
    flat = model.segment(torch.full((3, 24, 36), 0.3))
    assert torch.unique(flat.labels).numel() == 1
    assert small.uncertainty.mean() > 0.05
    assert abs(found.uncertainty.mean() - small.uncertainty.mean()) < 0.05 * small.uncertainty.mean()
    same = model.segment(TF.resize(image, [12], antialias=True))
    assert torch.equal(same.votes, small.votes)


def test_classes_of_one_name_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two classes are named cell"):
        MaskDataOptions(tmp_path / "images", tmp_path / "masks", ["cell", "background", "cell"]).open()


def test_predicting_at_a_photographs_size_keeps_no_classes_at_it() -> None:
    """No tensor made while predicting is half as large as one byte a class and pixel."""
    model = PixelSegmenter(RGBFeatures(), PixelEnsemble(3, 40, 2), [str(k) for k in range(40)], short_side=100)
    model.classifier.band_pixels = 1000
    image, largest = torch.rand(3, 400, 500), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **kwargs or {})
            tensors = [t for t in (result if isinstance(result, tuple) else [result]) if isinstance(t, torch.Tensor)]
            largest = max([largest, *(t.untyped_storage().nbytes() for t in tensors)])
            return result

    with Watch():
        found = model.segment(image)
    assert found.probabilities is None
    assert found.labels.shape == found.uncertainty.shape == (400, 500)
    assert found.votes.dtype == torch.uint8
    assert 0 < largest < 40 * 400 * 500 / 2
