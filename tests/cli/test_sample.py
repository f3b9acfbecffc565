"""`diffperception sample`: its files are what the library draws with the same options."""

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffperception.cli.main import main
from diffperception.diffusion import classifier_guidance
from diffperception.generation import DiffusionModel, SamplingOptions, sample
from diffperception.models import NoisyClassifier, UNet
from diffperception.visualization.draw import to_pil
from diffperception.visualization.panels import image_grid

CLASSES = ["disc", "square"]
TINY: dict[str, Any] = {
    "channels": 32,
    "channel_mult": (1,),
    "num_res_blocks": 1,
    "attention": (),
    "num_head_channels": 32,
}
OPTIONS = SamplingOptions("ddim", steps=3, guidance=3.0)
WORDS = ["--sampling.sampler", "ddim", "--sampling.steps", "3", "--sampling.guidance", "3"]


Model = TypeVar("Model", bound=nn.Module)


def randomise(model: Model) -> Model:
    """No layer starts at zero, so that the result depends on everything."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def generator(classes: list[str] | None = None, channels: int = 3) -> DiffusionModel:
    network = UNet(in_channels=channels, **TINY)
    return randomise(DiffusionModel(classes, network, image_size=8, null_class=classes is not None))


def classifier(classes: list[str] = CLASSES, **changes: Any) -> NoisyClassifier:
    model = randomise(NoisyClassifier(classes, image_size=8, pool="adaptive", **TINY, **changes))
    model.pool.out.weight.data *= 50  # type: ignore[union-attr, operator]  # sure enough to pull at a scale of 1
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    generator(CLASSES).save(folder / "labelled.safetensors")
    generator().save(folder / "plain.safetensors")
    generator(channels=1).save(folder / "grey.safetensors")
    generator(channels=4).save(folder / "four.safetensors")
    classifier().save(folder / "classifier.safetensors")
    classifier(num_timesteps=500).save(folder / "shorter.safetensors")
    classifier(["ant", "bee"]).save(folder / "others.safetensors")
    classifier(in_channels=1).save(folder / "grey_classifier.safetensors")
    return folder


def run(models: Path, name: str, output: Path, *options: str) -> int:
    model = models / f"{name}.safetensors"
    return main(["sample", "--model", str(model), "--output", str(output), "--device", "cpu", *options])


def drawn(output: Path, names: list[str]) -> Tensor:
    """The images of exactly these files."""
    folder = output / "images"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png")) == sorted(names)
    return torch.stack([torch.from_numpy(np.array(Image.open(folder / name))) for name in names])


def assert_pictures(files: Tensor, images: Tensor) -> None:
    expected = torch.stack([torch.from_numpy(np.array(to_pil(image.expand(3, -1, -1)))) for image in images])
    assert files.shape == expected.shape
    assert (files.int() - expected.int()).abs().max() <= 1  # batches of another size round differently


def test_files_are_what_the_library_draws(models: Path, tmp_path: Path) -> None:
    """Labels in turn, guidance, a size that is not square, the seed, and numbers that go on from batch to batch."""
    options = ["--num_samples", "5", "--image_size", "[8, 12]", "--seed", "7", "--batch-size", "2", *WORDS]
    assert run(models, "labelled", tmp_path, *options) == 0
    names = [f"{CLASSES[i % 2]}/{i:06}.png" for i in range(5)]
    model = DiffusionModel.load(models / "labelled.safetensors")
    images = sample(model, range(5), OPTIONS, 7, torch.tensor([0, 1, 0, 1, 0]), (8, 12))
    assert_pictures(drawn(tmp_path, names), images)
    grid = np.array(Image.open(tmp_path / "grid.png")).astype(int)
    assert np.abs(grid - np.array(image_grid(list(images)))).max() <= 1


def test_only_the_classes_named_are_drawn(models: Path, tmp_path: Path) -> None:
    assert run(models, "labelled", tmp_path, "--num_samples", "2", "--classes", "square", *WORDS) == 0
    model = DiffusionModel.load(models / "labelled.safetensors")
    names = ["square/000000.png", "square/000001.png"]
    assert_pictures(drawn(tmp_path, names), sample(model, range(2), OPTIONS, 0, torch.tensor([1, 1])))


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_a_classifier_pulls_as_in_the_library(models: Path, tmp_path: Path, scale: float) -> None:
    """Beside classifier-free guidance, by default at scale 1."""
    options = ["--num_samples", "2", "--classifier", str(models / "classifier.safetensors"), *WORDS]
    options += [] if scale == 1 else ["--classifier-scale", str(scale)]
    assert run(models, "labelled", tmp_path, *options) == 0
    model, labels = DiffusionModel.load(models / "labelled.safetensors"), torch.tensor([0, 1])
    guide = NoisyClassifier.load(models / "classifier.safetensors").log_probability(labels)
    guided = classifier_guidance(model.denoiser(labels, OPTIONS.guidance), guide, model.schedule, scale)
    images = sample(model, range(2), OPTIONS, said=labels, denoiser=guided)
    assert_pictures(drawn(tmp_path, ["disc/000000.png", "square/000001.png"]), images)


def test_grey_images_are_written_in_grey(models: Path, tmp_path: Path) -> None:
    assert run(models, "grey", tmp_path, "--num_samples", "1", "--sampling.steps", "2") == 0
    model = DiffusionModel.load(models / "grey.safetensors")
    assert_pictures(drawn(tmp_path, ["000000.png"]), sample(model, [0], SamplingOptions(steps=2)))


def test_overwriting_leaves_no_image_of_an_earlier_call(models: Path, tmp_path: Path) -> None:
    assert run(models, "labelled", tmp_path, "--num_samples", "4", "--sampling.steps", "1") == 0
    (tmp_path / "images" / "mine.png").touch()
    options = ["--num_samples", "2", "--sampling.steps", "1", "--overwrite"]
    assert run(models, "plain", tmp_path, *options, "--sampling.steps", "5000") == 2
    assert len(list(tmp_path.rglob("images/*/*.png"))) == 4
    assert run(models, "plain", tmp_path, *options) == 0
    found = {path.name for path in (tmp_path / "images").rglob("*.png")}
    assert found == {"000000.png", "000001.png", "mine.png"}


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("plain", ["--steps", "4"], "did you mean sampling.steps?"),
        ("plain", ["--sampling.stps", "4"], "did you mean sampling.steps?"),
        ("plain", ["--sampling.steps", "0"], "not 0"),
        ("plain", ["--sampling.steps", "5000"], "not 5000"),
        ("plain", ["--sampling.sampler", "euler"], "one of dpm_solver, ddim, ddpm, heun"),
        ("plain", ["--num_samples", "0"], "option num_samples: expected a whole number above 0"),
        ("plain", ["--seed", "-1"], "option seed: expected a whole number from 0 on, got -1"),
        ("plain", ["--classes", "disc"], "trained without classes"),
        ("plain", ["--sampling.guidance", "2"], "train it with classes and null_class"),
        ("plain", ["--classifier-scale", "4"], "name one with --classifier"),
        ("labelled", ["--classes", "disk"], "there is no class disk: the generator knows disc, square"),
        ("four", [], "set its in_channels to 3 or 1"),
        ("classifier", [], "holds a NoisyClassifier, not a DiffusionModel"),
        ("absent", [], "absent.safetensors"),
        ("plain", ["--classifier", "shorter"], "num_timesteps 500, but the generator with 1000"),
        ("plain", ["--classifier", "grey_classifier"], "in_channels 1, but the generator with 3"),
        ("labelled", ["--classifier", "others"], "knows the classes ant, bee, but the generator disc, square"),
        ("plain", ["--classifier", "plain"], "holds a DiffusionModel, not a NoisyClassifier"),
    ],
)
def test_a_mistake_is_one_sentence(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, options: list[str], complaint: str
) -> None:
    if "--classifier" in options:
        options = ["--classifier", str(models / f"{options[1]}.safetensors")]
    assert run(models, name, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


class OwnUNet(UNet):
    """As a user may write one."""


def test_a_package_is_trusted_in_files_of_models_and_of_options(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DiffusionModel(None, OwnUNet(**TINY), image_size=8).save(tmp_path / "model.safetensors")
    options = ["--num_samples", "1", "--sampling.steps", "1"]
    assert run(tmp_path, "model", tmp_path / "out", *options) == 2
    assert "or --trust tests, if you trust it" in capsys.readouterr().err
    assert run(tmp_path, "model", tmp_path / "out", *options, "--trust", "tests") == 0
    extract = ["extract", "--features", "DiffusionFeatures", "--features.blocks", "[0]", "--features.timesteps", "[5]"]
    extract += ["--features.generator", str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "features")]
    extract += ["--images", str(tmp_path / "out/images"), "--device", "cpu", "--workers", "0"]
    assert main(extract) == 2
    assert main([*extract, "--trust", "tests"]) == 0


def test_sizes_that_would_do_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = UNet(**TINY | {"channel_mult": (1, 1)})
    DiffusionModel(None, unet, image_size=8).save(tmp_path / "model.safetensors")
    assert run(tmp_path, "model", tmp_path / "out", "--image_size", "[9, 8]") == 2
    assert "crop to 8 x 8 or pad to 10 x 8" in capsys.readouterr().err
