"""The networks whose features generated images are scored by."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from diffperception.generation.feature_networks import BACKBONE_SIDE, feature_network
from diffperception.models import TimmBackbone, UNet
from tests.detection.scenes import tiny_detector

IMAGE = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0))


def test_an_untrained_network_is_always_the_same_and_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    one = feature_network("random:resnet18", side=32)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == drawn
    other = feature_network("random:resnet18", side=32)
    batch = one.transform(IMAGE)[None]
    assert torch.equal(one(batch), other(batch))
    assert one(batch).shape == (1, one.channels) == (1, 512)


def test_images_of_any_size_and_kind_are_resized_and_normalised_as_the_network_was_trained() -> None:
    network = feature_network("random:resnet18")
    config = timm.data.resolve_model_data_config(timm.create_model("resnet18"))
    assert network.size == config["input_size"][1:]
    grey = torch.full((3, 10, 30), 0.5)
    prepared = network.transform(grey)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1).expand(3, *network.size) for name in ("mean", "std"))
    torch.testing.assert_close(prepared * std + mean, torch.full_like(prepared, 0.5))
    torch.testing.assert_close(network.transform((IMAGE * 255).byte()), network.transform((IMAGE * 255).byte() / 255))


def test_small_pictures_of_large_images_are_free_of_aliasing() -> None:
    """Stripes of one pixel become an even grey, not stripes or a plain black."""
    network = feature_network("random:resnet18", side=32)
    stripes = torch.zeros(3, 256, 256)
    stripes[:, :, ::2] = 1
    grey = network.transform(torch.full_like(stripes, 0.5))[:, 4:-4, 4:-4]
    torch.testing.assert_close(network.transform(stripes)[:, 4:-4, 4:-4], grey, atol=0.05, rtol=0)


def test_features_do_not_depend_on_the_batch() -> None:
    network = feature_network("random:resnet18", side=32)
    batch = torch.stack([network.transform(IMAGE), network.transform(IMAGE.flip(1))])
    torch.testing.assert_close(network(batch)[:1], network(batch[:1]))


def test_weights_of_ones_own_are_used_and_their_classifier_is_not() -> None:
    torch.manual_seed(1)
    model: Any = timm.create_model("resnet18", num_classes=7).eval()
    network = feature_network("resnet18", model.state_dict(), side=32)
    batch = network.transform(IMAGE)[None]
    expected = model.forward_head(model.forward_features(batch), pre_logits=True)
    torch.testing.assert_close(network(batch), expected.detach())


@pytest.mark.parametrize("source", ["resnet34", "resnet10t"])
def test_weights_of_another_model_are_refused(source: str) -> None:
    """resnet34 has all that resnet18 has, and more."""
    weights = timm.create_model(source).state_dict()
    with pytest.raises(ValueError, match="not those of timm's resnet18") as error:
        feature_network("resnet18", weights)
    assert "\n" not in str(error.value)


def test_the_backbone_of_a_detector_gives_its_coarsest_map(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    detector = tiny_detector()
    detector.save(path)
    network = feature_network(str(path), side=64)
    (backbone,) = (module for module in detector.eval().modules() if isinstance(module, TimmBackbone))
    batch = network.transform(IMAGE)[None]
    torch.testing.assert_close(network(batch), backbone(batch)[-1].mean((-2, -1)).detach())
    assert feature_network(str(path)).size == (BACKBONE_SIDE, BACKBONE_SIDE)


@pytest.mark.parametrize(
    ("name", "side", "part"),
    [
        ("resnet19", None, "no feature network resnet19"),
        ("random:resnet19", None, "no feature network random:resnet19"),
        ("absent.safetensors", None, "no model file absent.safetensors"),
        ("random:vit_tiny_patch16_224", 64, "images of 64 x 64 pixels"),
        ("resnet18.of_nobody", None, "of_nobody"),
    ],
)
def test_a_mistake_is_one_sentence(name: str, side: int | None, part: str) -> None:
    with pytest.raises((ValueError, OSError), match=part) as error:
        feature_network(name, side=side)
    assert "\n" not in str(error.value)


def test_weights_beside_a_network_that_has_its_own_are_refused() -> None:
    for name in ("random:resnet18", "model.safetensors"):
        with pytest.raises(ValueError, match="leave out the others"):
            feature_network(name, {"weight": torch.zeros(1)})


def test_a_model_without_a_backbone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    UNet(32, channel_mult=(1, 2), num_res_blocks=1, attention=(), num_head_channels=16).save(path)
    with pytest.raises(ValueError, match="holds a UNet: features come from a detector"):
        feature_network(str(path))


def test_weights_that_cannot_be_fetched(tmp_path: Path) -> None:
    """An empty cache and no network: the sentence says what was wanted and which ways there are without."""
    code = "from diffperception.generation.feature_networks import feature_network as f\nf('resnet18')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: the weights of resnet18 could not be fetched")
    assert all(way in last for way in ("--weights", "model.safetensors", "random:resnet18"))
