"""torchvision's Faster and Mask R-CNN behind our interface."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import mask_rcnn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image

from diffperception.detection import FCOS, Detector, FasterRCNN, MaskRCNN
from diffperception.detection.baseline import TorchvisionDetector
from tests.detection.scenes import CLASSES, assert_same_detections, random_image, random_target

IMAGES = [random_image(64, 96, 1), random_image(70, 50, 2)]
BUILDS = [FasterRCNN, MaskRCNN]


def build(kind: type[FasterRCNN], **options) -> FasterRCNN:
    torch.manual_seed(0)
    small = {"strides": (4, 8, 16), "width": 16, "head_width": 16, "proposals": 40, "max_detections": 20}
    return kind(CLASSES, "test_resnet", **small | {"min_size": None} | options).eval()


def masked_target(count: int, image: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Objects whose masks fill their boxes."""
    height, width = image.shape[1:]
    target = random_target(count, height, width, seed)
    x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    x1, y1, x2, y2 = target["boxes"].T[..., None, None]
    return target | {"masks": (x > x1) & (x < x2) & (y > y1) & (y < y2)}


@pytest.mark.parametrize("kind", BUILDS)
def test_it_learns_from_images_with_and_without_objects(kind: type[FasterRCNN]):
    detector = build(kind)
    targets = [masked_target(3, IMAGES[0]), masked_target(0, IMAGES[1])]
    targets[0]["boxes"][1, 2] = targets[0]["boxes"][1, 0]  # no area
    before = [parameter.clone() for parameter in detector.parameters()]
    losses = detector.loss(IMAGES, targets)
    assert not detector.model.training
    named = {"classifier", "box_reg", "objectness", "rpn_box_reg"} | ({"mask"} if kind is MaskRCNN else set())
    assert losses.keys() == named
    sum(losses.values()).backward()
    grads = {name: parameter.grad for name, parameter in detector.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert all(map(torch.equal, before, detector.parameters()))
    assert torch.isfinite(sum(detector.loss(IMAGES, [masked_target(0, image) for image in IMAGES]).values()))


def test_labels_are_ours_in_the_loss_and_in_predictions():
    detector = build(FasterRCNN)
    predictor = detector.model.roi_heads.box_predictor
    torch.nn.init.zeros_(predictor.cls_score.weight)
    predictor.cls_score.bias.data = torch.tensor([0.0, 0.0, 0.0, 2.0])  # the background, then ours
    assert detector.predict(IMAGES[:1])[0]["labels"][0] == 2
    losses = []
    for label in range(3):
        torch.manual_seed(0)
        target = random_target(3, *IMAGES[0].shape[1:])
        losses.append(detector.loss(IMAGES[:1], [target | {"labels": torch.full((3,), label)}])["classifier"])
    assert losses[0] == losses[1] > losses[2]


@pytest.mark.parametrize("kind", BUILDS)
def test_batches_are_predicted_as_single_images_at_the_size_asked_for(kind: type[FasterRCNN]):
    detector = build(kind, min_size=48)
    found, single = detector.predict(IMAGES), [detector.predict([image])[0] for image in IMAGES]
    assert_same_detections(found, single)
    for one, image in zip(found, IMAGES, strict=True):
        height, width = image.shape[1:]
        assert len(one["boxes"])
        assert (one["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert ("masks" in one) == detector.gives_masks
        if detector.gives_masks:
            assert one["masks"].shape == (len(one["boxes"]), height, width)
    assert detector.predict([]) == []


def test_it_finds_what_torchvision_finds():
    detector = build(MaskRCNN)
    body, rpn, heads = detector.model.backbone, detector.model.rpn, detector.model.roi_heads
    reference = mask_rcnn.MaskRCNN(
        body,
        rpn_anchor_generator=rpn.anchor_generator,
        **{name: getattr(heads, name) for name in ("box_roi_pool", "box_head", "box_predictor")},
        **{name: getattr(heads, name) for name in ("mask_roi_pool", "mask_head", "mask_predictor")},
        rpn_pre_nms_top_n_test=40,
        rpn_post_nms_top_n_test=40,
        box_detections_per_img=20,
        min_size=48,
        max_size=1000,
    )
    reference.rpn.head = rpn.head
    image = random_image(48, 64)
    with torch.no_grad():
        (expected,) = reference.eval()([image])
    (found,) = detector.predict([image])
    assert torch.equal(found["labels"], expected["labels"] - 1)
    torch.testing.assert_close(found["boxes"], expected["boxes"])
    torch.testing.assert_close(found["masks"], expected["masks"][:, 0])


def test_masks_lie_in_the_original_image_around_their_boxes():
    detector = build(MaskRCNN, min_size=128)
    detector.model.roi_heads.mask_predictor = AllInside()
    (found,) = detector.predict(IMAGES[:1])
    whole = paste_masks_in_image(torch.ones(len(found["boxes"]), 1, 28, 28), found["boxes"], (64, 96))[:, 0]
    assert torch.equal(found["masks"], whole)
    assert 0 < whole.mean() < 1


class AllInside(torch.nn.Module):
    """Says of every bin and class that it is inside."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_full((len(x), 1 + len(CLASSES), 28, 28), 1e4)


@pytest.mark.parametrize("kind", BUILDS)
def test_a_saved_one_predicts_the_same(kind: type[FasterRCNN], tmp_path):
    detector = build(kind)
    detector.save(tmp_path / "model.safetensors")
    loaded = Detector.load(tmp_path / "model.safetensors")
    assert type(loaded) is kind
    pairs = zip(loaded.predict(IMAGES), detector.predict(IMAGES), strict=True)
    assert all(torch.equal(a[name], b[name]) for a, b in pairs for name in b)


@pytest.mark.parametrize("kind", [FasterRCNN, FCOS])
def test_anchors_are_exact_under_autocast(kind: type[TorchvisionDetector]):
    model = build(FasterRCNN).model.rpn if kind is FasterRCNN else FCOS(CLASSES, "test_resnet", width=64).model
    anchors = model.anchor_generator
    images = ImageList(torch.zeros(1, 3, 64, 1024), [(64, 1024)])
    maps = [torch.zeros(1, 16, 64 // 2**level, 1024 // 2**level) for level in range(2, 2 + len(anchors.sizes))]
    exact = anchors(images, maps)[0]
    assert torch.equal(anchors(images, [m.bfloat16() for m in maps])[0], exact)
    assert anchors(images, [m.double() for m in maps])[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build(FasterRCNN, strides=(4, 16)), r"strides \[4, 16\] are no pyramid's"),
        (lambda: build(MaskRCNN).loss(IMAGES[:1], [random_target(1, 64, 96)]), "MaskRCNN need masks: set data.masks"),
        (partial(build(MaskRCNN).predict, IMAGES, sampler=object()), "MaskRCNN has no sampler"),
    ],
)
def test_what_cannot_be_is_one_sentence(call, words: str):
    with pytest.raises(ValueError, match=words):
        call()
