"""Checkpoints of the reference in every size: what is inferred, what is refused, and what backbones compute."""

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from diffperception.detection import DiffusionDet
from diffperception.detection.head import DynamicHead
from diffperception.detection.reference import constructor_arguments, rename
from diffperception.diffusion import cosine_schedule
from diffperception.models import FPN, TimmBackbone
from tests.parity import distance, fill_state, shapes
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
from tests.parity.naive import pyramid, resnet_maps, swin_maps

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
        head = DynamicHead(
            len(arguments["classes"]),
            arguments["stages"],
            arguments["width"],
            arguments["pool_size"],
            dynamic_width=arguments["dynamic_width"],
            ffn_width=arguments["ffn_width"],
            box_layers=arguments["box_layers"],
        )
        return nn.ModuleDict({"backbone": FPN(backbone, arguments["width"]), "head": head})


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
    assert arguments | expected == arguments
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


def test_long_lists_are_counted(state, r50):
    fewer = {name: value for name, value in state.items() if ".res3." not in name}
    with pytest.raises(ValueError, match=r"65 names are missing: (backbone\S+, ){7}backbone\S+ and 57 more\.$"):
        rename(fewer, r50)


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
    ],
)
def test_other_constants_than_ours_are_told(state, r50, name, values, meaning):
    with pytest.warns(UserWarning, match=f"{name} .*{meaning}"):
        rename(state | {name: values}, r50)


def check_pyramid(state: dict[str, Tensor], images: Tensor, expected: list[Tensor]) -> None:
    detector = DiffusionDet.from_reference(state)
    with torch.no_grad():
        for ours, theirs in zip(detector.backbone(images), expected, strict=True):
            assert distance(ours, theirs) < 1e-4


def test_resnet101_computes_what_the_reference_does():
    state = fill_state(resnet_shapes(RESNET101, width=32) | head_shapes(classes=3, **SMALL_HEAD))
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    check_pyramid(state, images, pyramid(state, resnet_maps(state, images)))


def test_swin_computes_what_the_original_does():
    state = fill_state(swin_shapes(**SWIN_TINY, width=32) | head_shapes(classes=3, **SMALL_HEAD))
    images = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    # Maps of 24x40, 12x20, 6x10 and 3x5: windows of 7 need padding at each, and reach over the last two.
    check_pyramid(state, images, pyramid(state, swin_maps(state, images, window=7)))
