"""A detector is put together from parts, and a user's own fit in."""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import save_image

from diffperception.data import CocoDetection
from diffperception.detection import (
    FCOS,
    BoxSampler,
    Detector,
    DiffusionDet,
    DynamicHead,
    HeadOutput,
    SetCriterion,
    Term,
)
from diffperception.detection.criterion import Matches
from diffperception.detection.inference import detect_folder, draw_predictions, draw_trajectory, evaluate_detector
from diffperception.detection.sampler import to_image_pixels
from diffperception.detection.sweep import sweep_sampler
from diffperception.detection.targets import PaddedTargets
from diffperception.files import OutputFolder
from diffperception.models import FPN, Backbone, FeatureInfo, build_backbone
from diffperception.models.ops.pooling import FeaturePyramid
from diffperception.training.recipes.detection import DataOptions, DetectionRecipe
from diffperception.visualization.panels import PANEL_SIDE
from tests.detection.scenes import CLASSES, random_image, random_target, tiny_detector

IMAGES = [random_image(64, 96, 1), random_image(70, 50, 2)]
TARGETS = [random_target(n, *image.shape[1:], seed=n) for n, image in zip([3, 4], IMAGES, strict=True)]
SMALL = partial(DynamicHead, width=32, dynamic_width=8, ffn_width=32, num_heads=4, stages=2)


class ConvPyramid(Backbone):
    """A pyramid of one width, as backbones with a neck of their own have."""

    is_pyramid = True

    def __init__(self, width: int = 32):
        super().__init__()
        self.info = [FeatureInfo(f"stride {stride}", width, stride) for stride in (4, 8, 16)]
        self.convolutions = nn.ModuleList(nn.Conv2d(3, width, stride, stride) for stride in (4, 8, 16))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [convolution(images) for convolution in self.convolutions]


@dataclass
class MaskedOutput(HeadOutput):
    """Besides, a mask of 4 x 4 cells of each box, and how sure it is: (S, B, N, 4, 4) and (S, B, N)."""

    masks: Tensor
    quality: Tensor


class MaskHead(DynamicHead):
    """Boxes by a DynamicHead; masks and their quality from what lies in the boxes."""

    gives_masks = True

    def __init__(self, num_classes: int, width: int = 32):
        super().__init__(num_classes, 2, width, dynamic_width=8, ffn_width=32, num_heads=4)
        self.mask = nn.Linear(width, 1)

    def forward(self, pyramid: FeaturePyramid, boxes: Tensor, t: Tensor, last_only: bool = False) -> MaskedOutput:
        output = super().forward(pyramid, boxes, t, last_only)
        masks = torch.stack([self.mask(pyramid.pool(b, 4)).unflatten(2, (4, 4))[..., 0] for b in output.boxes])
        return MaskedOutput(output.logits, output.boxes, masks, masks.mean((3, 4)))

    def finish(self, detections: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
        return detections | {"masks": F.interpolate(detections["masks"][None], (height, width))[0] > 0}


@dataclass
class MaskTerm(Term):
    """How far the masks are from those of the objects, both as the share of cells inside."""

    def __call__(self, output: HeadOutput, targets: PaddedTargets, matches: Matches) -> Tensor:
        assert isinstance(output, MaskedOutput)
        wanted = matches.of(targets.more["masks"].float().mean((2, 3)))
        return matches.per_pair((output.masks.sigmoid().mean((3, 4)) - wanted).abs() * matches.matched)


def masked_detector(**options) -> DiffusionDet:
    torch.manual_seed(0)
    criterion = SetCriterion(terms={"mask": MaskTerm(weight=3.0)})
    sizes = {"strides": (4, 8, 16), "num_boxes": 12, "min_size": None}
    return DiffusionDet(CLASSES, "test_resnet", MaskHead, criterion, **sizes | options).eval()


@pytest.mark.parametrize("head", [SMALL, lambda classes: SMALL(classes), "built"])
def test_a_head_is_made_for_the_classes_or_given(head, tmp_path):
    torch.manual_seed(0)
    detector = DiffusionDet(
        CLASSES, "test_resnet", SMALL(3) if head == "built" else head, strides=(4, 8), min_size=None
    )
    assert (detector.head.width, detector.backbone.width) == (32, 32)
    assert detector.head.stages[0].class_logits.out_features == 3
    detector.save(tmp_path / "model.safetensors")
    loaded = DiffusionDet.load(tmp_path / "model.safetensors")
    found, again = detector.eval().predict(IMAGES), loaded.predict(IMAGES)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(found, again, strict=True) for key in a)


def test_weights_are_drawn_for_the_backbone_then_the_pyramid_then_the_head():
    torch.manual_seed(0)
    body = build_backbone("test_resnet", (4, 8))
    parts = FPN(body, 32), SMALL(3)
    expected = [value for part in parts for value in part.state_dict().values()]
    torch.manual_seed(0)
    detector = DiffusionDet(CLASSES, "test_resnet", SMALL, strides=(4, 8), min_size=None)
    assert all(torch.equal(*pair) for pair in zip(detector.state_dict().values(), expected, strict=True))
    torch.manual_seed(0)
    deeper = DiffusionDet(CLASSES, "test_resnet", partial(SMALL, stages=3), strides=(4, 8), min_size=None)
    pyramids = (model.backbone.state_dict().values() for model in (detector, deeper))
    assert all(torch.equal(*pair) for pair in zip(*pyramids, strict=True))


def test_all_settings_of_the_parts_are_in_the_file(tmp_path):
    sampler = BoxSampler(3, renewal_threshold=None, mode="fixed_time")
    tiny_detector(matcher="hungarian", sampler=sampler).save(tmp_path / "model.safetensors")
    loaded = DiffusionDet.load(tmp_path / "model.safetensors")
    assert loaded.sampler == sampler.changed(num_boxes=20)
    assert loaded.criterion.matcher == "hungarian"
    assert loaded.sampler_with(steps=1) == BoxSampler(1, 20, renewal_threshold=None, mode="fixed_time")


def test_a_pyramid_of_the_heads_width_gets_no_other_on_top(tmp_path):
    detector = DiffusionDet(CLASSES, ConvPyramid(32), SMALL, strides=(4, 8, 16), num_boxes=9, min_size=None).eval()
    assert isinstance(detector.backbone, ConvPyramid)
    other = DiffusionDet(CLASSES, ConvPyramid(16), SMALL, strides=(4, 8, 16), num_boxes=9, min_size=None)
    assert isinstance(other.backbone, FPN)
    detector.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"allow=\('tests',\)"):
        DiffusionDet.load(tmp_path / "model.safetensors")
    loaded = Detector.load(tmp_path / "model.safetensors", allow=("tests",))
    assert torch.equal(loaded.predict(IMAGES)[0]["boxes"], detector.predict(IMAGES)[0]["boxes"])


def test_what_a_head_adds_is_in_the_predictions(tmp_path):
    detector = masked_detector(sampler=BoxSampler(3, renewal_threshold=0.0099))
    found = detector.predict(IMAGES, [1, 2])
    for image, detections in zip(IMAGES, found, strict=True):
        assert detections.keys() == {"boxes", "scores", "labels", "masks", "quality"}
        assert {len(value) for value in detections.values()} == {len(detections["boxes"])} != {0}
        assert detections["masks"].shape[1:] == image.shape[1:]
    alone = detector.predict(IMAGES[1:], [2])[0]
    torch.testing.assert_close(alone["quality"], found[1]["quality"], atol=1e-5, rtol=1e-4)
    encoded = detector.encode(IMAGES[:1])
    plain = detector.sample(encoded, [1], detector.sampler_with())
    (selected,) = detector.sampler.select(plain, encoded.seen, encoded.sizes)
    boxes = to_image_pixels(torch.cat([step.output.boxes[0] for step in plain]), encoded.seen, encoded.sizes)
    quality = torch.cat([step.output.quality[0] for step in plain])
    same_box = (boxes == selected["boxes"][0]).all(1)
    assert (same_box & (quality == selected["quality"][0])).any()  # of one proposal
    detector.save(tmp_path / "model.safetensors")
    loaded = DiffusionDet.load(tmp_path / "model.safetensors", allow=("tests",))
    assert torch.equal(loaded.predict(IMAGES, [1, 2])[0]["quality"], found[0]["quality"])
    assert loaded.criterion.arguments["terms"] == {"mask": MaskTerm(weight=3.0)}


def test_a_term_of_ones_own_learns_from_masks_of_any_size():
    detector = masked_detector().train()
    targets = []
    for image, target in zip(IMAGES, TARGETS, strict=True):
        masks = torch.zeros(len(target["labels"]), *image.shape[1:], dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, target["boxes"].int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append(target | {"masks": masks, "iscrowd": torch.zeros(len(masks))})
    targets[0]["iscrowd"][1] = 1
    losses = detector.loss(IMAGES, targets, torch.Generator().manual_seed(0))
    assert list(losses) == ["classification", "l1", "giou", "mask"]
    losses["mask"].backward()
    assert detector.head.mask.weight.grad.abs().sum() > 0
    padded = PaddedTargets.collate(targets, torch.ones(2, 4))
    assert padded.more["masks"].shape == (2, 4, 70, 96)
    assert torch.equal(padded.more["masks"][0, 1, :64], targets[0]["masks"][2])  # the crowd is gone
    assert padded.more["masks"][1, :, :, 50:].sum() == 0


@pytest.mark.parametrize(
    ("detector", "settings", "words"),
    [
        (tiny_detector(), {"stepps": 3}, "DiffusionDet has no option stepps in prediction"),
        (tiny_detector(), {"steps": 0}, "at least 1"),
        (
            FCOS(CLASSES, "test_resnet", width=64),
            {"steps": 4, "eta": 1.0},
            "FCOS has no option eta, steps",
        ),
    ],
)
def test_an_option_that_a_detector_does_not_know_is_one_sentence(detector, settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        detector.sampler_with(**settings)


def test_a_detector_without_a_sampler_refuses_one():
    with pytest.raises(ValueError, match="FCOS has no sampler"):
        FCOS(CLASSES, "test_resnet", width=64).predict(IMAGES, sampler=BoxSampler())


def test_images_padded_together_are_one_batch():
    detector = tiny_detector()
    batches = []
    detector.backbone.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    apart = detector.predict(IMAGES, [1, 2])
    detector.pad_together = True
    together = detector.predict(IMAGES, [1, 2])
    assert batches == [1, 1, 2]
    for a, b, image in zip(apart, together, IMAGES, strict=True):
        assert b["boxes"].max() <= max(image.shape[1:])
        torch.testing.assert_close(a["scores"][:3], b["scores"][:3], atol=0.02, rtol=0.1)


def test_a_folder_is_predicted_by_one_call(tmp_path: Path):
    detector = tiny_detector(min_size=48)
    detector.save(tmp_path / "model.safetensors")
    for name, image in zip("ab", IMAGES, strict=True):
        save_image(image, tmp_path / f"{name}.png")
    found = detect_folder(tmp_path / "model.safetensors", tmp_path, tmp_path / "out", workers=0, num_trajectories=1)
    assert [image["file_name"] for image in found.images] == ["a.png", "b.png"]
    assert {row["image_id"] for row in found.detections} == {1, 2}
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert {"images.json", "predictions.json", "pictures/a.png", "pictures/b.png", "trajectories/a.png"} <= set(written)
    sampler = detector.sampler_with(steps=2)
    again = detect_folder(detector, tmp_path / "a.png", tmp_path / "other", sampler, workers=0)
    assert again.detections != [row for row in found.detections if row["image_id"] == 1]


@pytest.mark.parametrize(("own", "asked", "columns"), [(1, None, 6), (4, None, 6), (4, 1, 3), (1, 2, 4)])
def test_trajectories_have_the_steps_asked_for(own: int, asked: int | None, columns: int):
    detector = tiny_detector(sampler=BoxSampler(own))
    picture = draw_trajectory(detector, IMAGES[0], 0, detector.sampler_with(steps=asked))
    assert columns * PANEL_SIDE < picture.width < (columns + 1) * PANEL_SIDE


def masked_data(tmp_path: Path) -> CocoDetection:
    save_image(IMAGES[0], tmp_path / "a.png")
    x1, y1, x2, y2 = 10, 20, 60, 50
    square = {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]], "area": 1500}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 96, "height": 64}],
        "categories": [{"id": k, "name": name} for k, name in enumerate(CLASSES)],
        "annotations": [square | {"id": 1, "image_id": 1, "category_id": 0, "iscrowd": 0}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    return CocoDetection(tmp_path / "a.json", tmp_path, masks=True)


def test_masks_of_a_head_are_scored_where_the_data_set_has_some(tmp_path: Path):
    detector, masked = masked_detector(), masked_data(tmp_path)
    plain = evaluate_detector(detector, CocoDetection(tmp_path / "a.json", tmp_path))
    assert not any("mask" in name for name in plain.metrics)
    both = evaluate_detector(detector, masked)
    assert {"AP", "AR100", "mask_AP", "mask_AR100"} < both.metrics.keys()
    assert both.detections[0]["segmentation"]["size"] == [64, 96]
    assert [row["bbox"] for row in both.detections] == [row["bbox"] for row in plain.detections]
    detect_folder(detector, tmp_path / "a.png", tmp_path / "out", workers=0)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert rows[0]["segmentation"]["size"] == [64, 96]


def test_pictures_show_what_the_precision_gives(tmp_path: Path):
    detector, dataset, used = tiny_detector(), masked_data(tmp_path), set()
    detector.head.time_embedding[0].register_forward_hook(lambda *call: used.add(call[2].dtype))
    detect_folder(detector, tmp_path / "a.png", tmp_path / "out", workers=0, precision="bf16")
    draw_predictions(detector, dataset, OutputFolder(tmp_path / "score"), 1, precision="bf16")
    assert used == {torch.bfloat16}


def test_trajectories_beside_a_score_are_those_of_the_sampler_that_it_used(tmp_path: Path):
    detector, folder = tiny_detector(sampler=BoxSampler(4)), OutputFolder(tmp_path / "score")
    draw_predictions(detector, masked_data(tmp_path), folder, 1, sampler=detector.sampler_with(steps=1))
    with Image.open(tmp_path / "score" / "pictures" / "a_noise_to_boxes.png") as picture:
        assert 3 * PANEL_SIDE < picture.width < 4 * PANEL_SIDE  # the noise, the boxes, the detections


def test_masks_that_no_one_gives_or_scores_are_refused_before_the_work(tmp_path: Path):
    dataset = masked_data(tmp_path)
    with pytest.raises(ValueError, match="this DiffusionDet gives no masks"):
        evaluate_detector(tiny_detector(), dataset)
    with pytest.raises(ValueError, match="a sweep scores boxes alone"):
        sweep_sampler(masked_detector(), dataset, [BoxSampler(1), BoxSampler(2)], [0])
    recipe = DetectionRecipe(lambda _: tiny_detector(), DataOptions(*[tmp_path / "a.json", tmp_path] * 2, masks=True))
    with pytest.raises(ValueError, match="this DiffusionDet gives no masks"):
        recipe.prepare(0)
