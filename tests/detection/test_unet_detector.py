"""Detectors on a diffusion UNet's activations, in Python and from the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from diffperception.cli.main import main
from diffperception.detection import FCOS, Detector, DiffusionDet
from diffperception.models import DiffusionModel, UNetBackbone, pad_images
from diffperception.training.options import OptimizerOptions
from diffperception.training.recipes.detection import DetectionModule
from tests.detection.scenes import CLASSES, assert_same_detections, random_image, random_target, tiny_detector
from tests.helpers.networks import tiny_unet
from tests.training.tiny_data import write_tiny_config

IMAGES = [random_image(32, 48, 1), random_image(37, 26, 2), random_image(30, 47, 3)]
TARGETS = [random_target(n, *image.shape[1:], seed=n) for n, image in zip([3, 0, 5], IMAGES, strict=True)]


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    """The file of a small diffusion model."""
    DiffusionModel(None, tiny_unet(), schedule="cosine", image_size=16).save(tmp_path / "generator.safetensors")
    return tmp_path / "generator.safetensors"


def diffusiondet(unet: Path, frozen: bool = True) -> DiffusionDet:
    return tiny_detector(backbone=UNetBackbone(unet, [4, 2, 0], timestep=100, frozen=frozen), strides=(1, 2, 4))


def fcos(unet: Path, frozen: bool = True) -> FCOS:
    torch.manual_seed(0)
    return FCOS(CLASSES, UNetBackbone(unet, [0, 2], frozen=frozen), strides=(2, 4), width=64, min_size=None).eval()


def unet_of(detector: Detector) -> torch.nn.Module:
    return next(module for module in detector.modules() if isinstance(module, UNetBackbone)).reader.generator.network


@pytest.mark.parametrize("build", [diffusiondet, fcos])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_few_steps_of_training(build: Callable[..., Detector], generator: Path, frozen: bool) -> None:
    detector = build(generator, frozen).train()
    before = {name: value.clone() for name, value in unet_of(detector).state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], 1e-3)
    for _ in range(3):
        loss = torch.stack(list(detector.loss(IMAGES, TARGETS).values())).sum()
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None] == []
    changed = {name for name, value in unet_of(detector).state_dict().items() if not torch.equal(value, before[name])}
    assert bool(changed) != frozen
    if not frozen:
        assert {"stem.weight", "time_embed.0.weight", "decoder.2.0.conv2.weight"} <= changed


@pytest.mark.parametrize("build", [diffusiondet, fcos])
def test_a_saved_detector_needs_the_generators_file_no_more(
    build: Callable[..., Detector], generator: Path, tmp_path: Path
) -> None:
    detector = build(generator)
    generator.unlink()
    detector.save(tmp_path / "model.safetensors")
    loaded = Detector.load(tmp_path / "model.safetensors")
    assert_same_detections(loaded.predict(IMAGES), detector.predict(IMAGES))
    assert not any(parameter.requires_grad for parameter in unet_of(loaded).parameters())
    loaded.save(tmp_path / "again.safetensors")
    assert_same_detections(Detector.load(tmp_path / "again.safetensors").predict(IMAGES), detector.predict(IMAGES))


@pytest.mark.parametrize("build", [diffusiondet, fcos])
def test_images_of_any_size_are_predicted_alike_alone_and_together(
    build: Callable[..., Detector], generator: Path
) -> None:
    detector = build(generator)
    apart = [detector.predict([image])[0] for image in IMAGES]
    # How many images are together decides on the algorithm of the UNet's convolutions, and so on the rounding.
    assert_same_detections(detector.predict(IMAGES), apart, pixels=0.1)
    assert_same_detections(detector.predict(IMAGES), detector.predict(IMAGES))


def test_images_are_padded_and_scaled_as_the_unet_wants(generator: Path) -> None:
    detector = diffusiondet(generator)
    batch = pad_images([torch.ones(3, 5, 9)], detector.mean, detector.std, detector.pad_multiple)
    assert batch.shape == (1, 3, 8, 12)
    assert batch[0, :, :5, :9].unique().tolist() == [1.0]
    assert fcos(generator).model.transform([torch.zeros(3, 5, 9)])[0].tensors.unique().tolist() == [-1.0, 0.0]


def test_a_backbones_strides_are_asked_for(generator: Path) -> None:
    with pytest.raises(ValueError, match=r"UNetBackbone gives maps at strides \[1, 2, 4\], not \[4, 8\]: set"):
        DiffusionDet(CLASSES, UNetBackbone(generator, [0, 2, 5]), strides=(4, 8))


@pytest.mark.parametrize("frozen", [True, False])
def test_the_backbone_has_a_learning_rate_of_its_own(generator: Path, frozen: bool) -> None:
    task = DetectionModule(diffusiondet(generator, frozen), OptimizerOptions(backbone_lr_factor=0.25), seed=0)
    scales = {name: task.lr_scale(name) for name, p in task.model.named_parameters() if p.requires_grad}
    assert {scale for name, scale in scales.items() if name.startswith("backbone.backbone.")} == {0.25}
    assert {scale for name, scale in scales.items() if not name.startswith("backbone.backbone.")} == {1.0}
    assert ("backbone.backbone.reader.generator.network.stem.weight" in scales) != frozen


# From the command line


@pytest.fixture
def config(generator: Path, tmp_path: Path) -> Path:
    """A configuration of two steps of training on the generator."""
    path = write_tiny_config(tmp_path)
    options = yaml.safe_load(path.read_text())
    backbone = {
        "class_path": "diffperception.models.UNetBackbone",
        "init_args": {"unet": str(generator), "blocks": [4, 2, 0]},
    }
    head = {
        "class_path": "diffperception.detection.DynamicHead",
        "init_args": {"width": 32, "stages": 1, "dynamic_width": 8, "ffn_width": 32, "num_heads": 4},
    }
    options["model"] = {
        "class_path": "diffperception.detection.DiffusionDet",
        "init_args": {"backbone": backbone, "head": head, "strides": [1, 2, 4], "min_size": None, "num_boxes": 20},
    }
    options["trainer"]["max_steps"] = 2
    options["evaluation"] = {"every": None, "num_pictures": 0}
    path.write_text(yaml.safe_dump(options))
    return path


def test_a_detector_is_trained_from_a_configuration(config: Path, generator: Path, tmp_path: Path) -> None:
    options = ["--config", str(config), "--model.init_args.backbone.init_args.timestep", "7"]
    assert main(["train", *options, "--output", str(tmp_path / "run")]) == 0
    before = DiffusionModel.load(generator).network.state_dict()
    generator.unlink()
    detector = Detector.load(tmp_path / "run" / "model.safetensors")
    after = unet_of(detector).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    init_args = resolved["model"]["init_args"]["backbone"]["init_args"]
    assert (init_args["unet"], init_args["timestep"]) == (str(generator), 7)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            "timestep=x",
            "option model.backbone.timestep: diffperception.models.UNetBackbone: expected a number, got x",
        ),
        ("timestp=1", "UNetBackbone: Option 'timestp' is not accepted; did you mean timestep?"),
        ("unet=nothing.safetensors", "there is no model file nothing.safetensors"),
        ("blocks=[1,2]", "blocks [2, 1] have strides [2, 2], but a pyramid needs one per stride"),
        ("blocks=[0,2]", "gives maps at strides [2, 4], not [1, 2, 4]: set the detector's strides to [2, 4]"),
    ],
)
def test_a_mistake_in_the_options_is_one_sentence(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, complaint: str
) -> None:
    wrong = f"--model.init_args.backbone.init_args.{options}"
    assert main(["train", "--config", str(config), wrong, "--output", str(tmp_path / "run")]) != 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffperception")]
    assert len(said) == 1
    assert complaint in said[0]
    assert "Namespace" not in said[0]
