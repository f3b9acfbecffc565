import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffperception.models import UNet
from diffperception.segmentation import DiffusionFeatures, probe_features
from diffperception.segmentation.probe import _probe, _sample
from tests.helpers.networks import tiny_unet
from tests.helpers.pixel_classifiers import generator
from tests.helpers.scenes import scene


class ColoursInBlockFour(UNet):
    """The noisy colours in the first channels of block 4, and no more than noise in others."""

    def activations(self, x: Tensor, t: Tensor, blocks: list[int], condition: object = None) -> list[Tensor]:
        infos = [(block, self.block_info[block]) for block in blocks]
        maps = [torch.randn(len(x), i.channels, x.shape[2] // i.stride, x.shape[3] // i.stride) for _, i in infos]
        for (block, info), m in zip(infos, maps, strict=True):
            if block == 4:
                m[:, :3] = F.avg_pool2d(x, info.stride)
        return maps


def candidates(seconds: float, timesteps: list[float]) -> list:
    features = DiffusionFeatures(generator(ColoursInBlockFour(**tiny_unet().arguments)), (0, 3, 4), timesteps)
    images, masks = zip(*(scene(i) for i in range(4)), strict=True)
    return probe_features(features, images, masks, 3, seconds, pixels=300)


def test_the_informative_block_at_the_cleaner_time_comes_first():
    torch.manual_seed(0)
    table = candidates(60, [900, 50])
    assert (table[0].timestep, table[0].block) == (50, 4)
    assert len(table) == 6
    assert [probe.miou for probe in table] == sorted((probe.miou for probe in table), reverse=True)
    assert table[0].miou > 0.8 > 2 * table[-1].miou


def test_the_time_limit_leaves_at_least_one_timestep():
    table = candidates(0, [50, 60])
    assert {probe.timestep for probe in table} == {50}


def test_classes_are_sampled_in_equal_shares():
    mask = torch.zeros(20, 20, dtype=torch.uint8)
    mask[:2], mask[5, 5:8], mask[10:] = 1, 2, 255
    points = _sample(mask, 60, torch.Generator().manual_seed(0))
    assert torch.bincount(mask[tuple(points.T)].long()).tolist() == [20, 20, 3]
    assert len(points.unique(dim=0)) == len(points)


def test_images_are_scored_by_what_others_taught():
    """More features than pixels fit any labels; of other images they then know nothing."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(40, 200, generator=generator) for _ in range(4)]
    labels = [torch.randint(2, (40,), generator=generator) for _ in range(4)]
    assert _probe(features, labels, 2) < 0.5
    assert _probe([features[0]] * 4, [labels[0]] * 4, 2) > 0.95


def test_one_image_is_too_few():
    image, mask = scene()
    features = DiffusionFeatures(generator(), (0,), (50,))
    with pytest.raises(ValueError, match=r"at least 2 images with labelled pixels, .* but of 1 there is 1"):
        probe_features(features, [image], [mask], 3)


def test_too_few_pixels_are_not_called_too_few_images():
    images, masks = zip(scene(0), scene(1), strict=True)
    with pytest.raises(ValueError, match=r"there are images of 3 classes: look at 3 or more pixels per image, not 1"):
        probe_features(DiffusionFeatures(generator(), (0,), (50,)), images, masks, 3, pixels=1)


def test_an_image_that_does_not_fit_is_named():
    images, masks = zip(scene(0), scene(1), strict=True)
    features = DiffusionFeatures(generator(), (0,), (50,))
    with pytest.raises(ValueError, match=r"the mask of b\.png has 29 x 45 pixels"):
        probe_features(features, images, [masks[0], masks[1][1:]], 3, names=["a.png", "b.png"])
