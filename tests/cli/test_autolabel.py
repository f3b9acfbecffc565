"""`diffperception autolabel`: an ordinary labelled data set from a folder, or from a generator."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffperception.cli.autolabel import command
from diffperception.configuration.parser import call
from diffperception.data.masks import MaskDataOptions
from diffperception.generation import SamplingOptions
from diffperception.generation import sample as draw
from diffperception.models import DiffusionModel
from diffperception.segmentation import PixelEnsemble, PixelSegmenter, RGBFeatures, Segmentation
from diffperception.training import FitOptions, fit_ensemble
from tests.helpers.networks import tiny_unet
from tests.helpers.scenes import scene, write_scenes

CLASSES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autolabel")
    write_scenes(folder, range(3, 8))
    image, mask = scene(0)
    features = RGBFeatures()
    classifier = fit_ensemble(features, [image], [mask], 3, 3, FitOptions(max_minibatches=200))
    PixelSegmenter(features, classifier, CLASSES).save(folder / "segmenter.safetensors")
    DiffusionModel(None, tiny_unet(), image_size=16).save(folder / "generator.safetensors")
    return folder


def run(root: Path, output: Path, *options: str) -> dict:
    arguments = ["--model", str(root / "segmenter.safetensors"), "--output", str(output), "--device", "cpu"]
    assert call(command, [*arguments, *options]) == 0
    return json.loads((output / "dataset.json").read_text())


def test_a_folder_becomes_a_data_set(root: Path, tmp_path: Path) -> None:
    (root / "images" / "bad.png").write_bytes(b"no picture")
    content = run(root, tmp_path / "data", "--images", str(root / "images"), "--drop", "0.4")
    data = MaskDataOptions(tmp_path / "data" / "images", tmp_path / "data" / "masks", content["classes"]).open()
    assert len(data) == 3
    assert [entry["name"] for entry in content["images"]] == data.names
    least = max(entry["uncertainty"] for entry in content["images"])
    assert len(content["dropped"]) == 2
    assert all(entry["uncertainty"] >= least for entry in content["dropped"])
    segmenter = PixelSegmenter.load(root / "segmenter.safetensors")
    for name, (image, mask), entry in zip(data.names, data, content["images"], strict=True):
        truth = MaskDataOptions(root / "images", root / "masks", CLASSES, unlabelled="skip").open()
        assert torch.equal(image, truth.images[truth.names.index(name)])
        assert torch.equal(mask, segmenter.segment(image).labels)
        assert (mask == truth.masks[truth.names.index(name)]).float().mean() > 0.9
        assert sum(entry["fractions"]) == pytest.approx(1)


def test_a_generators_samples_become_one(root: Path, tmp_path: Path) -> None:
    options = ["--num_samples", "3", "--batch_size", "2", "--drop", "0", "--sampling.steps", "2", "--seed", "5"]
    run(root, tmp_path / "data", "--generator", str(root / "generator.safetensors"), *options)
    data = MaskDataOptions(tmp_path / "data" / "images", tmp_path / "data" / "masks", CLASSES).open()
    assert data.names == ["000000.png", "000001.png", "000002.png"]
    model = DiffusionModel.load(root / "generator.safetensors")
    drawn = draw(model, [2], SamplingOptions(steps=2), 5)[0]
    assert torch.allclose(data.images[2], drawn, atol=1 / 255)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either --images or a --generator"),
        (["--images", "a", "--generator", "b"], "either --images or a --generator"),
        (["--images", "a", "--drop", "1"], "would leave no image"),
        (["--images", "a", "--output", "."], "is not empty: choose another"),
    ],
)
def test_what_cannot_be_done(root: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(root, tmp_path / "data", *options)


def test_the_classes_of_a_generator_take_turns(root: Path, tmp_path: Path) -> None:
    model = DiffusionModel(["a", "b"], tiny_unet(), image_size=16)
    model.conditioner.embedding.weight.data.mul_(20)
    model.save(tmp_path / "generator.safetensors")
    options = ["--num_samples", "3", "--batch_size", "2", "--drop", "0", "--sampling.steps", "2"]
    run(root, tmp_path / "data", "--generator", str(tmp_path / "generator.safetensors"), *options)
    data = MaskDataOptions(tmp_path / "data" / "images", tmp_path / "data" / "masks", CLASSES).open()
    for number in range(3):
        drawn = [draw(model, [number], SamplingOptions(steps=2), 0, torch.tensor([label]))[0] for label in (0, 1)]
        alike = [torch.allclose(data.images[number], image, atol=1 / 255) for image in drawn]
        assert alike == [number % 2 == 0, number % 2 == 1]


@pytest.mark.parametrize("drop", ["0", "0.4"])
def test_an_interrupted_run_is_no_data_set_and_is_gone_on_with(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: str
) -> None:
    whole, segmented = PixelSegmenter.segment, []

    def interrupted(self: PixelSegmenter, image: torch.Tensor, **options: Any) -> Segmentation:
        segmented.append(image)
        if len(segmented) == 3:
            raise KeyboardInterrupt
        return whole(self, image, **options)

    options = ["--images", str(root / "images"), "--drop", drop]
    monkeypatch.setattr(PixelSegmenter, "segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "data", *options)
    assert not (tmp_path / "data/dataset.json").exists()
    run(root, tmp_path / "data", *options)
    assert len(segmented) == 6  # of five images
    run(root, tmp_path / "data", *options)
    assert len(segmented) == 6
    run(root, tmp_path / "at_once", *options)
    one, other = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("[!.]*.*")}
        for name in ("data", "at_once")
    )
    assert one == other


def test_a_share_of_images_is_rounded(root: Path, tmp_path: Path) -> None:
    assert len(run(root, tmp_path / "some", "--images", str(root / "images"), "--drop", "0.15")["dropped"]) == 1
    assert len(run(root, tmp_path / "most", "--images", str(root / "images"), "--drop", "0.99")["images"]) == 1


def test_a_single_member_is_never_uncertain(root: Path, tmp_path: Path) -> None:
    PixelSegmenter(RGBFeatures(), PixelEnsemble(3, 3, 1), CLASSES).save(tmp_path / "one.safetensors")
    options = ["--model", str(tmp_path / "one.safetensors"), "--images", str(root / "images")]
    with pytest.raises(ValueError, match=r"single member.*--drop 0"):
        run(root, tmp_path / "data", *options)
    assert run(root, tmp_path / "data", *options, "--drop", "0")["dropped"] == []
