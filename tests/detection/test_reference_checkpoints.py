"""Checkpoints of the reference in every size: what is inferred, what is refused, and what networks compute."""

import re

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torchvision.ops import box_iou

from diffperception.detection import BoxSampler, DiffusionDet
from diffperception.detection.heads.boxes import DynamicHead
from diffperception.detection.matcher import match
from diffperception.detection.targets import PaddedTargets, image_sizes
from diffperception.diffusion import cosine_schedule
from diffperception.models import FPN, TimmBackbone
from diffperception.models.convert.diffusiondet import constructor_arguments, rename
from tests.detection.sampling import check_sampling, middle_score
from tests.detection.scenes import random_boxes, random_image
from tests.parity import distance, fill_state, naive, shapes
from tests.parity.diffusiondet import (
    RESNET50,
    RESNET101,
    SMALL_HEAD,
    SWIN_BASE,
    SWIN_SMALL,
    SWIN_TINY,
    head_shapes,
    resnet_shapes,
    swin_shapes,
)

BACKBONES = {
    "resnet50": resnet_shapes(RESNET50),
    "resnet101": resnet_shapes(RESNET101),
    "swin_tiny_patch4_window7_224": swin_shapes(**SWIN_TINY),
    "swin_small_patch4_window7_224": swin_shapes(**SWIN_SMALL),
    "swin_base_patch4_window7_224": swin_shapes(**SWIN_BASE),
    "swin_base_patch4_window12_384": swin_shapes(**SWIN_BASE, window=12),
}
LOGITS = "head.head_series.3.class_logits.bias"


def without_values(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def networks(arguments: dict) -> nn.Module:
    """What has weights in the DiffusionDet of these arguments, without their values."""
    with torch.device("meta"):
        backbone = TimmBackbone(arguments["backbone"], (4, 8, 16, 32), freeze_norm=arguments["freeze_norm"])
        head = DynamicHead(len(arguments["classes"]), **arguments["head"])
        return nn.ModuleDict({"backbone": FPN(backbone, head.width), "head": head})


@pytest.fixture(scope="module")
def r50() -> nn.Module:
    return networks(constructor_arguments(without_values(shapes("diffusiondet_r50"))))


@pytest.fixture
def state() -> dict[str, Tensor]:
    return without_values(shapes("diffusiondet_r50"))


def test_our_list_of_shapes_is_the_references():
    assert BACKBONES["resnet50"] | head_shapes() == shapes("diffusiondet_r50")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_is_recognised_and_every_weight_has_a_place(backbone):
    state = without_values(BACKBONES[backbone] | head_shapes())
    arguments = constructor_arguments(state)
    assert arguments["backbone"] == backbone
    weights = rename(state, networks(arguments))
    assert {id(value) for value in weights.values()} == {id(value) for value in state.values()}


@pytest.mark.parametrize("classes", [1, 3, 4, 80, 1203])
def test_any_number_of_classes(classes):
    state = without_values(BACKBONES["resnet50"] | head_shapes(classes))
    arguments = constructor_arguments(state)
    assert len(arguments["classes"]) == classes
    assert rename(state, networks(arguments))["head.stages.5.class_logits.bias"].shape == (classes,)


def test_stages_and_widths_follow_from_the_shapes():
    head = head_shapes(classes=7, stages=3, width=64, pool=5, dynamic=8, ffn=96)
    state = without_values(resnet_shapes(RESNET50, width=64) | head)
    for name in [name for name in state if ".reg_module.6" in name or ".reg_module.7" in name]:
        del state[name]
    arguments = constructor_arguments(state)
    expected = {"stages": 3, "width": 64, "pool_size": 5, "dynamic_width": 8, "ffn_width": 96, "box_layers": 2}
    assert arguments["head"] == expected
    rename(state, networks(arguments))


def test_80_classes_have_cocos_names_and_others_are_numbered_or_given():
    coco = constructor_arguments(without_values(shapes("diffusiondet_r50")))["classes"]
    assert (coco[0], coco[11], coco[79], len(set(coco))) == ("person", "stop sign", "toothbrush", 80)
    state = without_values(BACKBONES["resnet50"] | head_shapes(3))
    assert constructor_arguments(state)["classes"] == ["0", "1", "2"]
    assert constructor_arguments(state, ["a", "b", "c"])["classes"] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="2 class names are given for a checkpoint with 3"):
        constructor_arguments(state, ["a", "b"])


def test_missing_names_are_told(state, r50):
    del state[LOGITS]
    with pytest.raises(ValueError, match=rf"1 name is missing: {LOGITS}\.$"):
        rename(state, r50)


def test_names_left_over_are_told(state, r50):
    state["backbone.bottom_up.fc.weight"] = torch.empty(3)
    with pytest.raises(ValueError, match=r"1 name is left over: backbone\.bottom_up\.fc\.weight\.$"):
        rename(state, r50)


def test_other_shapes_are_told(state, r50):
    state[LOGITS] = torch.empty(81)
    assert len(constructor_arguments(state)["classes"]) == 80
    with pytest.raises(ValueError, match=rf"1 name is of another shape: {LOGITS} \(81,\) instead of \(80,\)\.$"):
        rename(state, r50)


# One wrong name must not change what is inferred: all others would seem wrong then.
@pytest.mark.parametrize(
    "name",
    [
        "head.head_series.6.class_logits.bias",
        "head.head_series.0.reg_module.9.weight",
        "backbone.bottom_up.res4.6.conv1.weight",
        "backbone.bottom_up.res6.0.conv1.weight",
    ],
)
def test_a_name_too_many_is_told_alone(state, name):
    state[name] = torch.empty(7, device="meta")
    with pytest.raises(ValueError, match=rf"tell\. 1 name is left over: {re.escape(name)}\.$"):
        rename(state, networks(constructor_arguments(state)))


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.res4\.5\..*",  # the last block of a stage
        r".*\.res3\..*",
        r"head\.head_series\.2\..*",
        r"head\.head_series\..\.class_logits\..*",
        r"head\.head_series\..\.reg_module\..*",
        r"head\.head_series\..\.inst_interact\.out_layer\.weight",
        r"head\.head_series\.5\.linear1\.bias",
    ],
)
def test_missing_names_are_counted_and_no_other_is_told(state, pattern):
    missing = {name for name in state if re.fullmatch(pattern, name)}
    fewer = {name: value for name, value in state.items() if name not in missing}
    with pytest.raises(ValueError, match="missing") as caught:
        rename(fewer, networks(constructor_arguments(fewer)))
    count, names = re.search(r"tell\. (\d+) names? (?:is|are) missing: (.*)\.$", str(caught.value)).groups()
    named, _, more = names.partition(", and ")
    assert set(named.split(", ")) <= missing
    assert named.count(", ") + 1 + int(more.removesuffix(" more") or 0) == int(count) == len(missing) > 0


def test_swins_blocks_are_told_too():
    state = without_values(BACKBONES["swin_base_patch4_window12_384"] | head_shapes())
    missing = "backbone.bottom_up.layers.2.blocks.17."
    fewer = {name: value for name, value in state.items() if not name.startswith(missing)}
    with pytest.raises(ValueError, match=rf"13 names are missing: ({re.escape(missing)}\S+, ){{6}}and 7 more"):
        rename(fewer, networks(constructor_arguments(fewer)))


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda state: {"model": state}, "no tensors under model$"),
        (lambda state: {f"module.{name}": value for name, value in state.items()}, "begin with 'module.'"),
        (lambda state: state | {"epoch": 3, LOGITS: [0.0]}, f"no tensors under {LOGITS}, epoch"),
    ],
)
def test_weights_in_a_wrapping_are_told(state, wrap, words):
    with pytest.raises(ValueError, match=words):
        constructor_arguments(wrap(state))


def test_all_complaints_come_at_once():
    state = fill_state(resnet_shapes(RESNET50, width=32) | head_shapes(classes=3, **SMALL_HEAD))
    state["extra"] = state.pop("head.time_mlp.1.bias")
    state["head.time_mlp.3.bias"] = torch.zeros(7)
    with pytest.raises(
        ValueError, match=r"missing: head\.time_mlp\.1\.bias\. .*left over: extra\. .*shape: head\.time"
    ):
        DiffusionDet.from_reference(state)


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="no checkpoint of the reference DiffusionDet"):
        DiffusionDet.from_reference({"fc.weight": torch.zeros(3, 3)})


def test_unknown_backbones_are_refused_by_their_sizes():
    state = without_values(resnet_shapes((3, 8, 36, 3)) | head_shapes())
    with pytest.raises(ValueError, match=r"blocks 3, 8, 36, 3; known are .*3, 4, 23, 3 \(resnet101\)"):
        constructor_arguments(state)
    state = without_values(swin_shapes(192, (2, 2, 18, 2), (6, 12, 24, 48)) | head_shapes())
    with pytest.raises(ValueError, match="192, 7, 2, 2, 18, 2"):
        constructor_arguments(state)
    with pytest.raises(ValueError, match="neither a ResNet"):
        constructor_arguments(without_values(head_shapes()))


def test_constants_that_are_no_weights_are_dropped(state, r50):
    table = cosine_schedule(1000).alpha(torch.arange(1000)).square().float()
    constants = {"alphas_cumprod": table, "betas": torch.zeros(1000), "posterior_mean_coef1": torch.zeros(1000)}
    constants["pixel_mean"] = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    constants["criterion.fed_loss_cls_weights"] = torch.zeros(80)
    constants["backbone.bottom_up.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    assert rename(state | constants, r50).keys() == r50.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "values", "meaning"),
    [
        ("alphas_cumprod", torch.linspace(1, 0, 1000), "noise schedule"),
        ("pixel_mean", torch.tensor([103.53, 116.28, 123.675]), "image normalisation"),
        ("pixel_std", torch.ones(4), "image normalisation"),
    ],
)
def test_other_constants_than_ours_are_told(state, r50, name, values, meaning):
    with pytest.warns(UserWarning, match=f"{name} .*{meaning}"):
        rename(state | {name: values}, r50)


def check_network(state: dict[str, Tensor], images: list[Tensor], window: int | None = None) -> None:
    """The pyramid, and every stage's logits and boxes; images of different sizes are padded together."""
    detector = DiffusionDet.from_reference(state)
    batch = naive.prepare(images)
    body = naive.resnet_maps(state, batch) if window is None else naive.swin_maps(state, batch, window)
    maps = naive.pyramid(state, body)
    boxes = torch.stack([random_boxes(12, *image.shape[:0:-1], seed=7) for image in images])
    t = torch.arange(len(images)) * 300 + 99
    with torch.no_grad():
        output = detector(images, boxes, t)
        computed = [detector.backbone(batch), output.logits, output.boxes]
    for ours, theirs in zip(computed, [maps, *naive.head(state, maps, boxes, t)], strict=True):
        assert max(distance(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_resnet101_computes_what_the_reference_does():
    state = fill_state(resnet_shapes(RESNET101, width=32) | head_shapes(classes=3, **SMALL_HEAD))
    check_network(state, [random_image(64, 96), random_image(90, 50)])


@pytest.mark.parametrize(("layout", "window"), [(SWIN_TINY, 7), (SWIN_BASE, 7), (SWIN_BASE, 12)])
def test_swin_computes_what_the_original_does(layout, window):
    state = fill_state(swin_shapes(**layout, window=window, width=32) | head_shapes(classes=3, **SMALL_HEAD))
    # Maps of 24x40, 12x20, 6x10 and 3x5: windows of 7 and 12 need padding at most, and reach over the last two.
    check_network(state, [random_image(96, 160), random_image(70, 50)], window)


@pytest.fixture(scope="module")
def lvis() -> tuple[dict[str, Tensor], DiffusionDet]:
    """A small head with LVIS's number of classes; the detector does not resize."""
    state = fill_state(resnet_shapes(RESNET50, width=32) | head_shapes(classes=1203, **SMALL_HEAD))
    detector = DiffusionDet.from_reference(state)
    detector.min_size = None
    return state, detector


def test_1203_classes_compute_what_the_reference_does(lvis):
    check_network(lvis[0], [random_image(64, 96), random_image(90, 50)])


def test_1203_classes_match_what_the_reference_does(lvis):
    images = [random_image(96, 128, seed) for seed in range(2)]
    objects = torch.stack([random_boxes(6, 128, 96, seed) for seed in range(2)])
    labels = torch.randint(1203, (2, 6), generator=torch.Generator().manual_seed(0))
    boxes = torch.stack([random_boxes(60, 128, 96, seed + 10) for seed in range(2)])
    with torch.no_grad():
        output = lvis[1](images, boxes, torch.tensor([5, 5]))
    logits, refined, sizes = output.logits[-1], output.boxes[-1], image_sizes(images)
    targets = [{"boxes": b, "labels": label} for b, label in zip(objects, labels, strict=True)]
    matches = match(logits, refined, PaddedTargets.collate(targets, sizes))
    for i in range(2):
        cost = naive.matching_cost(logits[i], refined[i], objects[i], labels[i], sizes[i])
        assert matches[i].tolist() == naive.dynamic_k(cost, box_iou(refined[i], objects[i]))


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 1},
        {"steps": 2, "eta": 0.0},
        {"steps": 2, "renewal_threshold": None, "eta": 0.5},
        {"steps": 4, "nms_threshold": 0.2},
        {"steps": 4, "ensemble": False},
        {"steps": 3, "nms_threshold": None},
    ],
)
def test_1203_classes_are_sampled_as_the_reference_does(lvis, changes):
    images = [random_image(96, 128, 1), random_image(64, 80, 2)]
    renewal = middle_score(lvis[1], images[0], count=12)
    check_sampling(lvis[1], images, BoxSampler(**{"num_boxes": 12, "renewal_threshold": renewal} | changes))
