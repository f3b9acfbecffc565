"""Our generators in diffusers, and its UNet2DModel in ours, held to what diffusers itself computes."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip("diffusers")

from diffusers import (  # noqa: E402
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from diffperception.cli.main import main  # noqa: E402
from diffperception.diffusion import clip, sample_ddim  # noqa: E402
from diffperception.models import DiffusionModel, UNet  # noqa: E402
from diffperception.models.convert.diffusers import generator_from_folder, is_diffusers_folder, write_folder  # noqa: E402
from tests.parity import FOLDER, arrays, distance, fill_state, filled_state  # noqa: E402

TIMES = torch.tensor([0, 731])


def drawn(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with weights of which none is zero, so that no layer hides another."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        spread = 0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.data = noise * spread + (parameter.ndim == 1)
    return network.eval()


def generator(classes: list[str] | None = None, null_class: bool = False, **layout: object) -> DiffusionModel:
    sizes = {"channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention": [2], "num_head_channels": 16}
    unet = UNet(**(sizes | layout))  # type: ignore[arg-type]
    learned = unet.out_channels == 2 * unet.in_channels
    return drawn(DiffusionModel(classes, unet, image_size=16, learned_range=learned, null_class=null_class))


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 16, 24, generator=torch.Generator().manual_seed(1))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[1][n], v) for n, v in states[0].items())


def convert(checkpoint: Path, output: Path, *options: str) -> int:
    return main(["convert", "--checkpoint", str(checkpoint), "--output", str(output), *options])


# Ours in diffusers


@torch.no_grad()
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"resampling": "conv", "channel_mult": [1, 1, 2], "attention": [2, 4]},
        {"resampling": "conv", "scale_shift": False, "num_heads": 1, "channel_mult": [1, 2, 3]},
        {"scale_shift": False, "attention": [1, 2], "num_head_channels": 32, "num_res_blocks": 3},
        {"num_heads": 4},
        {"attention": [], "in_channels": 1, "channel_mult": [1, 1.5, 1.5], "channels": 64},
        {"out_channels": 6, "channel_mult": [1], "attention": [1], "resampling": "pool", "checkpointing": True},
        {"norm_groups": 4, "norm_eps": 1e-3, "frequency_shift": 1, "channels": 24, "num_head_channels": 12},
        {"one_sided_padding": True, "resampling": "conv", "channel_mult": [1, 2, 2]},
        {"classes": ["disc", "square"]},
        {"classes": ["disc", "square"], "null_class": True, "scale_shift": False, "resampling": "conv"},
    ],
    ids=lambda layout: " ".join(layout) or "default",
)
def test_each_layout_is_diffusers_and_returns_bit_for_bit(layout, tmp_path):
    model = generator(**layout)
    write_folder(model, tmp_path)
    network = UNet2DModel.from_pretrained(tmp_path, subfolder="unet").eval()
    x, labels = images(model.network.in_channels), None if model.classes is None else torch.tensor([1, 0])
    ours, theirs = model(x, TIMES, model.condition(labels)), network(x, TIMES, class_labels=labels).sample
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4

    back = generator_from_folder(tmp_path)
    assert same_weights(model, back)
    same = {"channels", "channel_mult", "num_heads", "num_head_channels", "checkpointing", "norm_groups", "scale_shift"}
    assert all(back.network.arguments[name] == model.network.arguments[name] for name in same)
    assert (back.classes, back.has_absent, back.learned_range) == (model.classes, model.has_absent, model.learned_range)
    assert torch.equal(back(x, TIMES, back.condition(labels)), ours)


def test_a_generator_returns_with_all_of_its_arguments(tmp_path):
    unet = UNet(3, None, 32, [1, 2], 1, [2], num_heads=4, dropout=0.1, checkpointing=True)
    paths = [
        {"schedule": "linear", "num_timesteps": 500, "beta_start": 1e-3, "beta_end": 0.03, "prediction": "v"},
        {"schedule": "linear", "num_timesteps": 400},
        {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction": "x0"},
        {"schedule": "betas", "num_timesteps": 3, "betas": [0.1, 0.2, 0.4]},
        {"schedule": "cosine", "num_timesteps": 4000, "image_size": [16, 24]},
        {"schedule": "flow", "prediction": "flow"},
    ]
    for number, path in enumerate(paths):
        for classes in (None, ["a b", "c"]):
            model = DiffusionModel(classes, unet, **{"image_size": 32, **path}, null_class=classes is not None)
            folder = tmp_path / f"{number} {classes}"
            write_folder(model, folder)
            back = generator_from_folder(folder)
            assert back.network.arguments == unet.arguments
            for name in model.arguments.keys() - {"network"}:
                assert back.arguments[name] == model.arguments[name] or name == "image_size"
            assert back.image_size == model.image_size


@torch.no_grad()
@pytest.mark.parametrize("learned_range", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_twenty_ddim_steps_of_the_pipeline_are_ours(schedule, prediction, learned_range, tmp_path):
    unet = UNet(3, 6 if learned_range else 3, 16, [1], 1, [1], num_head_channels=8, norm_groups=4)
    model = drawn(DiffusionModel(None, unet, None, None, schedule, 1000, prediction, learned_range, image_size=8))
    unet.out_conv.weight.data *= 0.3
    write_folder(model, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is DDPMPipeline
    times = torch.arange(1000)
    assert (model.schedule.alpha(times).square() - pipeline.scheduler.alphas_cumprod).abs().max() < 1e-6

    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = noise
    for t in scheduler.timesteps:
        output = pipeline.unet(theirs, t).sample[:, :3]
        theirs = scheduler.step(output, t, theirs, use_clipped_model_output=True).prev_sample
    ours = sample_ddim(clip(model.denoiser()), model.schedule, noise, model.schedule.grid(20))
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4
    if learned_range:
        drawn_image = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
        assert drawn_image.shape == (1, 8, 8, 3)


@torch.no_grad()
def test_ten_euler_steps_of_flow_are_ours(tmp_path):
    unet = UNet(3, None, 16, [1], 1, [1], num_head_channels=8, norm_groups=4)
    model = drawn(DiffusionModel(None, unet, schedule="flow", prediction="flow", image_size=8))
    write_folder(model, tmp_path)
    network = UNet2DModel.from_pretrained(tmp_path, subfolder="unet").eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = noise
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, t).sample, t, theirs).prev_sample
    ours = sample_ddim(model.denoiser(), model.schedule, noise, model.schedule.grid(10))
    assert (ours - noise).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


@torch.no_grad()
def test_a_guided_diffusion_checkpoint_becomes_a_folder_in_one_command(tmp_path, capsys):
    """diffusers' network of it computes what guided-diffusion itself computed."""
    torch.save(filled_state("adm_small"), tmp_path / "lsun.pt")
    options = ["--num-head-channels", "16", "--image-size", "64", "--to", "diffusers"]
    assert convert(tmp_path / "lsun.pt", tmp_path / "lsun", *options) == 0
    assert "DiffusionPipeline.from_pretrained" in capsys.readouterr().out
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "lsun")
    assert (pipeline.unet.config.sample_size, pipeline.scheduler.config.variance_type) == (64, "learned_range")
    parity = arrays("adm_small")
    assert distance(pipeline.unet.eval()(parity["x"], parity["t"]).sample, parity["out"]) < 1e-4

    shapes = json.loads((FOLDER / "adm_layouts_keys.json").read_text())["conv"]
    torch.save(fill_state({name: tuple(shape) for name, shape in shapes.items()}), tmp_path / "grey.pt")
    options = ["--num-heads", "4", "--new-attention-order", "--image-size", "[8, 20]", "--to", "diffusers"]
    assert convert(tmp_path / "grey.pt", tmp_path / "grey", *options) == 0
    assert "UNet2DModel.from_pretrained" in capsys.readouterr().out
    assert not (tmp_path / "grey" / "model_index.json").exists()
    network = UNet2DModel.from_pretrained(tmp_path / "grey" / "unet").eval()
    parity = arrays("adm_layouts")
    output = network(parity["conv_x"], torch.tensor([3.5, 800.25]), class_labels=torch.tensor([4, 0])).sample
    assert distance(output, parity["conv_out"]) < 1e-4


# diffusers' in ours

DDPM = {  # google/ddpm-*'s options, of narrower levels
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
LAYOUTS = {
    "ddpm-cat-256": DDPM,
    "ddpm-cifar10-32": {
        **DDPM,
        "block_out_channels": (32, 64, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "dropout": 0.1,
    },
    "tutorial": {
        "layers_per_block": 2,
        "block_out_channels": (32, 32, 64, 96),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    },
    "default": {"block_out_channels": (32, 64, 96, 128)},
    "groups of 2, one level": {
        "block_out_channels": (6,),
        "norm_num_groups": 2,
        "attention_head_dim": 3,
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
        "layers_per_block": 1,
        "in_channels": 1,
        "out_channels": 1,
    },
    "resnet": {
        "block_out_channels": (32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "attention_head_dim": 32,
        "num_class_embeds": 10,
        "act_fn": "swish",
        "out_channels": 6,
    },
}


def small(**options: object) -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return drawn(UNet2DModel(**{"block_out_channels": (32, 64), "sample_size": 16, **blocks, **options}))


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_unet2dmodel_computes_in_ours_what_it_computes_itself(name, tmp_path):
    network = drawn(UNet2DModel(**{"sample_size": 16, **LAYOUTS[name]}))
    network.save_pretrained(tmp_path)
    assert is_diffusers_folder(tmp_path)
    model = generator_from_folder(tmp_path)
    assert model.image_size == (16, 16)
    labels = None if network.config.num_class_embeds is None else torch.tensor([1, 7])
    x = images(network.config.in_channels)
    theirs = network(x, TIMES, class_labels=labels).sample
    assert theirs.std() > 0.1
    assert (model(x, TIMES, model.condition(labels)) - theirs).abs().max() < 1e-5 * max(1, float(theirs.abs().max()))


@torch.no_grad()
def test_what_old_versions_wrote_is_read(tmp_path):
    """google/ddpm-*: all files in one folder, a pickle of weights, attention under its first names."""
    network = drawn(UNet2DModel(sample_size=16, **LAYOUTS["ddpm-cat-256"]))
    DDPMPipeline(network, DDPMScheduler(variance_type="fixed_large")).save_pretrained(tmp_path / "new")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {
        re.sub(r"(attentions\.\d\.)(to_[qkv]|to_out\.0)", lambda match: match[1] + old[match[2]], name): value
        for name, value in network.state_dict().items()
    }
    assert any("proj_attn" in name for name in state)
    flat = tmp_path / "flat"
    flat.mkdir()
    torch.save(state, flat / "diffusion_pytorch_model.bin")
    for file in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        (flat / Path(file).name).write_text((tmp_path / "new" / file).read_text())
    config = json.loads((flat / "config.json").read_text())
    for name in ("num_class_embeds", "class_embed_type", "dropout", "attn_norm_num_groups", "add_attention"):
        del config[name]
    config["down_block_types"] = [f"UNetRes{name}" for name in config["down_block_types"]]
    (flat / "config.json").write_text(json.dumps(config))
    model = generator_from_folder(flat)
    assert same_weights(model, generator_from_folder(tmp_path / "new"))
    assert (model(images(), TIMES) - network(images(), TIMES).sample).abs().max() < 1e-5


def test_weights_in_several_files_and_in_half_precision_are_read(tmp_path):
    network = small()
    network.save_pretrained(tmp_path / "whole")
    network.save_pretrained(tmp_path / "split", max_shard_size="200KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    assert same_weights(generator_from_folder(tmp_path / "whole"), generator_from_folder(tmp_path / "split"))
    network.half().save_pretrained(tmp_path / "half", variant="fp16")
    network.save_pretrained(tmp_path / "half and split", variant="fp16", max_shard_size="100KB")
    for folder in ("half", "half and split"):
        half = generator_from_folder(tmp_path / folder)
        assert half.dtype == torch.float32
        assert torch.equal(half.network.stem.weight, network.conv_in.weight.float())


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_timesteps": 500},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "sample"},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        {"num_train_timesteps": 20, "beta_end": 0.3},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_schedulers_path_is_ours(kind, options, tmp_path):
    scheduler = getattr(diffusers, kind)(**options)
    small().save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    for folder in (tmp_path, tmp_path / "unet"):
        model = generator_from_folder(folder)
        squares = model.schedule.alpha(torch.arange(model.schedule.num_timesteps)).square()
        assert (squares - scheduler.alphas_cumprod).abs().max() < 1e-6
        assert {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[
            model.prediction
        ] == scheduler.config.prediction_type


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"time_embedding_type": "fourier"}, 'time_embedding_type = "fourier"'),
        ({"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 8}, "SkipDownBlock2D"),
        ({"act_fn": "mish"}, 'act_fn = "mish"'),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "up_block_types"),
        ({"center_input_sample": True}, "center_input_sample = true"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor = 2"),
        ({"add_attention": False}, "add_attention = false"),
        ({"mid_block_type": None}, "mid_block_type = null"),
        ({"class_embed_type": "timestep"}, 'class_embed_type = "timestep"'),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups = null"),
        ({"attn_norm_num_groups": 16}, "attn_norm_num_groups = 16"),
        ({"time_embedding_dim": 64}, "time_embedding_dim = 64"),
        ({"downsample_type": "resnet", "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
          "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D")}, "only one kind of resampling"),
        ({"attention_head_dim": 24}, "attention_head_dim = 24"),
        ({"in_channels": 6}, "in_channels = 6 and out_channels = 3"),
        ({"sample_size": 15}, "15"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_our_unet_lacks_is_refused_by_diffusers_name(options, complaint, tmp_path):
    UNet2DModel(**{**dict(small().config), **options}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        generator_from_folder(tmp_path)


@torch.no_grad()
def test_a_network_that_ours_cannot_be_is_named_and_run_by_diffusers(tmp_path, capsys):
    network = small(act_fn="mish", attention_head_dim=8)
    network.save_pretrained(tmp_path / "net")
    assert convert(tmp_path / "net", tmp_path / "model.safetensors") == 0
    said = capsys.readouterr().out
    assert 'act_fn = "mish", only "silu" or "swish": diffusers itself runs the network' in said
    assert "diffusers' UNet2DModel" in said
    (tmp_path / "net").rename(tmp_path / "gone")
    model = DiffusionModel.load(tmp_path / "model.safetensors")
    assert torch.equal(model(images(), TIMES), network(images(), TIMES).sample)
    assert convert(tmp_path / "gone", tmp_path / "other.safetensors", "--image-size", "32") == 2
    assert 'act_fn = "mish"' in capsys.readouterr().err
    assert convert(tmp_path / "model.safetensors", tmp_path / "back", "--to", "diffusers") == 2
    assert "diffusers has no DiffusionModel with a DiffusersNetwork" in capsys.readouterr().err


def test_a_folder_becomes_a_model_file_and_returns(tmp_path, capsys):
    DDPMPipeline(small(), DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "theirs")
    assert convert(tmp_path / "theirs", tmp_path / "model.safetensors") == 0
    assert "levels 32, 64 channels wide" in capsys.readouterr().out
    assert convert(tmp_path / "model.safetensors", tmp_path / "back", "--to", "diffusers") == 0
    ours, theirs = (load_file(tmp_path / n / "unet/diffusion_pytorch_model.safetensors") for n in ("back", "theirs"))
    assert all(torch.equal(ours[name], theirs[name]) for name in {**ours, **theirs})
    assert DiffusionPipeline.from_pretrained(tmp_path / "back").scheduler.config.prediction_type == "v_prediction"
    assert convert(tmp_path / "theirs", tmp_path / "again", "--to", "diffusers") == 2
    assert "is a folder of diffusers already" in capsys.readouterr().err


def test_damaged_weights_are_refused_in_diffusers_names(tmp_path, capsys):
    small().save_pretrained(tmp_path / "net")
    file = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["mid_block.attentions.0.to_q.weight"]
    state["conv_in.weight"] = state["conv_in.weight"][:, :2].contiguous()
    save_file(state, file)
    assert convert(tmp_path / "net", tmp_path / "model.safetensors") == 2
    said = capsys.readouterr().err
    assert "mid_block.attentions.0.to_q.weight" in said
    assert "conv_in.weight (32, 2, 3, 3) instead of (32, 3, 3, 3)" in said


@torch.no_grad()
def test_the_pages_programs_run_and_the_loop_draws_what_we_draw(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    section = page.split("### Our generators in diffusers, and its checkpoints in ours")[1].split("\n## ")[0]
    program, loop = (part.split("```")[0] for part in section.split("```python\n")[1:3])
    monkeypatch.chdir(tmp_path)
    unet = UNet(3, 6, 16, [1, 2], 1, [2], num_head_channels=8, norm_groups=4)
    plain = drawn(DiffusionModel(None, unet, learned_range=True, image_size=8))
    plain.save(tmp_path / "runs" / "mine" / "model.safetensors")
    exec(compile(program.replace("num_inference_steps=50", "num_inference_steps=2"), "integrations.md", "exec"), {})
    assert same_weights(DiffusionModel.load("theirs.safetensors"), plain)

    by_class = drawn(DiffusionModel(["disc", "square"], unet, learned_range=True, image_size=8))
    write_folder(by_class, "by_class")
    names: dict = {}
    exec(compile(loop, "integrations.md", "exec"), names)
    denoiser = clip(by_class.denoiser(names["labels"]))
    ours = sample_ddim(denoiser, by_class.schedule, names["noise"], by_class.schedule.grid(20))
    assert ours.std() > 0.1
    assert (ours - names["x"]).abs().max() < 1e-4
