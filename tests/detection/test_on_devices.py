"""Detection on every device: the same results, no mix of devices, and few waits for a GPU."""

from functools import partial

import pytest
import torch

from diffperception.detection import BoxSampler, DenseHead, DiffusionDet, DynamicHead, DynamicMaskHead
from tests.detection.scenes import assert_same_detections, random_image, random_target, tiny_detector
from tests.helpers.devices import Device
from tests.helpers.simulated_gpu import SimulatedGPU

IMAGES = [random_image(64, 96, 1), random_image(70, 50, 2), random_image(64, 96, 3), random_image(40, 88, 4)]
TARGETS = [random_target(n, *image.shape[1:], seed=n) for n, image in zip([3, 0, 9, 5], IMAGES, strict=True)]


def masked_detector(training: bool) -> DiffusionDet:
    torch.manual_seed(0)
    boxes = partial(DynamicHead, width=32, dynamic_width=8, ffn_width=32, num_heads=4, stages=2)
    head = partial(DynamicMaskHead, boxes=boxes, mask_size=8)
    options = {"strides": (4, 8, 16), "num_boxes": 20, "min_size": 56}
    return DiffusionDet(["a", "b", "c"], "test_resnet", head, **options).train(training)


def few_waits(device: Device, most: int) -> None:
    if isinstance(device, SimulatedGPU):
        assert len(device.waits) <= most, device.report()


def losses(detector: DiffusionDet, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return detector.loss(images, TARGETS, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"matcher": "hungarian"},
        {"federated_classes": 2},
        {"auxiliary": DenseHead},
        {"auxiliary": DenseHead, "proposal_share": 0.5},
    ],
)
def test_a_training_loss_waits_four_times_at_most(device: Device, options: dict) -> None:
    detector = tiny_detector(stages=6, **options).train()
    expected = losses(detector, IMAGES)
    torch.stack(list(expected.values())).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in detector.named_parameters()}
    moved, images = device.move(tiny_detector(stages=6, **options).train()), device.move(IMAGES)
    computed = losses(moved, images)
    few_waits(device, 4)
    torch.stack(list(computed.values())).sum().backward()
    few_waits(device, 4)
    for name, value in device.host(computed).items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4)
    for name, parameter in moved.named_parameters():
        torch.testing.assert_close(device.host(parameter.grad), gradients[name], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("sampler", [BoxSampler(1), BoxSampler(4), BoxSampler(4, nms_threshold=None)])
def test_predicting_waits_eight_times_at_most(device: Device, sampler: BoxSampler, together: bool) -> None:
    detector = tiny_detector(min_size=56)
    detector.pad_together = together
    expected = detector.predict(IMAGES, [1, 2, 3, 4], sampler)
    moved, images = device.move(detector), device.move(IMAGES)
    computed = moved.predict(images, [1, 2, 3, 4], sampler)
    few_waits(device, 8)
    assert_same_detections(device.host(computed), expected)


@pytest.mark.parametrize("training", [True, False])
def test_masks_wait_no_oftener(device: Device, training: bool) -> None:
    """Than boxes, which the tests above count."""
    detector, moved = masked_detector(training), device.move(masked_detector(training))
    images, sampler = device.move(IMAGES[:2]), BoxSampler(2)
    if not training:
        found, expected = moved.predict(images, [1, 2], sampler), detector.predict(IMAGES[:2], [1, 2], sampler)
        few_waits(device, 8)
        for one, other in zip(device.host(found), expected, strict=True):
            assert (one["masks"] != other["masks"]).float().mean() < 1e-3
        return
    masked = [
        target | {"masks": torch.ones(len(target["labels"]), *image.shape[1:], dtype=torch.uint8)}
        for target, image in zip(TARGETS[:2], IMAGES[:2], strict=True)
    ]
    learned = [(detector, IMAGES[:2]), (moved, images)]
    expected, computed = (d.loss(i, masked, torch.Generator().manual_seed(0))["mask"] for d, i in learned)
    computed.backward()
    few_waits(device, 4)
    torch.testing.assert_close(device.host(computed), expected, atol=1e-4, rtol=1e-4)
