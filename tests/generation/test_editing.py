"""Pictures drawn again, whole or in part, and data sets of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffperception.cli.main import main
from diffperception.data import CocoDetection
from diffperception.diffusion import Denoiser, DenoiserOutput, FlowSchedule, SampleNoise, cosine_schedule
from diffperception.generation import SamplingOptions
from diffperception.generation.editing import EditOptions, augment_dataset, covered_by, edit_grid, edit_images
from diffperception.generation.sampling import SAMPLERS, Sampler, sampling_grid
from diffperception.models import DiffusionModel
from diffperception.visualization.draw import save_png, to_pil
from tests.helpers.devices import Device
from tests.helpers.networks import two_level_unet

STEPS = SamplingOptions(steps=4)


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return DiffusionModel(None, two_level_unet(), image_size=8)


def constant(value: float) -> Denoiser:
    return lambda x, t: DenoiserOutput(torch.full_like(x, value))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_grid_begins_at_the_strength(sampler: Sampler) -> None:
    schedule = cosine_schedule()
    whole = sampling_grid(schedule, sampler, 10)
    assert torch.equal(edit_grid(schedule, sampler, 10, 1.0), whole)
    part = edit_grid(schedule, sampler, 10, 0.25)
    assert (part[0], part[-1]) == (250, -1)
    assert (part.diff() < 0).all()
    assert {*part[1:].tolist()} == {t for t in whole.tolist() if t < 250}


def test_a_grid_of_a_continuous_path_begins_there_too() -> None:
    part = edit_grid(FlowSchedule(), "heun", 10, 0.35)
    torch.testing.assert_close(part, torch.tensor([0.35, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64))


def test_little_strength_keeps_a_picture_and_full_strength_draws_another(model: DiffusionModel) -> None:
    """By the exact denoiser of one picture and noise: what comes back is what that knows, of any size."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 7, 10)

    def remembered(share: float) -> Denoiser:  # as far as the noise lets it see
        padded = torch.nn.functional.pad(2 * images - 1, (0, 0, 0, 1), mode="replicate")
        return lambda x, t: DenoiserOutput(torch.where(t[0] < share * 1000, padded, 0.0 * padded))

    def changed(strength: float) -> float:
        found = edit_images(model, images, SampleNoise([0, 1]), STEPS, EditOptions(strength), None, remembered(0.5))
        assert found.shape == images.shape
        return float((found - images).abs().mean())

    assert changed(0.3) < 1e-5
    ours = edit_images(model, images, SampleNoise([0, 1]), STEPS, EditOptions(0.01), None, None)
    assert (ours - images).abs().mean() < (edit_images(model, images, SampleNoise([0, 1]), STEPS) - images).abs().mean()


def test_masks_are_exact_outside_and_drawn_inside(model: DiffusionModel) -> None:
    images = torch.rand(2, 3, 9, 8)
    redrawn = torch.zeros(2, 1, 9, 8, dtype=torch.bool)
    redrawn[0, :, 2:5, 1:4] = True
    edit = EditOptions(jump=2, resamples=2)
    found = edit_images(model, images, SampleNoise([0, 1]), STEPS, edit, redrawn, constant(0.5))
    assert torch.equal(found[~redrawn.expand_as(found)], images[~redrawn.expand_as(found)])
    torch.testing.assert_close(found[0, :, 2:5, 1:4], torch.full((3, 3, 3), 0.75))


def test_editing_waits_for_no_device(device: Device, model: DiffusionModel) -> None:
    images, redrawn = torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    redrawn[..., :4] = True
    edit = EditOptions(jump=2, resamples=2)
    expected = edit_images(model, images, SampleNoise([0]), STEPS, edit, redrawn)
    moved = device.move(DiffusionModel(None, two_level_unet(), image_size=8))
    found = edit_images(moved, device.move(images), SampleNoise([0]), STEPS, edit, device.move(redrawn))
    torch.testing.assert_close(device.host(found), expected, atol=1e-4, rtol=1e-4)


def test_pixels_in_boxes_are_those_whose_middles_are() -> None:
    found = covered_by(torch.tensor([[0.6, 0.0, 2.5, 1.0], [3.0, 1.0, 4.0, 3.0]]), (3, 5))
    assert found.int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]
    assert not covered_by(torch.zeros(0, 4), (2, 2)).any()


def write_data(folder: Path) -> Path:
    """Two pictures of a class, one without an object, in a folder each."""
    torch.manual_seed(0)
    for name in ("a/1.jpg", "b/1.jpg"):
        save_png(to_pil(torch.rand(3, 9, 12)), folder / f"{name}.png")
        (folder / f"{name}.png").rename(folder / name)
    entry = {"id": 7, "image_id": 1, "category_id": 4, "bbox": [2, 3, 5, 4], "area": 20, "iscrowd": 0, "note": "kept"}
    content = {
        "images": [{"id": k, "file_name": n, "width": 12, "height": 9} for k, n in ((1, "a/1.jpg"), (2, "b/1.jpg"))],
        "annotations": [entry],
        "categories": [{"id": 4, "name": "cell"}],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    return folder / "coco.json"


def read(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_data_set_is_drawn_again_and_its_objects_stay(tmp_path: Path, model: DiffusionModel, where: str) -> None:
    annotations = write_data(tmp_path / "in")
    model.save(tmp_path / "g.safetensors")
    arguments = ["augment", "--model", str(tmp_path / "g.safetensors"), "--annotations", str(annotations)]
    arguments += ["--images", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--where", where]
    arguments += ["--sampling.steps", "3", "--edit.jump", "2", "--edit.resamples", "1", "--device", "cpu"]
    assert main(arguments) == 0
    made = json.loads((tmp_path / "out" / "annotations.json").read_text())
    before = json.loads(annotations.read_text())
    assert made["annotations"] == before["annotations"]
    assert made["categories"] == before["categories"]
    assert [entry.pop("file_name") for entry in made["images"]] == ["a/1.png", "b/1.png"]
    old, new = (read(tmp_path / place) for place in ("in/a/1.jpg", "out/images/a/1.png"))
    inside = torch.zeros(9, 12, dtype=torch.bool)
    inside[3:7, 2:7] = True
    same = (old == new).all(0)
    kept = inside if where == "outside" else ~inside
    assert same[kept].all()
    assert same[~kept].float().mean() < 0.5
    untouched = torch.equal(read(tmp_path / "in/b/1.jpg"), read(tmp_path / "out/images/b/1.png"))
    assert untouched == (where == "inside")
    again = augment_dataset(
        *(model, annotations, tmp_path / "twice", tmp_path / "in", "coco", where),  # type: ignore[arg-type]
        *(SamplingOptions(steps=3), EditOptions(0.3, 2, 1)),
        device="cpu",
    )
    assert isinstance(again, CocoDetection)
    assert torch.equal(read(tmp_path / "twice/images/a/1.png"), new)


def test_the_command_draws_a_picture_again(tmp_path: Path, model: DiffusionModel) -> None:
    model.save(tmp_path / "g.safetensors")
    picture = torch.rand(3, 10, 12)
    save_png(to_pil(picture), tmp_path / "photo.png")
    white = torch.zeros(3, 10, 12)
    white[:, :, 6:] = 1
    save_png(to_pil(white), tmp_path / "mask.png")
    arguments = ["sample", "--model", str(tmp_path / "g.safetensors"), "--image", str(tmp_path / "photo.png")]
    arguments += ["--num_samples", "2", "--sampling.steps", "2", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--mask", str(tmp_path / "mask.png"), "--resamples", "1"]) == 0
    original = read(tmp_path / "photo.png")
    one, other = (read(tmp_path / "out" / "images" / f"{number:06}.png") for number in (0, 1))
    assert torch.equal(one[:, :, :6], original[:, :, :6])
    assert not torch.equal(one[:, :, 6:], other[:, :, 6:])
    assert main([*arguments, "--strength", "0.2", "--overwrite"]) == 0
    assert not torch.equal(read(tmp_path / "out" / "images" / "000000.png")[:, :, :6], original[:, :, :6])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--strength", "0.5"], "give one with --image"),
        (["--image", "photo.png", "--strength", "1.5"], "above 0 and up to 1, not 1.5"),
        (["--image", "photo.png", "--mask", "small.png"], "has 4 x 4 pixels, but the picture 8 x 8"),
        (["--image", "photo.png", "--mask", "black.png"], "has nothing white"),
        (["--image", "photo.png", "--image_size", "16"], "goes without image_size"),
        (["--image", "photo.png", "--classes", "cell"], "trained without classes or words"),
        (["--image", "absent.png"], "absent.png is missing"),
    ],
)
def test_what_makes_no_sense_is_said(
    tmp_path: Path, model: DiffusionModel, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save(tmp_path / "g.safetensors")
    for name, side in (("photo", 8), ("black", 8), ("small", 4)):
        save_png(to_pil(torch.full((3, side, side), float(name != "black"))), tmp_path / f"{name}.png")
    places = [str(tmp_path / word) if word.endswith(".png") else word for word in options]
    model_and_output = [
        "--model",
        str(tmp_path / "g.safetensors"),
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main(["sample", *model_and_output, *places]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
