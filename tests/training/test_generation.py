"""Training a generator: resumed bit for bit, it learns, it shows samples, and it says what is wrong."""

import itertools
import json
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffperception.data.image_folder import ImageDataOptions, ImageFolder
from diffperception.diffusion import LossSecondMoment
from diffperception.generation import DiffusionModel, SamplingOptions, sample
from diffperception.models import TextConditioner, UNet
from diffperception.training.options import OptimizerOptions
from diffperception.training.recipes.generation import (
    Batch,
    GenerationModule,
    ObjectiveOptions,
    held_out_loss,
)
from diffperception.visualization.draw import save_png
from diffperception.visualization.panels import image_grid
from tests.helpers.runs import assert_not_resumed, assert_same_run, complaint, copy_run, fixtures_of, logged, train
from tests.training.tiny_detector import PowerCut
from tests.training.tiny_generator import write_tiny_generator, write_tiny_pictures

UNLABELLED = ["--data.labelled", "false", "--model.null_class", "false", "--objective.label_dropout", "0"]
NO_NULL_CLASS = ["--model.null_class", "false", "--objective.label_dropout", "0"]
PLAIN = ["--model", "diffperception.generation.DiffusionModel"]
STRAIGHT = [*PLAIN, "--model.schedule", "flow", "--model.prediction", "flow", "--model.learned_range", "false"]
STRAIGHT += ["--model.network.out_channels", "3", "--objective.times", "uniform"]


config, whole = fixtures_of(write_tiny_generator)


@pytest.mark.parametrize("step", [1, 4, 5, 12])
def test_a_run_stopped_at_any_step_ends_like_the_uninterrupted_one(
    config: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    with pytest.raises(PowerCut):
        train(config, tmp_path / "stopped", "--model.die_at", str(step))
    assert train(config, tmp_path / "stopped", "--resume") == 0
    assert_same_run(whole, tmp_path / "stopped")


def test_bfloat16_resumes_bit_for_bit(config: Path, tmp_path: Path) -> None:
    options = ["--trainer.precision", "bf16-mixed", "--trainer.max_steps", "6"]
    assert train(config, tmp_path / "whole", *options) == 0
    with pytest.raises(PowerCut):
        train(config, tmp_path / "stopped", *options, "--model.die_at", "5")
    assert train(config, tmp_path / "stopped", *options, "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert train(config, tmp_path / "full", "--trainer.max_steps", "6") == 0
    half, full = ([float(row["train/loss"]) for row in logged(tmp_path / name)] for name in ("whole", "full"))
    assert half == pytest.approx(full, rel=0.05)
    assert half[1:] != full[1:]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.network.num_res_blocks", "2"], "network.num_res_blocks is 2, but the run in {} was begun with 1: "),
        (["--model.network.channels", "64"], "model.network.channels is 64, but the run in {} was begun with 32: "),
        (["--model.num_timesteps", "5"], "model.num_timesteps is 5, but the run in {} was begun with 3: "),
        (["--objective.times", "uniform"], "objective.times is uniform, but the run in {} was begun with loss_sec"),
        (UNLABELLED, "model.classes is null, but the run in {}"),
        (["--optimizer.ema_decay", "null"], "optimizer.ema_decay is null, but the run in {} was begun with 0.9: "),
        (["--trainer.max_steps", "4"], "trainer.max_steps is 4, but {}/last.ckpt was written after step 12"),
    ],
)
def test_a_resumed_run_must_be_the_same(config, whole, tmp_path, capsys, options: list[str], said: str):
    assert_not_resumed(config, whole, tmp_path, options, said, capsys)


def test_a_resumed_run_may_change_what_its_weights_do_not_hang_on(config: Path, whole: Path, tmp_path: Path) -> None:
    copy_run(whole, tmp_path)
    options = ["--model.network.checkpointing", "true", "--model.network.dropout", "0", "--preview.num_samples", "1"]
    options += ["--optimizer.ema_decay", "0.5", "--trainer.max_steps", "13", "--seed", "3"]
    assert train(config, tmp_path, "--resume", *options) == 0
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 13


def test_a_run_leaves_samples_of_the_raw_and_the_averaged_weights(whole: Path) -> None:
    names = {path.name for path in (whole / "pictures").iterdir()}
    steps = ("0000004", "0000008", "0000012")
    assert names == {"curves.png"} | {f"samples_{step}_{kind}.png" for step in steps for kind in ("raw", "averaged")}
    rows = logged(whole)
    assert all(row["val/held_out_raw"] != row["val/held_out_averaged"] for row in rows if row["val/held_out_raw"])
    assert [row["step"] for row in rows if row["val/held_out_raw"]] == ["4", "8", "12"]
    assert rows[0].keys() >= {"train/loss_mse", "train/loss_vlb", "val/held_out_averaged"}


def test_a_run_that_died_in_its_last_look_makes_up_for_it(config: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes((whole / "last.ckpt").read_bytes())
    assert train(config, tmp_path, "--resume") == 0
    looks = [f"samples_0000012_{kind}.png" for kind in ("averaged", "raw")]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["curves.png", *looks]
    for name in looks:
        assert (tmp_path / "pictures" / name).read_bytes() == (whole / "pictures" / name).read_bytes()
    (row,), last = logged(tmp_path), logged(whole)[-1]
    assert row == {"step": "12"} | {name: value for name, value in last.items() if name.startswith("val/")}


@pytest.fixture(scope="module")
def both(config: Path, whole: Path) -> dict[str, DiffusionModel]:
    """The generator as it was exported, and with the raw weights of the last checkpoint."""
    raw = torch.load(whole / "last.ckpt", weights_only=True)["current_model_state"]
    weights = {
        "averaged": load_file(whole / "model.safetensors"),
        "raw": {name[6:]: value for name, value in raw.items() if name.startswith("model.")},
    }
    layout = yaml.safe_load(config.read_text())["model"]["init_args"]["network"]["init_args"]
    models = {}
    for kind, state in weights.items():
        models[kind] = DiffusionModel(
            ["even", "odd"],
            UNet(**layout),
            schedule="cosine",
            num_timesteps=3,
            learned_range=True,
            image_size=8,
            null_class=True,
        )
        models[kind].load_state_dict(state)
        models[kind].eval()
    return models


def test_the_exported_generator_is_the_averaged_one(whole: Path, both: dict[str, DiffusionModel]) -> None:
    averages = torch.load(whole / "last.ckpt", weights_only=True)["state_dict"]
    weights, raw = (model.state_dict() for model in both.values())
    assert all(torch.equal(value, averages[f"model.{name}"]) for name, value in weights.items())
    assert not torch.equal(weights["network.stem.weight"], raw["network.stem.weight"])
    assert yaml.safe_load((whole / "config.yaml").read_text())["task"] == "generation"


@pytest.mark.parametrize("kind", ["averaged", "raw"])
def test_the_grids_are_drawn_from_either_weights_with_the_same_noise_and_labels_in_turn(
    whole: Path, both: dict[str, DiffusionModel], tmp_path: Path, kind: str
) -> None:
    def picture(model: DiffusionModel, labels: list[int]) -> bytes:
        images = sample(model, range(2), SamplingOptions(steps=2), 0, torch.tensor(labels))
        save_png(image_grid(list(images)), tmp_path / "grid.png")
        return (tmp_path / "grid.png").read_bytes()

    drawn = picture(both[kind], [0, 1])
    assert (whole / "pictures" / f"samples_0000012_{kind}.png").read_bytes() == drawn
    assert drawn not in [
        picture(both[kind], [0, 0]),
        *(picture(both[other], [0, 1]) for other in both if other != kind),
    ]


def test_the_held_out_loss_is_the_same_in_every_call_and_leaves_dropout_out(
    config: Path, whole: Path, both: dict[str, DiffusionModel]
) -> None:
    folder = ImageFolder(ImageDataOptions(config.parent / "pictures", labelled=True), (8, 8))
    first = {kind: held_out_loss(model.train(), folder, 4, 4) for kind, model in both.items()}
    assert first == {kind: held_out_loss(model.train(), folder, 4, 4) for kind, model in both.items()}
    assert first["raw"] != first["averaged"]
    for kind, model in both.items():
        assert float(logged(whole)[-1][f"val/held_out_{kind}"]) == pytest.approx(first[kind], rel=1e-4)
        model.eval()


@pytest.fixture
def batch() -> Batch:
    """Of 32 pictures of two classes."""
    images = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return list(images), [{"label": k % 2, "image_id": k, "path": f"{k}.png"} for k in range(32)]


def make_module(**objective: Any) -> GenerationModule:
    """The step of a network none of whose weights is 0."""
    torch.manual_seed(0)
    model = DiffusionModel(
        ["a", "b"],
        UNet(3, 6, 32, (1,), 1, attention=(), num_head_channels=32),
        schedule="cosine",
        num_timesteps=4,
        learned_range=True,
        image_size=4,
        null_class=True,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return GenerationModule(model, OptimizerOptions(), 0, ObjectiveOptions(**objective))


def signal_and_labels(batch: Batch) -> tuple[Tensor, Tensor]:
    images, targets = batch
    return 2 * torch.stack(images) - 1, torch.tensor([target["label"] for target in targets])


def by_hand(task: GenerationModule, batch: Batch, min_snr: float | None = None) -> tuple[Tensor, Tensor, dict]:
    """Times, weights and the terms of each picture's loss that the task must draw with seed 5."""
    generator = torch.Generator().manual_seed(5)
    x0, labels = signal_and_labels(batch)
    t, weights = task.times.sample(len(x0), generator)
    noise = torch.randn(x0.shape, generator=generator)
    network = partial(task.model.network, condition=task.model.condition(labels))
    with torch.no_grad():
        return t, weights, task.model.objective(min_snr)(network, x0, t, noise)


def test_the_loss_is_weighted_by_how_rarely_its_times_are_drawn_which_learn_from_it(batch: Batch) -> None:
    task = make_module(times="loss_second_moment")
    times = cast(LossSecondMoment, task.times)
    times.seen.fill_(10)
    times.losses.copy_(torch.tensor([[4.0], [1.0], [2.0], [8.0]]).expand(4, 10))
    t, weights, losses = by_hand(task, batch)
    assert weights.std() > 0.1
    expected = deepcopy(times)
    expected.update(t, losses["mse"] + losses["vlb"])
    terms = task.loss_terms(batch, torch.Generator().manual_seed(5))
    assert terms.keys() == losses.keys()
    for name, values in losses.items():
        torch.testing.assert_close(terms[name].detach(), (weights * values).mean())
    assert torch.equal(times.seen, 10 + torch.bincount(t, minlength=4))
    torch.testing.assert_close(times.losses, expected.losses)


def test_the_loss_is_weighed_by_the_signal_to_noise_ratio_on_demand(batch: Batch) -> None:
    terms = {}
    for min_snr in (None, 0.5):
        task = make_module(min_snr=min_snr)
        terms[min_snr] = task.loss_terms(batch, torch.Generator().manual_seed(5))["mse"].detach()
        torch.testing.assert_close(terms[min_snr], by_hand(task, batch, min_snr)[2]["mse"].mean())
    assert terms[0.5] < 0.9 * terms[None]


def test_a_share_of_the_labels_is_dropped(batch: Batch) -> None:
    task = make_module(label_dropout=0.25)
    told = []
    assert task.model.conditioner is not None
    task.model.conditioner.register_forward_pre_hook(lambda module, inputs: told.append(inputs[0]))
    for seed in range(8):
        task.loss_terms(batch, torch.Generator().manual_seed(seed))
    labels, own = torch.stack(told), torch.arange(32) % 2
    dropped = labels == 2
    assert torch.equal(labels[~dropped], own.expand(8, 32)[~dropped])
    assert 0.15 < dropped.float().mean() < 0.35
    assert dropped.any(0).sum() > 16  # others in every batch


def test_losses_are_not_in_half_precision(batch: Batch) -> None:
    task = make_module()
    x0, _ = signal_and_labels(batch)
    t, noise = torch.arange(32) % 4, torch.randn(x0.shape)
    output = torch.randn(32, 6, 4, 4).bfloat16()
    half, full = (task.objective(lambda *_, y=y: y, x0, t, noise) for y in (output, output.float()))
    for name, values in half.items():
        assert values.dtype == torch.float32
        assert torch.equal(values, full[name])


def test_the_options_of_pictures_reach_them(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255

    def pictures(size: int, **options: Any) -> list[Tensor]:
        """Three of either folder."""
        folders = ImageDataOptions(tmp_path / "train", val_images=tmp_path / "val", **options).open((size, size), 3)
        return [folder[0][0] for folder in folders if folder is not None for _ in range(3)]

    for horizontal, vertical in itertools.product((0.0, 1.0), (0.0, 1.0)):
        flipped = image.flip([d for d, share in ((2, horizontal), (1, vertical)) if share])
        for found in pictures(8, horizontal_flip=horizontal, vertical_flip=vertical):
            torch.testing.assert_close(found, flipped)
    parts = image.unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4)
    for short_side, cut in ((8, True), (None, False)):
        for found in pictures(4, horizontal_flip=0.0, short_side=short_side):
            assert bool(torch.isclose(parts, found).flatten(2).all(2).any()) == cut


def test_labels_are_dropped_to_the_null_class(config: Path, tmp_path: Path) -> None:
    """The null class's embedding learns if labels are dropped, and only then."""
    moved = {}
    for share in ("0.0", "0.5"):
        run = tmp_path / share
        options = ["--objective.label_dropout", share, "--trainer.max_steps", "3", "--optimizer.ema_decay", "null"]
        assert train(config, run, *options, "--preview.every", "null") == 0
        moved[share] = torch.load(run / "last.ckpt", weights_only=True)["state_dict"][
            "model.conditioner.embedding.weight"
        ]
    assert not torch.equal(moved["0.0"][:2], moved["0.5"][:2])
    assert not torch.equal(moved["0.0"][2], moved["0.5"][2])


def test_it_learns_the_colour_of_its_pictures(tmp_path: Path) -> None:
    """Of pictures of one colour each, orange or blue, the samples are either orange or blue."""
    colours = np.array([[230, 120, 20], [20, 90, 220]], dtype=np.uint8)
    for k, colour in enumerate(colours):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(np.broadcast_to(colour, (8, 8, 3)).copy()).save(tmp_path / "pictures" / f"{k}.png")
    config = {
        "task": "generation",
        "model": {
            "class_path": "diffperception.generation.DiffusionModel",
            "init_args": {
                "network": {
                    "channels": 32,
                    "channel_mult": [1],
                    "num_res_blocks": 1,
                    "attention": [],
                    "num_head_channels": 32,
                },
                "image_size": 4,
                "prediction": "v",
            },
        },
        "data": {"images": str(tmp_path / "pictures"), "batch_size": 16, "workers": 0, "cached": 2},
        "optimizer": {"lr": 3e-3, "base_batch_size": 16, "warmup_steps": 5, "ema_decay": 0.95},
        "trainer": {"max_steps": 120, "log_every": 50, "accelerator": "cpu"},
        "preview": {"every": None, "num_samples": 1, "sampling": {"steps": 1}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert train(tmp_path / "config.yaml", tmp_path / "run") == 0
    model = DiffusionModel.load(tmp_path / "run" / "model.safetensors")
    found = sample(model, range(16), SamplingOptions("ddim", 10)).mean((2, 3)) * 255
    distance = torch.cdist(found, torch.from_numpy(colours).float())
    assert distance.min(1).values.median() < 60  # of 255; the two are 290 apart
    assert {0, 1} == set(distance.argmin(1).tolist())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--objective.label_dropout", "0.1", "--model.null_class", "false"], "needs classes and model.null_class"),
        (["--model.image_size", "9"], "crop to 8 x 8 or pad to 10 x 10"),
        (["--model.network.channels", "30"], "multiple"),
        (["--model.network.attention", "[2]", "--model.network.num_heads", "5"], "num_heads = 5"),
        (["--data.labelled", "false"], "null_class belongs to a model with classes"),
        (["--model.learned_range", "false"], "learned_range"),
        (["--model.image_size", "64"], "has 10 x 12 pixels"),
        (["--data.images", "nowhere"], "there is no image or folder nowhere"),
        (["--task", "generatoin"], "no task 'generatoin'"),
        (["--preview.sampling.sampler", "euler"], "expected one of dpm_solver"),
        (["--preview.sampling.steps", "4"], "option preview.sampling: "),
        (["--preview.sampling.steps", "0"], "option preview.sampling: "),
        ([*STRAIGHT, "--preview.sampling.sampler", "ddpm"], "option preview.sampling: The sampler ddpm needs"),
        ([*NO_NULL_CLASS, "--preview.sampling.guidance", "3"], "option preview.sampling: Guidance needs another model"),
        (["--preview.num_samples", "0"], "option preview.num_samples: expected a whole number above 0, got 0"),
        (["--preview.num_held_out", "0"], "option preview.num_held_out: expected a whole number above 0, got 0"),
        (["--preview.batch_size", "0"], "option preview.batch_size: expected a whole number above 0, got 0"),
        (["--preview.every", "0"], "option preview.every: expected a whole number above 0, got 0"),
        (["--objective.min_snr", "-1"], "option objective.min_snr: expected a number above 0, got -1"),
        (["--objective.label_dropout", "1.5"], "option objective.label_dropout: expected a number from 0 to 1, got"),
        (["--data.batch_size", "-1"], "option data.batch_size: expected a whole number above 0, got -1"),
        (["--data.horizontal_flip", "2"], "option data.horizontal_flip: expected a number from 0 to 1, got 2"),
        (["--data.vertical_flip", "-1"], "option data.vertical_flip: expected a number from 0 to 1, got -1"),
        (["--data.workers", "-1"], "option data.workers: expected a whole number from 0 on, got -1"),
        (["--trainer.accelerator", "gpuu"], "trainer.accelerator gpuu, devices auto and strategy auto do not suit"),
        (["--seed", "-1"], "option seed: expected a whole number from 0 on, got -1"),
    ],
)
def test_mistakes_end_in_one_sentence(config: Path, tmp_path: Path, capsys, options: list[str], said: str) -> None:
    assert train(config, tmp_path / "run", *options) == 2
    assert said in complaint(capsys)
    assert not (tmp_path / "run").exists()


def test_held_out_pictures_are_of_the_same_classes(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = write_tiny_pictures(tmp_path / "other")
    (pictures / "even").rename(pictures / "prime")
    assert train(config, tmp_path / "run", "--data.val_images", str(pictures)) == 2
    assert "hold folders of different names" in complaint(capsys)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_names_its_pictures(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path / "run", "--optimizer.lr", "1e30", "--optimizer.warmup_steps", "0") == 2
    said = complaint(capsys)
    assert "not finite" in said
    assert ".png" in said


def test_a_generator_learns_words_and_draws_by_them(config: Path, tmp_path: Path, capsys: Any) -> None:
    """With a word that only pictures to measure on have; what is shown are captions."""
    names = [f"{'even' if i % 2 == 0 else 'odd'}/{i}.png" for i in range(6)]
    for name, words in (("captions", "noise number"), ("val_captions", "other noise")):
        content = {
            "images": [{"id": i, "file_name": each} for i, each in enumerate(names)],
            "annotations": [{"image_id": i, "caption": f"{words} {i}"} for i in range(6)],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    plain = [*PLAIN, *UNLABELLED, "--model.schedule", "cosine"]
    options = [*plain, "--model.network.context", "32", "--model.network.attention", "[2]"]
    text = ["--model.conditioner", "TextConditioner", "--model.conditioner.width", "32"]
    captions = ["--data.captions", f"{tmp_path}/captions.json", "--data.val_captions", f"{tmp_path}/val_captions.json"]
    steps = ["--trainer.max_steps", "2", "--objective.label_dropout", "0.5", "--preview.every", "null"]
    run = tmp_path / "run"
    assert train(config, run, *options, *text, *captions, *steps) == 0
    model = DiffusionModel.load(run / "model.safetensors")
    assert isinstance(model.conditioner, TextConditioner)
    assert model.conditioner.vocabulary == ["0", "1", "2", "3", "4", "5", "noise", "number"]
    assert model.conditioner.length == 5
    assert (run / "pictures" / "captions.txt").read_text().splitlines() == ["noise number 0", "noise number 2"]
    capsys.readouterr()
    for given, said in (
        ([*options, *text], "name them with data.captions"),
        ([*plain, *captions], "no conditioner that reads them"),
        ([*options, *captions], "attends to tokens 32 wide, but no conditioner"),
        ([*options, *text, *captions[:2]], "data.val_captions"),
    ):
        assert train(config, tmp_path / "refused", *given, "--objective.label_dropout", "0") == 2
        assert said in complaint(capsys)
