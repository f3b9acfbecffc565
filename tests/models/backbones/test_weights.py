"""Weights of timm's backbones from a file: what is taken, what is left, and what is refused by name."""

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffperception.detection import FCOS, Detector, DiffusionDet
from diffperception.models import TimmBackbone
from diffperception.models.base import Model, describe
from diffperception.segmentation import TimmFeatures
from tests.detection.scenes import CLASSES, random_image, random_target, tiny_detector

NAME, STRIDES = "test_resnet", (4, 8, 16)
IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


def trained(name: str = NAME) -> nn.Module:
    """A whole network of timm whose weights and statistics are nobody else's."""
    torch.manual_seed(1)
    network = timm.create_model(name)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor + 0.1 * torch.rand_like(tensor))
    return network.eval()


def weights(network: nn.Module, path: Path, prefix: str = "") -> Path:
    file = path / "weights.safetensors"
    save_file({prefix + name: value.contiguous() for name, value in network.state_dict().items()}, file)
    return file


def maps_of(network: nn.Module) -> list[Tensor]:
    """What the whole network itself computes on the way, of each of the strides the deepest."""
    found = network.forward_intermediates(IMAGES, intermediates_only=True)
    return [[m for m in found if m.shape[-1] == 96 // stride][-1] for stride in STRIDES]


def assert_same_maps(backbone: TimmBackbone, network: nn.Module) -> None:
    with torch.no_grad():
        for ours, theirs in zip(backbone.eval()(IMAGES), maps_of(network), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_maps_are_those_of_the_network_whose_weights_they_are(tmp_path: Path, frozen: bool) -> None:
    network = trained()
    backbone = TimmBackbone(NAME, STRIDES, freeze_norm=frozen, backbone_weights=weights(network, tmp_path))
    assert_same_maps(backbone, network)
    assert "left in the file: fc, layer4" in backbone.weights_taken


@pytest.mark.parametrize("name", ["regnetx_002", "mobilenetv3_small_050"])
def test_names_with_dots_where_the_maps_have_underscores(tmp_path: Path, name: str) -> None:
    network = trained(name)
    backbone = TimmBackbone(name, (4, 8), backbone_weights=weights(network, tmp_path))
    theirs = {key.replace(".", "_"): value for key, value in network.state_dict().items()}
    for key, value in backbone.body.state_dict().items():
        assert torch.equal(value, theirs[key.replace(".", "_")]), key


def test_wrappers_and_prefixes_come_off_a_checkpoint_of_torch(tmp_path: Path) -> None:
    network = trained()
    state = {f"module.backbone.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "training.pth")
    assert_same_maps(TimmBackbone(NAME, STRIDES, backbone_weights=tmp_path / "training.pth"), network)


@pytest.mark.parametrize(
    "build",
    [
        lambda file: tiny_detector(backbone_weights=file),
        lambda file: tiny_detector(backbone_weights=file, pretrained=True),  # the file, not the network
        lambda file: FCOS(CLASSES, NAME, backbone_weights=file, width=64, strides=STRIDES, min_size=None),
        lambda file: TimmFeatures(NAME, STRIDES, backbone_weights=file),
    ],
    ids=["DiffusionDet", "pretrained", "FCOS", "TimmFeatures"],
)
def test_models_take_them_and_their_files_do_not_name_the_path(tmp_path: Path, build) -> None:
    network = trained()
    model = build(str(weights(network, tmp_path)))
    (backbone,) = (module for module in model.modules() if isinstance(module, TimmBackbone))
    assert_same_maps(backbone, network)
    assert str(tmp_path) not in str(describe(model))
    model.save(tmp_path / "model.safetensors")
    (tmp_path / "weights.safetensors").unlink()
    loaded = Model.load(tmp_path / "model.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert loaded.arguments["backbone_weights"] is None


def test_frozen_norms_keep_the_statistics_of_the_file(tmp_path: Path) -> None:
    network = trained()
    detector = tiny_detector(freeze_norm=True, backbone_weights=weights(network, tmp_path)).train()
    images = [random_image(64, 64, seed) for seed in range(2)]
    sum(detector.loss(images, [random_target(2, 64, 64)] * 2).values()).backward()
    body = detector.backbone.backbone.body
    assert torch.equal(body.bn1.running_mean, network.bn1.running_mean)
    assert torch.equal(body.bn1.weight, network.bn1.weight)


def test_a_detector_draws_its_other_weights_as_without_a_file(tmp_path: Path) -> None:
    file = weights(trained(), tmp_path)
    ours, plain = tiny_detector(backbone_weights=file).state_dict(), tiny_detector().state_dict()
    for name in plain:
        assert torch.equal(ours[name], plain[name]) == (
            not name.startswith("backbone.backbone.body.") or name.endswith("num_batches_tracked")
        ), name


def without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != "layer2.0.bn1.running_var"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without, "1 name is missing: layer2.0.bn1.running_var."),
        (lambda s: s | {"conv1.0.weight": torch.ones(3, 2, 1, 1)}, "of another shape: conv1.0.weight (3, 2, 1, 1)"),
        (lambda s: s | {"layer1.7.conv1.weight": torch.ones(1)}, "left over: layer1.7.conv1.weight"),
        (lambda s: s | {"bn1.bias": torch.full_like(s["bn1.bias"], torch.nan)}, "not finite in bn1.bias"),
        (lambda s: {f"features.{i}": value for i, value in enumerate(s.values())}, "names are missing: conv1.0.weight"),
    ],
    ids=["missing", "shape", "deeper", "nan", "another"],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change, words: str) -> None:
    state = dict(trained().state_dict())
    assert state["conv1.0.weight"].shape != (3, 2, 1, 1)
    save_file(change(state), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=re.escape(words)):
        TimmBackbone(NAME, STRIDES, backbone_weights=tmp_path / "weights.safetensors")


def test_files_that_hold_no_such_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        tiny_detector(backbone_weights=tmp_path / "absent.pth")
    tiny_detector().save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="name it --init"):
        tiny_detector(backbone_weights=tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="TimmBackbone already built"):
        DiffusionDet(CLASSES, TimmBackbone(NAME, STRIDES), strides=STRIDES, backbone_weights=tmp_path / "w.pth")


def test_a_model_file_may_not_name_one(tmp_path: Path) -> None:
    detector, file = tiny_detector(), weights(trained(), tmp_path)
    detector.arguments["backbone_weights"] = str(file)
    detector.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(f"names the file {file}")):
        Detector.load(tmp_path / "model.safetensors")
