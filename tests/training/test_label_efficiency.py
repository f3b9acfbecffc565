"""`diffperception compare` on pictures of three colours, with a small generator that has learned nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffperception.configuration.parser import Options, call
from diffperception.data.masks import MaskDataOptions, MaskFolder
from diffperception.segmentation import RGBFeatures
from diffperception.segmentation.baseline import predict_labels, segmentation_unet
from diffperception.training import BaselineOptions, FitOptions, compare_label_efficiency, fit_ensemble
from diffperception.training.label_efficiency import (
    label_table,
    lead_sentence,
    mean_and_spread,
    measure_learner,
    pixel_learner,
    unet_learner,
)
from diffperception.training.options import TrainerOptions
from tests.helpers.networks import tiny_unet
from tests.helpers.pixel_classifiers import train_from_scratch
from tests.helpers.scenes import write_scenes

CPU = TrainerOptions(accelerator="cpu")
METHODS = ["diffusion", "untrained", "rgb", "scratch"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_scenes(folder / "train", range(4))
    write_scenes(folder / "test", range(4, 7))
    tiny_unet().save(folder / "unet.safetensors")
    return folder


def run(root: Path, output: Path, *options: str) -> dict:
    arguments = ["--features", "diffperception.segmentation.DiffusionFeatures"]
    arguments += ["--features.generator", str(root / "unet.safetensors"), "--features.blocks", "[0, 4]"]
    arguments += ["--features.timesteps", "[50]", "--features.window", "32", "--output", str(output)]
    for kind, prefix in (("train", ""), ("test", "val_")):
        arguments += [f"--data.{prefix}{name}={root / kind / name}" for name in ("images", "masks")]
    arguments += ["--data.classes", "[red, green, blue]", "--members", "2", "--fit.max_minibatches", "80"]
    arguments += ["--baseline.steps", "2", "--baseline.crop", "16", "--baseline.batch_size", "2", "--device", "cpu"]
    assert call(compare_label_efficiency, [*arguments, *options]) == 0
    return json.loads((output / "compare.json").read_text())


@pytest.fixture(scope="module")
def first(root: Path) -> Path:
    run(root, root / "first", "--labels", "1", "2", "--num_seeds", "2")
    return root / "first"


def test_there_is_a_result_for_each_method_number_and_seed(first: Path) -> None:
    content = json.loads((first / "compare.json").read_text())
    rows = content["results"]
    keys = [(row["method"], row["labels"], row["seed"]) for row in rows]
    assert keys == [(method, count, seed) for method in METHODS for count in (1, 2) for seed in (0, 1)]
    assert all(0 < row["miou"] <= 1 and len(row["images"]) == row["labels"] for row in rows)
    by_key = dict(zip(keys, rows, strict=True))
    for count in (1, 2):
        assert by_key["rgb", count, 0]["miou"] > 0.9, "three colours are told apart by colour"
        images = [by_key[method, count, 0]["images"] for method in METHODS]
        assert images == [images[0]] * 4, "all methods learn from the same images"
    assert set(by_key["rgb", 1, 0]["images"]) < set(by_key["rgb", 2, 0]["images"])
    assert by_key["diffusion", 2, 0]["miou"] != by_key["untrained", 2, 0]["miou"]
    assert set(rows[0]["seconds"]) == {"training", "test"}


def test_what_is_left_out_is_said_once(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "train/images", tmp_path / "images")
    Image.new("RGB", (32, 32)).save(tmp_path / "images/unlabelled.png")
    few = ["--methods", "rgb", "--labels", "1", "2", "--num_seeds", "2", "--num_pictures", "0"]
    run(root, tmp_path / "out", *few, f"--data.images={tmp_path / 'images'}", "--data.unlabelled", "skip")
    assert capsys.readouterr().out.count("left out: 1 images without a mask") == 1


def test_each_seed_chooses_its_own_images(root: Path, first: Path) -> None:
    rows = json.loads((first / "compare.json").read_text())["results"]
    for row in rows:
        folder = MaskDataOptions(
            root / "train/images", root / "train/masks", ["a", "b", "c"], max_images=row["labels"]
        ).open(row["seed"])
        assert row["images"] == folder.names
    assert len({tuple(row["images"]) for row in rows if row["labels"] == 2}) == 2


@pytest.fixture(scope="module")
def data(root: Path) -> MaskDataOptions:
    """Four labelled scenes."""
    return MaskDataOptions(root / "train/images", root / "train/masks", ["red", "green", "blue"])


@pytest.fixture(scope="module")
def scored(root: Path) -> MaskFolder:
    return MaskDataOptions(root / "test/images", root / "test/masks", ["a", "b", "c"]).open()


def test_pixel_classifiers_differ_by_the_seed_alone(data: MaskDataOptions, scored: MaskFolder) -> None:
    labelled, few = data.open(), 20  # minibatches, after which the first weights still show
    options = FitOptions(max_minibatches=few)
    learner = pixel_learner(RGBFeatures(), 2, options, CPU)
    found = [measure_learner(learner, data, scored, seed, set())[1] for seed in (0, 1)]
    ensemble = fit_ensemble(RGBFeatures(), labelled.images, labelled.masks, 3, 2, options, seed=1, trainer=CPU)
    for image, one, other in zip(scored.images, *found, strict=True):
        assert torch.equal(other, ensemble.segment(RGBFeatures().maps(image)).labels.to(torch.uint8))
        assert not torch.equal(one, other)


def test_the_unet_from_scratch_sees_the_seeds_crops(data: MaskDataOptions, scored: MaskFolder) -> None:
    images, masks = (list(part) for part in (data.open().images, data.open().masks))
    options = BaselineOptions(steps=3, batch_size=2, crop=16, lr=1e-2)
    like = tiny_unet()
    (found, *_) = measure_learner(unet_learner(like, options, CPU), data, scored, 1, set())[1]
    for seed in (1, 0):
        torch.manual_seed(1)
        network = segmentation_unet(like, 3)
        network = train_from_scratch(network, images, masks, options, seed)
        assert torch.equal(found, predict_labels(network, scored.images[0]).to(torch.uint8)) == (seed == 1)


def test_there_are_a_table_curves_and_pictures(first: Path) -> None:
    table = (first / "compare.md").read_text()
    for words in ("labelled images", "±", "colours", "UNet from scratch", "over the best of the others"):
        assert words in table
    for name in ("compare.png", "examples.png"):
        with Image.open(first / name) as picture:
            assert min(picture.size) > 100
    assert len(list((first / "examples" / "rgb").glob("*.png"))) == 3


def test_more_pictures_are_drawn_of_finished_results(root: Path, tmp_path: Path) -> None:
    options = ["--labels", "1", "--num_seeds", "1", "--methods", "rgb"]
    sides = []
    for pictures in ("1", "2"):
        run(root, tmp_path, *options, "--num_pictures", pictures)
        with Image.open(tmp_path / "examples.png") as picture:
            sides.append(picture.size)
    assert sides[0][0] == sides[1][0], "the same panels in each row"
    assert sides[0][1] < sides[1][1]
    assert len(list((tmp_path / "examples" / "rgb").glob("*.png"))) == 3


def test_what_is_finished_is_not_done_again(root: Path, first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((first / "compare.json").read_text())["results"]
    content = run(root, first, "--labels", "1", "2", "--num_seeds", "3", "--methods", "rgb")
    assert content["results"][: len(before)] == before
    added = content["results"][len(before) :]
    assert [(row["method"], row["labels"], row["seed"]) for row in added] == [("rgb", 1, 2), ("rgb", 2, 2)]
    assert "2 of 6 results are still to be made" in capsys.readouterr().out


def test_results_of_other_settings_are_not_mixed(root: Path, first: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings \(fit.max_minibatches\)"):
        run(root, first, "--labels", "1", "--methods", "rgb", "--fit.max_minibatches", "81")


def test_results_of_another_generator_are_not_mixed(root: Path, first: Path) -> None:
    file = root / "unet.safetensors"
    before, other = file.read_bytes(), tiny_unet()
    other.stem.weight.data += 1
    other.save(file)
    try:
        with pytest.raises(ValueError, match=r"other settings \(weights\)"):
            run(root, first, "--labels", "1", "--methods", "rgb")
    finally:
        file.write_bytes(before)


def test_a_file_of_results_that_no_call_wrote_is_never_replaced(root: Path, tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text('{"settings": {')
    with pytest.raises(ValueError, match="is not empty: choose another"):
        run(root, tmp_path, "--labels", "1", "--methods", "rgb")
    with pytest.raises(ValueError, match=r"compare\.json would be replaced, which no earlier run wrote"):
        run(root, tmp_path, "--labels", "1", "--methods", "rgb", "--overwrite")
    assert (tmp_path / "compare.json").read_text() == '{"settings": {'


def test_results_of_masks_that_were_corrected_are_made_anew(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "train/masks", tmp_path / "masks")
    options = ["--labels", "1", "--methods", "rgb", "--num_seeds", "1", "--data.masks", str(tmp_path / "masks")]
    options += ["--fit.max_minibatches", "5"]
    run(root, tmp_path / "out", *options)
    for file in (tmp_path / "masks").iterdir():
        Image.fromarray(np.array(Image.open(file))[::-1].copy()).save(file)
    capsys.readouterr()
    again = run(root, tmp_path / "out", *options)
    said = capsys.readouterr().out
    assert "1 result of images or masks that have changed since: made anew" in said
    assert "1 of 1 results are still to be made" in said
    anew = run(root, tmp_path / "anew", *options)
    assert [(row["miou"], row["content"]) for row in again["results"]] == [
        (row["miou"], row["content"]) for row in anew["results"]
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline.crop", "15"], "15 x 15"),
        (["--max_memory", "lots", "--methods", "scratch"], "'lots' is no amount of memory"),
        (["--labels", "[]"], "at least one number of labelled images"),
        (["--methods", "[]"], "one of the methods"),
    ],
)
def test_mistakes_are_found_before_any_work(root: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(root, tmp_path / "out", "--data.val_images", "nowhere", *options)
    assert not (tmp_path / "out").exists()


def test_features_that_do_not_fit_into_memory_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of 4 images take .* but the limit is 10.0 kB"):
        run(root, tmp_path, "--labels", "1", "--num_seeds", "1", "--max_memory", "10kB")


def test_more_labelled_images_than_there_are(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 4 labelled images, but 9 are to be chosen"):
        run(root, tmp_path, "--labels", "9")


def test_means_and_spreads() -> None:
    values = {("diffusion", 5): [0.7, 0.8], ("rgb", 5): [0.5], ("scratch", 5): [0.6, 0.62]}
    rows = [
        {"method": m, "labels": n, "seed": seed, "miou": miou}
        for (m, n), mious in values.items()
        for seed, miou in enumerate(mious)
    ]
    summary = mean_and_spread(rows)
    assert [cell["miou"] for cell in summary] == pytest.approx([0.75, 0.5, 0.61])
    assert summary[0]["spread"] == pytest.approx(float(torch.tensor([0.7, 0.8]).std()))
    assert summary[1]["spread"] is None
    assert "75.0 ± 7.1" in label_table(summary)
    assert "+14.0 at 5 (UNet from scratch)" in lead_sentence(summary)


@pytest.mark.parametrize("name", ["bccd", "shapes"])
def test_the_shipped_comparisons_are_accepted(name: str) -> None:
    path = Path(__file__).parents[2] / "configs" / "segmentation" / f"{name}_compare.yaml"
    options = Options("compare", compare_label_efficiency).parse([str(path), "--labels", "5", "--num_seeds", "1"])
    assert (options.labels, options.num_seeds) == ([5], 1)
    assert options.precision == "bf16"
