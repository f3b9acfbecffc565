"""Pixel classifiers and the UNet from scratch as recipes: what they learn, when they stop, how they go on."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffperception.cli.main import main
from diffperception.diffusion.noise import derive_seed
from diffperception.models import Model
from diffperception.segmentation import FeatureExtractor, PixelEnsemble, PixelSegmenter, RGBFeatures
from diffperception.segmentation.mlp import PixelMLPs, hidden_widths
from diffperception.segmentation.pixels import LabelledPixels
from diffperception.training import FitOptions, fit_ensemble, fit_segmenter
from diffperception.training.options import TrainerOptions
from diffperception.training.recipes.segmentation import EnsembleModule, PixelBatches
from diffperception.training.run import fit_quietly
from tests.helpers.networks import tiny_unet
from tests.helpers.pixel_classifiers import member
from tests.helpers.scenes import Pyramid, scene, write_scenes

CPU = TrainerOptions(accelerator="cpu")


def fit(features: FeatureExtractor, images, masks, options: FitOptions, members: int = 3, seed: int = 0, **more):  # type: ignore[no-untyped-def]
    return fit_ensemble(features, images, masks, 3, members, options, seed=seed, trainer=CPU, **more)


def module_of(features: FeatureExtractor, image: Tensor, mask: Tensor, options: FitOptions, members: int, seed: int):  # type: ignore[no-untyped-def]
    model = PixelSegmenter(features, PixelEnsemble(features.channels, 3, members), ["a", "b", "c"])
    module = EnsembleModule(model, features, [image], [mask], options, seed)
    return module, PixelBatches(module.num_pixels, members, options, seed)


def test_the_ensemble_equals_members_trained_one_by_one_on_the_same_minibatches():
    """In float64: Adam makes of a gradient's rounding, where it should be zero, a step as large as any other."""
    image, mask = scene()
    options = FitOptions(batch_size=16, max_minibatches=125, feature_dtype="float32")
    module, batches = module_of(Pyramid(), image, mask, options, 3, 4)
    module.members.double()
    module.model.classifier.double()
    pixels = LabelledPixels(Pyramid(), [image], [mask.to(torch.uint8)], torch.float32, ["a"])
    x, y = pixels.gather(torch.arange(len(pixels)))
    start = PixelMLPs(3, 12, 3, seed=4).double()
    first = start.linears[0].weight
    first.data = first.data[:, :, module.order]
    fit_quietly(module, batches, CPU)
    drawn = torch.cat(list(batches.batches(0, 2, 0, 1, False)))
    assert drawn.shape == (125, 3, 16)
    for index in range(3):
        network = member(start, index).train()
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for batch in drawn[:, index]:
            optimizer.zero_grad()
            F.cross_entropy(network(x[batch].double()), y[batch]).backward()
            optimizer.step()
        ours = member(module.members, index).state_dict()
        for name, value in network.state_dict().items():
            if "tracked" not in name:
                torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-8)


def test_fit_keeps_the_extractors_order_of_channels():
    """Training gathers channels by stride; what it learned must lie where the maps have them."""
    image, mask = scene()
    ensemble = fit(Pyramid(), [image], [mask], FitOptions(max_minibatches=150))
    assert (ensemble.segment(Pyramid().maps(image)).labels == mask).float().mean() > 0.95


def test_a_member_is_the_same_in_an_ensemble_of_any_size():
    image, mask = scene()
    options = FitOptions(max_minibatches=10)
    one, two = (fit(Pyramid(), [image], [mask], options, m) for m in (1, 2))
    torch.testing.assert_close(one.mlps.linears[0].weight[0], two.mlps.linears[0].weight[0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(two.mlps.linears[0].weight[0], two.mlps.linears[0].weight[1])


def test_members_stop_each_after_its_patience_and_keep_the_weights_they_had(monkeypatch):
    image, mask = scene()
    image = torch.rand_like(image)  # nothing to learn: no loss goes on improving
    options = FitOptions(early_stopping_start=1, patience=5, epochs=50)
    together = fit(Pyramid(), [image], [mask], options)
    for index in range(3):
        for module in ("training.recipes.segmentation", "segmentation.mlp"):
            monkeypatch.setattr(f"diffperception.{module}.derive_seed", lambda seed, _, i=index: derive_seed(seed, i))
        alone = fit(Pyramid(), [image], [mask], options, 1)
        torch.testing.assert_close(
            together.mlps.linears[2].weight[index], alone.mlps.linears[2].weight[0], rtol=1e-2, atol=1e-3
        )


def test_no_member_stops_in_the_passes_before_it_is_watched():
    image, mask = scene()
    epoch = -(-mask.numel() // 300)

    def seen(early_stopping_start: int) -> list[int]:
        options = FitOptions(batch_size=300, early_stopping_start=early_stopping_start, patience=1, epochs=20)
        module, batches = module_of(Pyramid(), torch.rand_like(image), mask, options, 2, 0)
        fit_quietly(module, batches, CPU)
        return module.stopped.tolist()

    assert 0 < max(seen(0)) < 3 * epoch
    assert 3 * epoch < min(seen(3)) < 20 * epoch


def test_the_recipe_is_the_references():
    options = FitOptions()
    assert (options.batch_size, options.lr, options.epochs) == (64, 1e-3, 100)
    assert (options.early_stopping_start, options.patience, options.max_minibatches) == (4, 50, None)
    assert [hidden_widths(k) for k in (2, 29, 30, 34)] == [(128, 32)] * 2 + [(256, 128)] * 2
    mlps = PixelMLPs(2, 500, 3)
    for layer in mlps.linears:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert not layer.bias.any()


def test_the_seed_is_of_weights_and_minibatches():
    image, mask = scene()

    def weights(seed: int) -> Tensor:
        options = FitOptions(max_minibatches=2)
        return fit(Pyramid(), [image], [mask], options, 2, seed).mlps.linears[0].weight.detach()

    one, same, other = (weights(seed) for seed in (5, 5, 6))
    torch.testing.assert_close(one, same)
    assert (one - other).abs().mean() > 0.01


def test_patience_counts_from_the_best_loss():
    module, _ = module_of(Pyramid(), *scene(), FitOptions(patience=2), 2, 0)
    losses = [[1.0, 1.0], [2.0, 0.9], [0.5, 0.95], [0.6, 0.9], [0.5, 0.1]]
    ended = [module._update_stopping(torch.tensor(values), n) for n, values in enumerate(losses, 1)]
    assert ended == [[], [], [], [1], [0]]
    assert module.stopped.tolist() == [5, 4]


def test_it_learns_what_can_be_learned():
    images, masks = zip(scene(0), scene(1), strict=True)
    ensemble = fit(RGBFeatures(), images, masks, FitOptions(max_minibatches=150), 4)
    image, mask = scene(2, 33, 20)
    found = ensemble.segment(RGBFeatures().maps(image))
    assert (found.labels == mask).float().mean() > 0.95
    assert found.uncertainty.shape == mask.shape
    assert float(found.uncertainty.min()) >= 0


def test_regions_too_small_are_ignored_and_named():
    image, mask = scene()
    mask[mask == 2] = 0
    mask[0, :4] = 2
    few = FitOptions(max_minibatches=2)
    with pytest.warns(
        UserWarning, match=r"^b.png has only 4 pixels of class sky; they are ignored\. no image has .* class sky, which"
    ):
        fit(Pyramid(), [image], [mask], few, 1, names=["b.png"], classes=["sea", "land", "sky"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: torch.full_like(m, 255), "all pixels of the masks are ignored"),
        (lambda m: m[:-1], "the mask of image 0 has 29 x 45 pixels, the image 30 x 45"),
        (lambda m: m.clamp(max=1) * 7, r"image 0 has the values \[7\]; the classes are 0 to 2"),
        (lambda m: m - 1, r"image 0 has the values \[-1\]"),
        (lambda m: m.float(), "whole numbers"),
    ],
)
def test_masks_that_do_not_fit_are_refused(change, message):
    image, mask = scene()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            fit(Pyramid(), [image], [change(mask)], FitOptions(), 1)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("batch_size", 1, "at least 2"),
        ("lr", -1.0, "above 0"),
        ("lr", math.nan, "above 0"),
        ("epochs", 0, "at least 1"),
        ("early_stopping_start", -1, "at least 0"),
        ("patience", 0, "at least 1"),
        ("max_minibatches", 0, "at least 1"),
        ("min_pixels", -1, "at least 0"),
    ],
)
def test_numbers_that_train_nothing_are_refused_by_name(name, value, least):
    with pytest.raises(ValueError, match=f"{name} must be {least}, not {value}"):
        FitOptions(**{name: value})


def test_other_faults_end_in_one_sentence():
    image, mask = scene()
    with pytest.raises(ValueError, match="2 images, 1 masks and 1 names"):
        fit(Pyramid(), [image, image], [mask], FitOptions())
    with pytest.raises(ValueError, match=r"image 0 is not finite in torch\.float16: .* float32"):
        fit(Pyramid(scale=1e6), [image], [mask], FitOptions())


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, range(3))
    return folder


def train(data: Path, output: Path, *more: str) -> int:
    arguments = ["--features", "tests.helpers.scenes.Pyramid", "--data.classes=[a, b, c]", "--members", "2"]
    arguments += [f"--data.{kind}={data / kind}" for kind in ("images", "masks")]
    arguments += ["--fit.max_minibatches", "230", "--trainer.accelerator", "cpu", "--trainer.log_every", "1"]
    return main(["train", "--task", "segmentation", *arguments, "--output", str(output), *more])


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("patience", [50, 30])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(data: Path, tmp_path: Path, monkeypatch, patience: int):
    # In the first hundred minibatches members are watched from the 73rd on, so that none has stopped by then.
    more = ["--trainer.checkpoint_every", "1", f"--fit.patience={patience}", "--fit.early_stopping_start=2"]
    more += ["--fit.ema_decay", "0.9", "--fit.lr", "0.01"]
    assert train(data, tmp_path / "whole", *more) == 0
    step = EnsembleModule.training_step

    def interrupted(self: EnsembleModule, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 1:
            raise Interrupted
        step(self, batch, batch_idx)

    monkeypatch.setattr(EnsembleModule, "training_step", interrupted)
    with pytest.raises(Interrupted):
        train(data, tmp_path / "cut", *more)
    monkeypatch.undo()
    assert not (tmp_path / "cut/model.safetensors").exists()
    assert train(data, tmp_path / "cut", *more, "--resume") == 0
    whole, cut = (
        Model.load(tmp_path / name / "model.safetensors", allow=("tests",)).state_dict() for name in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "cut")]
    losses = [[row.split(",")[:2] for row in table] for table in rows]
    assert losses[0] == losses[1]


def test_a_finished_run_goes_on_with_nothing(data: Path, tmp_path: Path):
    more = ["--fit.patience=8", "--fit.early_stopping_start=0", "--fit.lr=0.01"]
    assert train(data, tmp_path / "run", *more) == 0
    before = Model.load(tmp_path / "run/model.safetensors", allow=("tests",)).state_dict()
    assert train(data, tmp_path / "run", *more, "--resume") == 0
    after = Model.load(tmp_path / "run/model.safetensors", allow=("tests",)).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_average_is_of_weights_after_each_hundred_minibatches(data: Path, tmp_path: Path):
    assert train(data, tmp_path / "plain") == 0
    assert train(data, tmp_path / "average", "--fit.ema_decay", "0.9") == 0
    plain, average = (
        Model.load(tmp_path / name / "model.safetensors", allow=("tests",)) for name in ("plain", "average")
    )
    weights = [m.classifier.mlps.linears[0].weight for m in (plain, average)]
    assert 0 < (weights[0] - weights[1]).abs().max() < 0.2
    assert train(data, tmp_path / "plain", "--fit.ema_decay", "0.9", "--resume") == 2  # an average cannot appear


def test_the_unet_from_scratch_is_a_run_too(data: Path, tmp_path: Path):
    tiny_unet().save(tmp_path / "unet.safetensors")
    arguments = ["train", "--task", "baseline", "--generator", str(tmp_path / "unet.safetensors")]
    arguments += ["--data.classes=[a, b, c]", "--fit.steps=4", "--fit.batch_size=2", "--fit.crop=16"]
    arguments += [f"--data.{prefix}{kind}={data / kind}" for kind in ("images", "masks") for prefix in ("", "val_")]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.checkpoint_every", "2"]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 0
    assert set(json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]["iou"]) == {"a", "b", "c"}
    assert Model.load(tmp_path / "run/model.safetensors").out_channels == 3
    begun = [*arguments, "--output", str(tmp_path / "begun")]
    assert main([*begun, "--trainer.max_minutes", "0"]) == 0
    assert main([*begun, "--resume", "--fit.lr", "0.5"]) == 0
    state = torch.load(tmp_path / "begun/last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert state["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.5  # as the options say now


def test_a_segmenter_of_other_classes_is_started_from(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train(data, tmp_path / "base") == 0
    capsys.readouterr()
    start = [
        "--trust",
        "tests",
        "--init",
        str(tmp_path / "base/model.safetensors"),
        "--fit.lr",
        "1e-12",
        "--fit.max_minibatches",
        "1",
    ]
    assert train(data, tmp_path / "tuned", "--data.classes=[c, x, a]", *start) == 0
    assert "classes taken by name: c, a; anew: x" in capsys.readouterr().out
    base, tuned = (
        Model.load(tmp_path / name / "model.safetensors", allow="tests").classifier.mlps.state_dict()
        for name in ("base", "tuned")
    )
    for name in ("layers.0.weight", "layers.3.bias"):
        assert torch.allclose(tuned[name], base[name], atol=1e-9)
    for ours, theirs in ((0, 2), (2, 0)):
        assert torch.allclose(tuned["layers.6.weight"][:, ours], base["layers.6.weight"][:, theirs], atol=1e-9)
    assert not torch.allclose(tuned["layers.6.weight"][:, 1], base["layers.6.weight"][:, 1], atol=1e-3)


def test_a_segmenter_learns_from_samples_that_are_fetched_once():
    """Each fetching gives another picture: only the first may be asked for, and its own mask belongs to it."""
    fetched = []

    class Changing:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            fetched.append(index)
            image, mask = scene(len(fetched), 24 + len(fetched), 32)
            return (255 * image).byte(), mask

    options = FitOptions(max_minibatches=30)
    segmenter = fit_segmenter(RGBFeatures(), Changing(), ["a", "b", "c"], 2, options, seed=3, trainer=CPU)
    assert fetched == [0, 1]
    pairs = [scene(1, 25, 32), scene(2, 26, 32)]
    images = [(255 * image).byte().float() / 255 for image, _ in pairs]
    ensemble = fit(RGBFeatures(), images, [mask for _, mask in pairs], options, members=2, seed=3)
    assert segmenter.classes == ["a", "b", "c"]
    for name, value in ensemble.state_dict().items():
        assert torch.equal(segmenter.classifier.state_dict()[name], value), name
