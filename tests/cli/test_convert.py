import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffperception.cli.main import main
from diffperception.detection import DiffusionDet
from diffperception.diffusion import clip, linear_schedule, sample_ddim
from diffperception.generation import DiffusionModel
from diffperception.models import NoisyClassifier
from diffperception.models.convert import trial
from tests.parity import FOLDER, arrays, distance, fill_state
from tests.parity.diffusiondet import RESNET50, SMALL_HEAD, head_shapes, resnet_shapes

BIAS = "head.head_series.1.class_logits.bias"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A ResNet-50 with a small head and three classes, as the reference names it; in half precision, to write less."""
    filled = fill_state(resnet_shapes(RESNET50, width=32) | head_shapes(classes=3, **SMALL_HEAD))
    return {name: value.half() for name, value in filled.items()}


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory) -> Path:
    """What training leaves: weights, their average, and more."""
    path = tmp_path_factory.mktemp("reference") / "model_final.pth"
    average = weights | {BIAS: weights[BIAS] + 1}
    torch.save({"model": weights, "ema_state": average, "optimizer": {"lr": 0.1}, "iteration": 5}, path)
    return path


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def run(checkpoint: Path, output: Path, *options: str) -> int:
    return main(["convert", "--checkpoint", str(checkpoint), "--output", str(output), *options])


def test_a_converted_file_predicts_as_the_checkpoint(checkpoint, weights, tmp_path, capsys):
    output = tmp_path / "new" / "model.safetensors"
    assert run(checkpoint, output) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("resnet50", "3 classes (0, 1, 2)", "2 stages", " M parameters", str(output)))
    assert "--ema" in said
    assert "--annotations" in said

    converted, direct = DiffusionDet.load(output), DiffusionDet.from_reference(weights)
    assert (converted.min_size, converted.max_size) == (800, 1333)
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    found = []
    for detector in (converted, direct):
        detector.min_size = None
        found.append(detector.predict([image], steps=2, num_boxes=20)[0])
    assert len(found[0]["boxes"]) > 0
    assert all(torch.equal(found[0][key], found[1][key]) for key in ("boxes", "scores", "labels"))


def test_averaged_weights_and_names_of_classes(checkpoint, weights, tmp_path, capsys):
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 9, "name": "owl"}]
    annotations = tmp_path / "coco.json"
    annotations.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    output = tmp_path / "model.safetensors"
    assert run(checkpoint, output, "--ema", "--annotations", str(annotations)) == 0
    detector = DiffusionDet.load(output)
    assert detector.classes == ["dog", "cat", "owl"]
    assert torch.equal(detector.head.stages[1].class_logits.bias, (weights[BIAS] + 1).float())
    assert "--annotations" not in capsys.readouterr().out


def test_a_file_is_replaced_only_when_asked(checkpoint, tmp_path, capsys):
    output = tmp_path / "model.safetensors"
    output.write_text("mine")
    assert run(checkpoint, output, "--overwrite") == 2
    assert "no model file of ours: name another file" in capsys.readouterr().err
    assert output.read_text() == "mine"
    before = checkpoint.read_bytes()
    assert run(checkpoint, checkpoint, "--overwrite") == 2
    assert checkpoint.read_bytes() == before
    output.unlink()
    assert run(checkpoint, output) == 0
    written = output.stat().st_mtime_ns
    capsys.readouterr()
    assert run(checkpoint, output) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert output.stat().st_mtime_ns == written
    assert run(checkpoint, output, "--overwrite") == 0
    assert output.stat().st_mtime_ns > written


def test_a_folder_as_output_is_refused_and_nothing_is_left(tmp_path, capsys):
    folder = tmp_path / "models"
    folder.mkdir()
    assert run(tmp_path / "absent.pth", folder, "--overwrite") == 2
    assert f"{folder} is a folder: name a file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


def test_remarks_on_a_checkpoint_are_said_plainly(weights, tmp_path, capsys):
    torch.save(weights | {"pixel_mean": torch.zeros(3, 1, 1)}, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "model.safetensors") == 0
    said = capsys.readouterr()
    assert "pixel_mean of the checkpoint is not DiffusionDet's image normalisation" in said.out
    assert "Warning" not in said.out + said.err


class Harmful:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("wrap", [lambda harm: harm, lambda harm: np.array([harm], dtype=object)])
@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_that_would_run_code_is_refused(tensors, tmp_path, capsys, wrap, new_format):
    harm = tmp_path / "harm"
    path = tmp_path / "a.pth"
    torch.save({"model": tensors, "x": wrap(Harmful(harm))}, path, _use_new_zipfile_serialization=new_format)
    assert run(path, tmp_path / "model.safetensors") == 2
    error = capsys.readouterr().err
    assert "could run code" in error
    assert error.count("\n") == 1
    assert not harm.exists()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_damaged_files_are_one_sentence(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name, tmp_path / "model.safetensors") == 2
    error = capsys.readouterr().err
    assert "damaged, or of another format" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        ({"model": {"a": torch.ones(1)}}, ["--ema"], "no averaged weights"),
        ({"epoch": 1, "a": torch.ones(1)}, [], "something else than tensors beside its weights (epoch)"),
        ([torch.ones(1)], [], "holds no weights"),
        ({"a": torch.ones(1)}, [], "no checkpoint of the reference DiffusionDet"),
    ],
)
def test_files_without_weights_are_refused(tmp_path, capsys, content, options, complaint):
    torch.save(content, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "model.safetensors", *options) == 2
    assert complaint in capsys.readouterr().err


def test_the_script_is_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert.py", "--checkpoint", str(tmp_path / "no.pth"), "--output", "x"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(Path(__file__).parents[2] / "tools" / "convert.py"), run_name="__main__")
    assert "there is no checkpoint" in capsys.readouterr().err


# Checkpoints of guided-diffusion


def reference(name: str, kind: str, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint as guided-diffusion leaves it: a plain state dict."""
    shapes = json.loads((FOLDER / f"adm_{name}_keys.json").read_text())
    state = fill_state({key: tuple(shape) for key, shape in (shapes[kind] if kind else shapes).items()})
    torch.save(state, tmp_path / "ema_0.9999_500000.pt")
    return tmp_path / "ema_0.9999_500000.pt", state


@torch.no_grad()
def test_a_converted_generator_samples_what_the_reference_samples(tmp_path, capsys):
    path, _ = reference("layouts", "half", tmp_path)
    output = tmp_path / "model.safetensors"
    assert run(path, output, "--num-head-channels", "32", "--image-size", "8", "--schedule", "cosine") == 0
    said = capsys.readouterr().out
    assert all(
        part in said for part in ("levels 32, 64 channels wide", "cosine path of 1000 steps", "no classes", "sample")
    )
    model, parity = DiffusionModel.load(output), arrays("adm_layouts")
    assert (model.learned_range, model.classes, model.conditioner) == (True, None, None)
    grid = linear_schedule().grid(10, "leading")
    samples = sample_ddim(clip(model.denoiser()), model.schedule, parity["noise"], grid)
    assert distance(samples, parity["ddim_cosine"]) < 1e-4


def test_a_class_conditional_generator_of_another_layout(tmp_path, capsys):
    """Four heads, the new order of qkv, five numbered or named classes, grey images that are not square."""
    path, state = reference("layouts", "conv", tmp_path)
    options = ["--num-heads", "4", "--new-attention-order", "--rescale-timesteps", "true", "--num-timesteps", "4000"]
    options += ["--image-size"]
    assert run(path, tmp_path / "model.safetensors", *options, "[16, 24]") == 0
    model = DiffusionModel.load(tmp_path / "model.safetensors")
    expected = DiffusionModel.from_reference(state, (16, 24), num_heads=4, new_attention_order=True).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert (model.classes, model.image_size, model.schedule.num_timesteps) == (list("01234"), (16, 24), 4000)
    assert model.schedule.conditioning(torch.tensor([3000, 10])).tolist() == [750.0, 2.5]
    said = capsys.readouterr().out
    assert "numbered" in said
    assert "assumed, as no checkpoint tells it: linear path, whose times the network is told as 0 to 999.75" in said

    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    named = ["--overwrite", "--annotations", str(tmp_path / "names.txt")]
    assert run(path, tmp_path / "model.safetensors", *options, "16", *named) == 0
    assert DiffusionModel.load(tmp_path / "model.safetensors").classes == ["ant", "bee", "cat", "dog", "elk"]
    assert "numbered" not in capsys.readouterr().out

    (tmp_path / "names.txt").write_text("crane\r\nbee\r\ncrane\r\n\r\ndog\r\nelk\r\n\r\n", encoding="utf-8-sig")
    assert run(path, tmp_path / "model.safetensors", *options, "16", *named) == 0
    twice = ["crane (id 0)", "bee", "crane (id 2)", "dog", "elk"]
    assert DiffusionModel.load(tmp_path / "model.safetensors").classes == twice


@torch.no_grad()
def test_a_converted_classifier_classifies_as_the_reference(tmp_path, capsys):
    path, _ = reference("classifiers", "block", tmp_path)
    assert run(path, tmp_path / "classifier.safetensors", "--num-head-channels", "16") == 0
    assert "--classifier" in capsys.readouterr().out
    parity = arrays("adm_classifiers")
    logits = NoisyClassifier.load(tmp_path / "classifier.safetensors")(parity["block_x"], torch.tensor([3, 800]))
    assert distance(logits, parity["block_logits"]) < 1e-4


@pytest.mark.parametrize(
    ("name", "kind", "options", "complaint"),
    [
        ("layouts", "half", ["--num-head-channels", "32"], "give image_size"),
        ("layouts", "half", ["--image-size", "8"], "Give either num_heads or num_head_channels"),
        ("layouts", "half", ["--num-heads", "2", "--image-size", "8", "--num-timesteps", "4000"], "rescale_timesteps"),
        ("layouts", "half", ["--num-heads", "5", "--image-size", "8"], "cannot be split evenly by num_heads = 5"),
        ("layouts", "half", ["--num-heads", "2", "--image-size", "9"], "9 x 9 pixels do not allow"),
        ("layouts", "half", ["--num-heads", "0", "--image-size", "8"], "num_heads must be above 0, not 0"),
        (
            "layouts",
            "half",
            ["--num-head-channels", "0", "--image-size", "8"],
            "num_head_channels must be above 0, not 0",
        ),
        ("layouts", "half", ["--num-heads", "2", "--image-size", "0"], "height must be above 0, not 0"),
        ("layouts", "half", ["--num-heads", "2", "--image-size", "8", "--num-timesteps", "0"], "raise num_timesteps"),
        ("classifiers", "block", ["--num-heads", "2", "--num-res-blocks", "2"], "num_res_blocks"),
    ],
)
def test_what_a_checkpoint_does_not_tell_is_asked_for(tmp_path, capsys, name, kind, options, complaint):
    path, _ = reference(name, kind, tmp_path)
    assert run(path, tmp_path / "model.safetensors", *options) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_what_the_model_predicts_is_an_option(tmp_path):
    path, _ = reference("layouts", "half", tmp_path)
    options = ["--num-heads", "2", "--image-size", "8", "--prediction"]
    assert run(path, tmp_path / "model.safetensors", *options, "v") == 0
    assert DiffusionModel.load(tmp_path / "model.safetensors").prediction == "v"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"out.2.weight": None}, "whole checkpoint of guided-diffusion's: it has no out.2.weight"),
        (
            {"middle_block.0.in_layers.2.bias": torch.zeros(3)},
            "middle_block.0.in_layers.2.bias (3,) instead of (64,).",
        ),
    ],
)
def test_a_unet_that_is_not_whole_is_known_as_one(tmp_path, capsys, change, complaint):
    path, state = reference("layouts", "half", tmp_path)
    torch.save({name: value for name, value in (state | change).items() if value is not None}, path)
    assert run(path, tmp_path / "model.safetensors", "--num-heads", "2", "--image-size", "8") == 2
    assert complaint in capsys.readouterr().err


def test_a_model_file_needs_no_conversion(tmp_path, capsys):
    DiffusionDet(["a"], "resnet10t", strides=(8, 16)).save(tmp_path / "ours.safetensors")
    words = [
        "convert",
        "--checkpoint",
        str(tmp_path / "ours.safetensors"),
        "--output",
        str(tmp_path / "new.safetensors"),
    ]
    assert main(words) == 2
    assert "ours.safetensors is a model file already" in capsys.readouterr().err
    assert not (tmp_path / "new.safetensors").exists()


def test_upsamplers_and_wrong_numbers_of_names_are_refused(tmp_path, capsys):
    path, state = reference("layouts", "half", tmp_path)
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    options = ["--num-heads", "2", "--image-size", "8"]
    assert run(path, tmp_path / "model.safetensors", *options, "--annotations", str(tmp_path / "names.txt")) == 2
    assert "2 class names are given for a checkpoint with no classes" in capsys.readouterr().err
    state["input_blocks.0.0.weight"] = torch.cat([state["input_blocks.0.0.weight"]] * 2, dim=1)
    torch.save(state, path)
    assert run(path, tmp_path / "model.safetensors", *options) == 2
    assert "takes 6 channels and gives 6: it enlarges images" in capsys.readouterr().err


def test_a_checkpoint_is_tried_on_pictures(tmp_path, capsys, monkeypatch):
    """Weights drawn at random denoise nothing, whatever is assumed of them; the heads left open are found."""
    path, _ = reference("layouts", "half", tmp_path)
    monkeypatch.setattr(trial, "FEWEST_VALUES", 2**9)
    grains = np.random.default_rng(0).integers(0, 2, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(255 * grains).save(tmp_path / "a.png")
    options = ["--image-size", "8", "--image", str(tmp_path / "a.png")]
    assert run(path, tmp_path / "model.safetensors", *options) == 0
    said = capsys.readouterr().out
    assert "a.png: it is denoised with" in said
    assert "found by trying: --" in said
    assert "which tells nothing: the checkpoint has not learned such pictures" in said
    assert "assumed, as no" not in said


def test_only_diffusion_models_are_tried_on_pictures(checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path / "model.safetensors", "--image", str(tmp_path)) == 2
    assert "option image: only diffusion models" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "ema_model."])
def test_wrapped_checkpoints_of_all_kinds_become_the_same_models(weights, tmp_path, capsys, prefix):
    unet = reference("layouts", "half", tmp_path)[1]
    classifier = reference("classifiers", "block", tmp_path)[1]
    kinds = ((unet, ["--num-heads", "2", "--image-size", "8"]), (classifier, ["--num-heads", "2"]), (weights, []))
    for number, (state, options) in enumerate(kinds):
        wrapped = {f"{prefix}{name}": value for name, value in state.items()}
        torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "wrapped.ckpt")
        torch.save(state, tmp_path / "plain.pth")
        assert run(tmp_path / "plain.pth", tmp_path / f"plain{number}.safetensors", *options) == 0
        assert run(tmp_path / "wrapped.ckpt", tmp_path / f"wrapped{number}.safetensors", *options) == 0
        plain, other = (load_file(tmp_path / f"{name}{number}.safetensors") for name in ("plain", "wrapped"))
        assert plain.keys() == other.keys()
        assert all(torch.equal(plain[name], other[name]) for name in plain)
