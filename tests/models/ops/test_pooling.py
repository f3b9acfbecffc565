import pytest
import torch
from torchvision.ops import roi_align

from diffperception.models.ops.pooling import FeaturePyramid
from tests.detection.scenes import random_boxes
from tests.helpers.devices import Device

STRIDES = [4, 8, 16, 32]


def random_maps(batch: int, height: int, width: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 5, height // s, width // s) for s in STRIDES]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def boxes_of_all_sizes(batch: int) -> torch.Tensor:
    inside = torch.stack([random_boxes(40, 640, 512, seed) for seed in range(batch)])
    beyond = torch.tensor([[-300.0, -200.0, 900.0, 800.0], [-90.0, 500.0, -60.0, 530.0], [639.0, 511.0, 640.0, 512.0]])
    return torch.cat([inside, inside / 20, beyond.expand(batch, -1, -1)], 1)


def torchvision_pool(maps, boxes, level, size, samples=2):
    pooled = torch.zeros(*boxes.shape[:2], maps[0].shape[1], size, size, dtype=maps[0].dtype)
    for index, stride in enumerate(STRIDES):
        image, row = (level == index).nonzero(as_tuple=True)
        rois = torch.cat([image[:, None], boxes[image, row]], 1).to(maps[0].dtype)
        pooled[image, row] = roi_align(maps[index], rois, size, 1 / stride, sampling_ratio=samples, aligned=True)
    return pooled.flatten(3).transpose(2, 3)


@pytest.mark.parametrize(("size", "samples"), [(1, 2), (7, 2), (5, 1)])
def test_pooling_equals_torchvision_also_beyond_the_border(size, samples):
    maps, boxes = random_maps(2, 512, 640), boxes_of_all_sizes(2)
    pyramid = FeaturePyramid.from_maps([maps], STRIDES)
    expected = torchvision_pool(maps, boxes, pyramid.assign_levels(boxes), size, samples)
    torch.testing.assert_close(pyramid.pool(boxes, size, samples), expected, atol=1e-4, rtol=1e-4)


def test_gradients_equal_torchvision():
    ours, theirs = ([m.requires_grad_() for m in random_maps(2, 128, 160)] for _ in range(2))
    boxes = torch.stack([random_boxes(30, 160, 128, seed) for seed in range(2)])
    pyramid = FeaturePyramid.from_maps([ours], STRIDES)
    pooled = pyramid.pool(boxes, 3)
    direction = torch.randn_like(pooled)
    (pooled * direction).sum().backward()
    (torchvision_pool(theirs, boxes, pyramid.assign_levels(boxes), 3) * direction).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad if b.grad is not None else torch.zeros_like(a), atol=1e-4, rtol=1e-4)


def test_levels_double_with_the_size_of_the_box():
    pyramid = FeaturePyramid.from_maps([random_maps(1, 64, 64)], STRIDES)
    sides = torch.tensor([1.0, 111.0, 113.0, 223.0, 225.0, 449.0, 9000.0])
    boxes = torch.stack([torch.zeros(7), torch.zeros(7), sides, sides], 1)
    assert pyramid.assign_levels(boxes).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_joined_pyramids_pool_each_image_from_its_own_maps():
    wide, tall = random_maps(2, 64, 96, seed=1), random_maps(1, 128, 32, seed=2)
    boxes = torch.stack([random_boxes(9, 32, 64, seed) for seed in range(3)])
    alone = [FeaturePyramid.from_maps([[m[i : i + 1] for m in wide]], STRIDES) for i in range(2)]
    alone.insert(1, FeaturePyramid.from_maps([tall], STRIDES))
    joined = FeaturePyramid.from_maps([wide, tall], STRIDES, order=[0, 2, 1])
    expected = torch.cat([p.pool(boxes[i : i + 1], 3) for i, p in enumerate(alone)])
    assert torch.equal(joined.pool(boxes, 3), expected)


def test_half_precision_stays_close():
    maps, boxes = [m.float() for m in random_maps(2, 64, 96)], boxes_of_all_sizes(2) / 8
    exact = FeaturePyramid.from_maps([maps], STRIDES).pool(boxes, 3)
    rounded = FeaturePyramid.from_maps([[m.bfloat16() for m in maps]], STRIDES).pool(boxes, 3)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)


class Pooling(torch.nn.Module):
    def forward(self, fine: torch.Tensor, coarse: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        return FeaturePyramid.from_maps([[fine, coarse]], [4, 8]).pool(boxes, 3)


def test_an_exported_pooling_is_the_same_without_bags_for_any_number_of_boxes():
    maps = [m.float() for m in random_maps(1, 64, 96)[:2]]
    boxes = torch.export.Dim("boxes", min=2, max=500)
    arguments = (*maps, random_boxes(9, 96, 64, 0)[None])
    program = torch.export.export(Pooling(), arguments, dynamic_shapes=(None, None, {1: boxes}))
    assert "embedding_bag" not in str(program.graph)
    more = random_boxes(31, 96, 64, 1)[None]
    torch.testing.assert_close(program.module()(*maps, more), Pooling()(*maps, more), atol=1e-5, rtol=1e-5)


def test_every_device_pools_the_same(device: Device):
    maps, boxes = [m.float() for m in random_maps(2, 64, 96)], boxes_of_all_sizes(2) / 8
    expected = FeaturePyramid.from_maps([maps], STRIDES).pool(boxes, 3)
    maps, boxes = device.move((maps, boxes))
    pooled = FeaturePyramid.from_maps([maps], STRIDES).pool(boxes, 3)
    assert not device.waits, device.report()
    torch.testing.assert_close(device.host(pooled), expected, atol=1e-5, rtol=1e-5)
