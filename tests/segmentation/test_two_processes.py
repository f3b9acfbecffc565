"""Two processes share images and minibatches, and write what one would have written."""

import json
from pathlib import Path

import pytest
import torch

from diffperception.models import Model
from diffperception.segmentation import PixelSegmenter, RGBFeatures
from diffperception.training import FitOptions, fit_ensemble
from diffperception.training.options import TrainerOptions
from tests.helpers.runs import TORCHRUN, python
from tests.helpers.scenes import scene, write_scenes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, range(5))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_images_are_shared(data: Path, tmp_path: Path) -> None:
    image, mask = scene()
    options, cpu = FitOptions(max_minibatches=20), TrainerOptions(accelerator="cpu")
    ensemble = fit_ensemble(RGBFeatures(), [image], [mask], 3, 2, options, trainer=cpu)
    model = tmp_path / "model.safetensors"
    PixelSegmenter(RGBFeatures(), ensemble, ["a", "b", "c"]).save(model)
    results = []
    for launcher in ([], TORCHRUN):
        output = tmp_path / str(len(launcher))
        command = [*launcher, "-m", "diffperception", "predict", "--model", str(model), "--device", "cpu", "--rank"]
        assert python(*command, "--images", str(data / "images"), "--output", str(output)) == 0
        written = files(output)
        written.pop(".diffperception")  # in the order in which they were written
        results.append(written)
    assert results[0] == results[1]
    assert len([name for name in results[0] if name.startswith("masks/")]) == 5


@pytest.mark.slow
def test_members_learn_from_the_minibatches_of_both(data: Path, tmp_path: Path) -> None:
    train = ["-m", "diffperception", "train", "--task", "segmentation", "--features", "RGBFeatures"]
    train += [
        "--data.classes=[a, b, c]",
        "--members",
        "2",
        "--fit.max_minibatches",
        "150",
        "--trainer.accelerator",
        "cpu",
    ]
    train += [f"--data.{prefix}{kind}={data / kind}" for kind in ("images", "masks") for prefix in ("", "val_")]
    for launcher in ([], TORCHRUN):
        assert python(*launcher, *train, "--output", str(tmp_path / str(len(launcher)))) == 0
    one, two = (Model.load(tmp_path / str(len(launcher)) / "model.safetensors") for launcher in ([], TORCHRUN))
    weights = [m.classifier.mlps.linears[0].weight for m in (one, two)]
    assert not torch.equal(*weights)
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text())["metrics"]["miou"] for n in ("0", "4")]
    assert min(metrics) > 0.9
