"""Folders of diffusers, without diffusers: what is written, what returns, and what is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffperception.cli.main import main
from diffperception.diffusion import scaled_linear_schedule
from diffperception.models import Condition, DiffusionModel, UNet
from diffperception.models.conditioners import ClassLabels
from diffperception.models.convert import diffusers
from diffperception.models.convert.diffusers import generator_from_folder, is_diffusers_folder, write_folder
from diffperception.models.convert.schedulers import path_arguments
from diffperception.models.convert.unet2d import ForeignLayoutError
from diffperception.models.space import Pixels
from diffperception.models.warm_start import warm_start
from tests.helpers.networks import conditional_generator, two_level_unet


def generator(**options: object) -> DiffusionModel:
    return DiffusionModel(None, two_level_unet(), **{"image_size": 8, **options})


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def change(path: Path, **options: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


PIPELINE = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def test_a_pipeline_is_written_where_diffusers_has_one(tmp_path):
    write_folder(generator(), tmp_path / "plain")
    assert written(tmp_path / "plain") == [".diffperception", *PIPELINE, WEIGHTS]
    write_folder(generator(schedule="flow", prediction="flow"), tmp_path / "flow")
    assert written(tmp_path / "flow") == [".diffperception", *PIPELINE[1:], WEIGHTS]
    write_folder(conditional_generator(), tmp_path / "classes")
    assert written(tmp_path / "classes") == [".diffperception", "classes.json", *PIPELINE[1:], WEIGHTS]
    assert json.loads((tmp_path / "classes/classes.json").read_text()) == {
        "classes": ["disc", "square"],
        "null_class": True,
    }
    assert all(map(is_diffusers_folder, (tmp_path / "plain", tmp_path / "flow" / "unet", tmp_path / "classes")))
    assert not any(map(is_diffusers_folder, (tmp_path, tmp_path / "absent", tmp_path / "plain" / "scheduler")))


def test_nothing_of_a_user_is_replaced_and_nothing_half_written_is_left(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        if overwrite:
            write_folder(generator(), tmp_path, overwrite)
        else:
            with pytest.raises(ValueError, match="is not empty"):
                write_folder(generator(), tmp_path, overwrite)
        assert (tmp_path / "mine.txt").read_text() == "mine"

    config = tmp_path / "unet" / "config.json"
    change(config, sample_size=16)
    with pytest.raises(ValueError, match="was changed since"):
        write_folder(generator(), tmp_path, overwrite=True)
    assert json.loads(config.read_text())["sample_size"] == 16

    def no_room(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers, "write_json", no_room)
    with pytest.raises(OSError, match="No space"):
        write_folder(generator(), tmp_path / "new")
    assert written(tmp_path / "new") == []


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda: two_level_unet(resampling="pool"), "resampling = pool"),
        (lambda: two_level_unet(channels=64, channel_mult=[0.5, 1]), r"channel_mult = \[0.5, 1\]"),
        (lambda: two_level_unet(num_heads=4, attention=[1, 2]), "num_heads = 4 where attention has 32 and 64 channels"),
        (lambda: generator(num_timesteps=4000, rescale_timesteps=True), "rescale_timesteps = true with num_tim"),
        (lambda: generator(space=Halved()), "space = Halved"),
        (lambda: generator(conditioner=Silent(["a"], 128)), "conditioner = Silent"),
        (lambda: DiffusionModel(None, Other(channels=32, channel_mult=[1], attention=[], num_heads=1)), "with a Other"),
    ],
    ids=["pool", "width", "heads", "times", "space", "conditioner", "network"],
)  # fmt: skip
def test_what_diffusers_cannot_say_is_refused_by_our_name(model, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        write_folder(model(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


class Halved(Pixels):
    """A space of its own."""


class Silent(ClassLabels):
    """A conditioner of its own."""

    def forward(self, said: torch.Tensor) -> Condition:
        return Condition(vector=0 * super().forward(said).vector)


class Other(UNet):
    """A network of its own."""


def test_times_told_as_they_are_anyway_are_no_obstacle(tmp_path):
    write_folder(generator(rescale_timesteps=True), tmp_path)
    assert generator_from_folder(tmp_path).schedule.levels([700]) == generator().schedule.levels([700])


def test_a_unet_alone_is_of_the_linear_schedule(tmp_path):
    write_folder(two_level_unet(), tmp_path / "pipeline")
    assert json.loads((tmp_path / "pipeline/scheduler/scheduler_config.json").read_text())["beta_end"] == 0.02
    (tmp_path / "pipeline" / "unet").rename(tmp_path / "net")
    model = generator_from_folder(tmp_path / "net")
    assert (model.arguments["schedule"], model.prediction) == ("linear", "eps")
    change(tmp_path / "net" / "config.json", sample_size=None)
    assert generator_from_folder(tmp_path / "net").image_size == (256, 256)
    assert generator_from_folder(tmp_path / "net", image_size=32).image_size == (32, 32)


def test_the_scheduler_beside_a_unets_folder_counts(tmp_path, monkeypatch):
    write_folder(generator(schedule="cosine"), tmp_path)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "unet", Path("unet"), "."):
        assert generator_from_folder(folder).arguments["schedule"] == "cosine"
    monkeypatch.chdir(tmp_path / "unet")
    assert generator_from_folder(".").arguments["schedule"] == "cosine"


def test_what_was_noted_of_our_unet_gives_way_to_diffusers_options(tmp_path):
    write_folder(two_level_unet(num_heads=2, num_head_channels=16, checkpointing=True), tmp_path)
    assert generator_from_folder(tmp_path).network.arguments["num_heads"] == 2
    change(tmp_path / "unet/config.json", attention_head_dim=16)
    network = generator_from_folder(tmp_path).network
    assert (network.arguments["num_heads"], network.arguments["num_head_channels"]) == (None, 16)
    assert network.middle[1].num_heads == 4
    for noted in ({"num_heads": 7}, {"num_heads": "2"}, [1]):
        change(tmp_path / "unet/config.json", _diffperception=noted)
        assert generator_from_folder(tmp_path).network.middle[1].num_heads == 4


def test_classes_of_a_folder_of_diffusers_own_are_numbered_or_named(tmp_path):
    write_folder(conditional_generator(null_class=False), tmp_path)
    (tmp_path / "classes.json").unlink()
    assert generator_from_folder(tmp_path).classes == ["0", "1"]
    assert generator_from_folder(tmp_path, ["a", "b"]).classes == ["a", "b"]
    with pytest.raises(ValueError, match="3 class names are given for a checkpoint with 2 classes"):
        generator_from_folder(tmp_path, ["a", "b", "c"])


def test_training_starts_from_a_folder_as_from_a_file(tmp_path):
    write_folder(given := conditional_generator(), tmp_path)
    model = DiffusionModel(["square", "ring"], two_level_unet(norm_eps=1e-3), image_size=8)
    report = warm_start(model, tmp_path)
    assert torch.equal(model.network.stem.weight, given.network.stem.weight)
    assert (report.classes, report.new_classes) == ({"square": "square"}, ["ring"])
    assert "network.norm_eps 1e-05 (here 0.001)" in report.settings


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    write_folder(generator(), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Harmful()}, (tmp_path / WEIGHTS).with_suffix(".bin"))
    with pytest.raises(ValueError, match="holds more than weights"):
        generator_from_folder(tmp_path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("file", "options", "complaint"),
    [
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "of the class UNet2DConditionModel"),
        ("unet/config.json", {"block_out_channels": "32"}, 'block_out_channels = "32" is no value'),
        ("unet/config.json", {"block_out_channels": [32, 0]}, r"block_out_channels = \[32, 0\] is no value"),
        ("unet/config.json", {"block_out_channels": [32]}, "not of as many levels"),
        ("unet/config.json", {"norm_num_groups": None}, "norm_num_groups = null is no value"),
        ("unet/config.json", {"norm_num_groups": 20}, "attn_norm_num_groups = 32, only norm_num_groups, 20"),
        ("unet/config.json", {"sample_size": "8"}, 'sample_size = "8" is no value'),
        ("unet/config.json", {"dropout": -1}, "dropout = -1 is no value"),
        ("unet/config.json", {"norm_eps": float("inf")}, "norm_eps = Infinity is no value"),
        ("unet/config.json", {"attention_head_dim": True}, "attention_head_dim = true is no value"),
        ("unet/config.json", {"in_channels": 10**18}, f"in_channels = {10**18} is no value"),
        ("unet/config.json", {"act_fn": {"silu": 1}}, 'act_fn = {"silu": 1} is no value'),
        ("unet/config.json", {"time_embedding_type": ["positional"]}, r'time_embedding_type = \["positional"\] is no'),
        ("unet/config.json", {"mid_block_scale_factor": "1"}, 'mid_block_scale_factor = "1" is no value'),
        ("unet/config.json", {"layers_per_block": 0}, "num_res_blocks must be above 0"),
        ("unet/config.json", {"layers_per_block": 2}, "down_blocks.0.resnets.1"),
        ("unet/config.json", {"num_class_embeds": 3}, "num_class_embeds = 3"),
        ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "names vqvae"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "laplace"}, 'beta_schedule = "laplace"'),
        ("scheduler/scheduler_config.json", {"prediction_type": "other"}, 'prediction_type = "other"'),
        ("scheduler/scheduler_config.json", {"timestep_type": "continuous"}, 'timestep_type = "continuous"'),
        ("scheduler/scheduler_config.json", {"trained_betas": [1.1]}, "beta of a schedule must lie strictly between"),
        ("scheduler/scheduler_config.json", {"trained_betas": "a"}, 'trained_betas = "a"'),
        ("scheduler/scheduler_config.json", {"beta_end": "0.02"}, 'beta_end = "0.02"'),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps = 0"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": True}, "num_train_timesteps = true"),
        ("scheduler/scheduler_config.json", {"beta_start": [0.1]}, r"beta_start = \[0.1\]"),
        ("scheduler/scheduler_config.json", {"beta_schedule": ["linear"]}, r'beta_schedule = \["linear"\]'),
        ("scheduler/scheduler_config.json", {"prediction_type": ["epsilon"]}, r'prediction_type = \["epsilon"\]'),
        ("scheduler/scheduler_config.json", {"trained_betas": 0.1}, "trained_betas = 0.1"),
        ("scheduler/scheduler_config.json", {"trained_betas": []}, r"trained_betas = \[\]"),
        ("scheduler/scheduler_config.json", {"trained_betas": ["0.1"] * 99}, r"trained_betas = .{,100} \.\.\. is"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow_sigmas = true"),
        ("scheduler/scheduler_config.json", {"snr_shift_scale": 3.0}, "snr_shift_scale = 3.0"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
         "invert_sigmas = true"),
        ("scheduler/scheduler_config.json", {"variance_type": "learned"}, 'variance_type = "learned"'),
    ],
)  # fmt: skip
def test_a_file_that_is_not_ours_to_read_is_named_with_the_option(file, options, complaint, tmp_path):
    write_folder(generator(), tmp_path)
    change(tmp_path / file, **options)
    with pytest.raises(ValueError, match=complaint) as caught:
        generator_from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_unet_beside_an_autoencoder_is_not_of_pixels(tmp_path):
    write_folder(generator(), tmp_path)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "vae").mkdir()
    for folder in (tmp_path, tmp_path / "unet"):
        with pytest.raises(ForeignLayoutError, match="vae"):
            generator_from_folder(folder)


def test_missing_and_broken_files_are_named(tmp_path):
    write_folder(generator(), tmp_path)
    (tmp_path / "unet/config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        generator_from_folder(tmp_path)
    (tmp_path / "unet/config.json").write_text("{")
    with pytest.raises(ValueError, match="is not a JSON file"):
        generator_from_folder(tmp_path)
    (tmp_path / "unet/config.json").unlink()
    with pytest.raises(ForeignLayoutError, match=r"has no unet/config.json"):
        generator_from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        generator_from_folder(tmp_path / "absent")
    write_folder(generator(), tmp_path / "other")
    (tmp_path / "other" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="there are no weights"):
        generator_from_folder(tmp_path / "other")
    (tmp_path / "other/unet/diffusion_pytorch_model.ema.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"is expected, instead of diffusion_pytorch_model\.ema\.safetensors"):
        generator_from_folder(tmp_path / "other")
    (tmp_path / "other/scheduler/scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not a JSON file") as caught:
        generator_from_folder(tmp_path / "other")
    assert str(caught.value).count("other") == 1


@pytest.mark.parametrize(
    ("scheduler", "arguments"),
    [
        ({"beta_schedule": "linear"}, {"schedule": "linear", "num_timesteps": 1000, "prediction": "eps"}),
        (
            {"beta_schedule": "scaled_linear", "beta_end": 0.1, "num_train_timesteps": 50, "prediction_type": "sample"},
            {"schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.1, "num_timesteps": 50, "prediction": "x0"},
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, {"schedule": "flow", "prediction": "flow"}),
        (
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "beta_schedule": "linear"},
            {"schedule": "flow", "prediction": "flow"},
        ),
    ],
)  # fmt: skip
def test_a_schedulers_path_and_prediction_become_arguments(scheduler, arguments):
    assert path_arguments(scheduler) == arguments


def test_sigmoid_betas_run_between_their_bounds():
    path = path_arguments({"beta_schedule": "sigmoid", "num_train_timesteps": 101, "prediction_type": "sample"})
    assert (path["schedule"], path["prediction"], path["num_timesteps"]) == ("betas", "x0", 101)
    assert path["betas"][50] == pytest.approx((1e-4 + 0.02) / 2)
    assert path["betas"] == sorted(path["betas"])


def test_the_roots_of_scaled_linear_betas_are_even():
    alphas = scaled_linear_schedule(1000, 0.00085, 0.012).alpha(torch.arange(-1, 1000)).square()
    roots = (1 - alphas[1:] / alphas[:-1]).sqrt()
    assert roots[[0, -1]].square().tolist() == pytest.approx([0.00085, 0.012])
    assert torch.allclose(roots.diff(), roots.diff().mean(), atol=1e-9)


def run(*options: object) -> int:
    return main(["convert", *map(str, options)])


def test_the_command_writes_folders_and_says_what_to_do_instead(tmp_path, capsys):
    conditional_generator().save(tmp_path / "model.safetensors")
    command = ["--checkpoint", tmp_path / "model.safetensors", "--output", tmp_path / "out"]
    assert run(*command) == 2
    assert "give --to diffusers" in capsys.readouterr().err
    assert run(*command, "--to", "diffusers", "--image-size", "32") == 2
    assert "option image_size" in capsys.readouterr().err
    assert run(*command, "--to", "diffusers") == 0
    assert "2 classes (disc, square)" in capsys.readouterr().out
    assert run(*command, "--to", "diffusers") == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert run(*command, "--to", "diffusers", "--overwrite") == 0

    (tmp_path / "around").mkdir()
    (tmp_path / "out").rename(tmp_path / "around" / "out")
    assert run("--checkpoint", tmp_path / "around", "--output", tmp_path / "around.safetensors") == 2
    assert f"a folder around the folder of diffusers {tmp_path / 'around' / 'out'}" in capsys.readouterr().err
    (tmp_path / "around" / "out").rename(tmp_path / "out")
    for part in (WEIGHTS, "unet/config.json"):
        assert run("--checkpoint", tmp_path / "out" / part, "--output", tmp_path / "part.safetensors") == 2
        assert f"name the folder, {tmp_path / 'out' / 'unet'}" in capsys.readouterr().err
    assert run("--checkpoint", "google/ddpm-cat-256", "--output", tmp_path / "cat.safetensors") == 2
    assert "`hf download google/ddpm-cat-256 --local-dir FOLDER` fetches it" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    back = ["--checkpoint", tmp_path / "out", "--output", tmp_path / "back.safetensors"]
    assert run(*back, "--schedule", "cosine") == 2
    assert "option schedule" in capsys.readouterr().err
    assert run(*back, "--annotations", tmp_path / "names.txt", "--image-size", "16") == 0
    assert "assumed" not in capsys.readouterr().out
    model = DiffusionModel.load(tmp_path / "back.safetensors")
    assert (model.classes, model.image_size, model.has_absent) == (["cat", "dog"], (16, 16), True)
    ours = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
    (tmp_path / "out" / "unet").rename(tmp_path / "alone")
    assert run("--checkpoint", tmp_path / "alone", "--output", tmp_path / "alone.safetensors") == 0
    assert "assumed, as there is no scheduler with it" in capsys.readouterr().out
