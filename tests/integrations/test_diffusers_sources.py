"""Networks of diffusers as sources of features: tiny folders with random weights, nothing is downloaded."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers")

from diffperception.detection import DiffusionDet  # noqa: E402
from diffperception.models import ActivationReader, Model, UNetBackbone  # noqa: E402
from diffperception.models.base import describe  # noqa: E402
from diffperception.models.generator import load_generator  # noqa: E402
from diffperception.segmentation import DiffusionFeatures, PixelEnsemble, PixelSegmenter  # noqa: E402
from diffperception.training import FitOptions  # noqa: E402
from tests.integrations.diffusers_folders import (  # noqa: E402
    FLOW,
    NETWORKS,
    POOLED,
    WORD,
    autoencoder,
    network_of,
    write_pipeline,
)

READ = {  # modules to read of each family; the last of them ends early
    "unconditional": ["up_blocks.0.attentions.1", "mid_block", "down_blocks.0.resnets.0"],
    "sd": ["up_blocks.0", "mid_block", "up_blocks.0.resnets.1.conv1"],
    "sdxl": ["mid_block", "up_blocks.0.attentions.0"],
    "dit": ["transformer_blocks.1", "transformer_blocks.0.attn1"],
    "sd3": ["transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.1.attn"],
    "flux": ["single_transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.0.ff"],
    "pixart": ["transformer_blocks.1", "pos_embed"],
    "flat": ["up_blocks.0", "mid_block"],
}


SLOWER = ["sd3", "pixart", "unconditional"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("diffusers")
    return {family: write_pipeline(root / family, family) for family in NETWORKS}


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    """The embedding of a prompt of seven words."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("prompt") / "prompt.safetensors"
    save_file({"prompt_embeds": torch.randn(7, WORD), "pooled_prompt_embeds": torch.randn(POOLED)}, file)
    return file


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def call_of(family, network, x, t, condition):
    """A whole pass of a network, as its own pipeline calls it."""
    size = len(x)
    words, vector, labels = condition.tokens, condition.vector, condition.labels
    if family == "unconditional":
        return network(x, t, class_labels=labels)
    if family == "sd":
        return network(x, t, encoder_hidden_states=words)
    if family == "flat":
        places = [(i, j) for i in range(0, x.shape[2], 4) for j in range(x.shape[3])]
        columns = torch.cat([sample[None, :, i : i + 4, j : j + 1] for sample in x for i, j in places])
        return network(columns, t.repeat(len(columns) // size), words.repeat(len(columns) // size, 1, 1))
    if family == "sdxl":
        ids = torch.tensor([[32.0, 48, 0, 0, 32, 48]]).repeat(size, 1)
        return network(x, t, words, added_cond_kwargs={"text_embeds": vector, "time_ids": ids})
    if family == "dit":
        return network(x, timestep=t, class_labels=labels)
    if family == "sd3":
        return network(x, encoder_hidden_states=words, pooled_projections=vector, timestep=t)
    if family == "flux":
        height, width = x.shape[2] // 2, x.shape[3] // 2
        packed = x.view(size, -1, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5).reshape(size, height * width, -1)
        places = torch.zeros(height, width, 3)
        places[..., 1] += torch.arange(height)[:, None]
        places[..., 2] += torch.arange(width)
        told = {"encoder_hidden_states": words, "pooled_projections": vector}
        ids = {"img_ids": places.view(-1, 3), "txt_ids": torch.zeros(words.shape[1], 3)}
        return network(packed, timestep=t / 1000, **told, **ids)
    return network(x, words, timestep=t, added_cond_kwargs={"resolution": None, "aspect_ratio": None})


def whole_pass(family, network, modules, x, t, condition):
    """What modules give in a pass that nobody stops."""
    seen = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda m, a, output, name=name: seen.__setitem__(name, output)
        )
        for name in modules
    ]
    with suppress(RuntimeError):  # DiT puts the patches of squares alone together
        call_of(family, network, x, t, condition)
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in modules]


def image_part(output, cells):
    """The map of the image, however a module gives it."""
    parts = (
        [output] if isinstance(output, torch.Tensor) else [part for part in output if isinstance(part, torch.Tensor)]
    )
    number = cells[0] * cells[1]
    for part in parts:
        if part.ndim == 4:
            return part
        if part.shape[1] == number:
            return part.transpose(1, 2).reshape(len(part), -1, *cells)
    raise AssertionError


@pytest.mark.parametrize("family", NETWORKS)
def test_stopped_passes_of_eight_families_see_what_whole_ones_do_bit_for_bit(family, folders, prompt, images):
    read = load_generator(folders[family], named_blocks=True)
    if family not in ("unconditional", "dit"):
        read = read.told(prompt)
    assert read.network.architecture == NETWORKS[family][0]
    own = network_of(family)
    x = read.space.encode(images)
    t = torch.full((2,), 261.0)
    label = torch.tensor([1]) if family in ("unconditional", "dit") else None
    condition = read.condition(label).expand(2)
    after = last_module(read.network.network)
    calls = []
    hook = after.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        maps = read.activations(x, t, READ[family], condition)
        truth = whole_pass(family, own, READ[family], x, t, condition)
    hook.remove()
    assert not calls, "the pass went on to the end"
    info = read.info_of(READ[family])
    for m, output, about in zip(maps, truth, info, strict=True):
        cells = (32 // about.stride, 48 // about.stride)
        assert m.shape == (2, about.channels, *cells)  # as probed without weights
        if family == "flat":  # columns of four cells, in the order of the images
            output = output.view(2, 2, 12, -1, 4).permute(0, 3, 1, 4, 2).reshape(2, -1, 8, 12)
        assert torch.equal(m, image_part(output, cells))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in read.network.modules())


def last_module(network):
    """What a whole pass ends with."""
    names = ("conv_out", "proj_out_2", "proj_out")
    return next(getattr(network, name) for name in names if hasattr(network, name))


@pytest.fixture
def segmenter(folders, prompt):
    """A segmenter with random members on frozen features."""

    def make(**options):
        torch.manual_seed(0)
        features = DiffusionFeatures(folders["sd"], ["up_blocks.0", 4], [50, 261], prompt=prompt, **options)
        return PixelSegmenter(features, PixelEnsemble(features.channels, 3, 2), ["a", "b", "c"]).eval()

    return make


def test_a_segmenter_leaves_frozen_weights_in_their_folder(folders, segmenter, tmp_path, images):
    model = segmenter(attention=True)
    model.save(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 0.3 * (folders["sd"] / "unet").joinpath(
        "diffusion_pytorch_model.safetensors"
    ).stat().st_size
    loaded = PixelSegmenter.load(tmp_path / "model.safetensors")
    wanted, found = (m.segment(images[0], probabilities=True).probabilities for m in (model, loaded))
    assert torch.equal(wanted, found)
    assert describe(loaded) == describe(model)


def test_a_moved_folder_is_found_beside_the_file_or_where_it_is_said_to_be(folders, segmenter, tmp_path, images):
    folder = shutil.copytree(folders["sd"], tmp_path / "home" / "sd")
    features = DiffusionFeatures(folder, [2], [50])
    file = tmp_path / "out" / "features.safetensors"
    file.parent.mkdir()
    features.save(file)
    gone = shutil.move(folder, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"features.safetensors leaves out the frozen weights of its Diffusers"):
        Model.load(file)
    with pytest.raises(FileNotFoundError, match=r"there is no unet in .*elsewhere/unet: name the folder that holds it"):
        Model.load(file, weights=Path(gone) / "unet")
    wanted = features.maps(images[0]).maps[0]
    assert torch.equal(Model.load(file, weights=gone).maps(images[0]).maps[0], wanted)
    shutil.move(gone, tmp_path / "out" / "sd")
    assert torch.equal(Model.load(file).maps(images[0]).maps[0], wanted)


def test_other_weights_in_the_folder_are_refused(folders, tmp_path):
    file = tmp_path / "features.safetensors"
    DiffusionFeatures(shutil.copytree(folders["sd"], tmp_path / "sd"), [2], [50]).save(file)
    write_pipeline(tmp_path / "sd", "sd", seed=1)
    with pytest.raises(
        ValueError, match=r"was made with the frozen weights of a DiffusersNetwork .* holds others: name"
    ):
        Model.load(file)


ELSEWHERE = """
import sys
from pathlib import Path
import torch
from diffperception.cli.main import main
from diffperception.detection import DiffusionDet
from diffperception.segmentation import PixelSegmenter

place, images = Path(sys.argv[1]), torch.load(sys.argv[2])
masks = PixelSegmenter.load(place / "kept_segmenter.safetensors").segment(images[0], probabilities=True)
boxes = DiffusionDet.load(place / "kept_detector.safetensors").predict(list(images))
torch.save({"probabilities": masks.probabilities, "boxes": [found["boxes"] for found in boxes]}, "found.pt")
for name in ("left_segmenter", "left_detector"):
    print(main(["predict", "--model", f"{place / name}.safetensors", "--images", ".", "--output", name]))
"""


def test_files_of_segmenters_and_detectors_in_another_process_where_the_folder_is_gone(folders, tmp_path, images):
    """With kept weights they predict the same; without them a command ends in one sentence."""
    folder, place, home = shutil.copytree(folders["sd"], tmp_path / "sd"), tmp_path / "files", tmp_path / "home"
    place.mkdir()
    home.mkdir()
    for name, keep in (("kept", True), ("left", None)):
        torch.manual_seed(0)
        features = DiffusionFeatures(folder, ["up_blocks.0"], [50], keep_weights=keep)
        segmenter = PixelSegmenter(features, PixelEnsemble(features.channels, 3, 2), ["a", "b", "c"]).eval()
        segmenter.save(place / f"{name}_segmenter.safetensors")
        detector = detector_on(UNetBackbone(folder, ["mid_block", "up_blocks.1"], keep_weights=keep))
        detector.save(place / f"{name}_detector.safetensors")
    wanted = segmenter.segment(images[0], probabilities=True).probabilities, detector.predict(list(images))
    torch.save(images, place / "images.pt")
    shutil.rmtree(folder)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", ELSEWHERE, str(place), str(place / "images.pt")]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=True)
    found = torch.load(home / "found.pt")
    assert torch.equal(found["probabilities"], wanted[0])
    assert all(torch.equal(a, b["boxes"]) for a, b in zip(found["boxes"], wanted[1], strict=True))
    assert done.stdout.split() == ["2", "2"]
    sentences = [line for line in done.stderr.splitlines() if line.startswith("diffperception predict: ")]
    assert [
        f"{name}.safetensors leaves out the frozen weights of its" in line
        for name, line in zip(("left_segmenter", "left_detector"), sentences, strict=True)
    ] == [True, True]
    assert [path.name for path in home.iterdir()] == ["found.pt"], "nothing half-written"


def test_a_detector_on_words_loads_and_learns_with_its_folder(folders, tmp_path, images):
    torch.manual_seed(0)
    backbone = UNetBackbone(folders["sd"], ["mid_block", "up_blocks.1"])
    model = detector_on(backbone)
    model.save(tmp_path / "model.safetensors")
    loaded = DiffusionDet.load(tmp_path / "model.safetensors")
    for wanted, found in zip(model.predict(list(images)), loaded.predict(list(images)), strict=True):
        assert torch.equal(wanted["boxes"], found["boxes"])
    losses = model.train().loss(
        list(images), [{"boxes": torch.tensor([[2.0, 2, 20, 20]]), "labels": torch.tensor([0])}] * 2
    )
    sum(losses.values()).backward()
    assert all(p.grad is None for p in backbone.reader.parameters()), "frozen"
    assert all(p.grad is not None for p in backbone.norms.parameters())


def detector_on(backbone):
    """A small detector without training."""
    from functools import partial

    from diffperception.detection import DynamicHead

    head = partial(DynamicHead, width=32, stages=1, num_heads=2)
    return DiffusionDet(
        ["a"], backbone, head, num_boxes=8, min_size=None, max_size=None, strides=backbone.strides
    ).eval()


@pytest.mark.parametrize("family", ["sd3", "flux", "dit", "pixart"])
def test_a_transformer_is_a_pyramid_of_one_level(family, folders, images):
    backbone = UNetBackbone(folders[family], [1], 0.2 if family in FLOW else 50)
    assert backbone.strides == [8]
    assert detector_on(backbone).predict([images[0]])[0]["boxes"].shape[1] == 4


@pytest.mark.parametrize("family", ["sd", "flux", *(pytest.param(f, marks=pytest.mark.slow) for f in SLOWER)])
def test_fine_tuning_reaches_every_parameter_that_is_left_to_train(family, folders, prompt, images, tmp_path):
    name = {"flux": "single_transformer_blocks.0", "sd": "up_blocks.0", "unconditional": "up_blocks.0"}
    block = name.get(family, "transformer_blocks.1")
    told = {"label": 1} if family == "unconditional" else {"prompt": prompt}
    backbone = UNetBackbone(folders[family], [block], 0.2 if family in FLOW else 50, frozen=False, **told)
    sum(m.square().sum() for m in backbone.train()(2 * images - 1)).backward()
    network = backbone.reader.generator.network
    learned = {n for n, p in network.named_parameters() if p.requires_grad}
    assert learned == {n for n, p in network.named_parameters() if p.grad is not None}
    assert learned, "something is trained"
    assert len(learned) < len(list(network.parameters())), "what follows is not"
    assert not any(p.requires_grad for p in backbone.reader.generator.space.parameters())
    backbone.save(tmp_path / "backbone.safetensors")  # with the network's weights, which are others by now
    with torch.no_grad():
        next(network.parameters()).add_(1.0)
    backbone.save(tmp_path / "backbone.safetensors")
    loaded = Model.load(tmp_path / "backbone.safetensors")
    assert torch.equal(loaded(2 * images - 1)[0], backbone.eval()(2 * images - 1)[0])


@pytest.mark.slow
def test_a_pass_ends_early_inside_checkpointed_blocks_too(folders, prompt, images):
    grads = []
    for checkpointing in (False, True):
        backbone = UNetBackbone(folders["sd"], ["up_blocks.0"], frozen=False, prompt=prompt)
        if checkpointing:
            backbone.reader.generator.network.network.enable_gradient_checkpointing()
        backbone.train()(2 * images - 1)[0].square().sum().backward()
        grads.append([p.grad for p in backbone.reader.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))


def test_layers_are_numbered_from_the_image_on(folders):
    """As layer-wise learning rates and frozen stages want them."""
    number = UNetBackbone(folders["sd"], ["up_blocks.1"], frozen=False).layers()
    network = "reader.generator.network.network."
    order = ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "down_blocks.1.resnets.0.conv1.weight"]
    order += [
        "mid_block.resnets.0.conv1.weight",
        "up_blocks.0.resnets.0.conv1.weight",
        "up_blocks.1.resnets.1.conv2.weight",
    ]
    assert [number[network + name] for name in order] == list(range(6))
    assert number[network + "time_embedding.linear_1.weight"] == 0
    assert number["norms.0.weight"] == 5


def test_a_pass_within_a_pass_ends_alone(folders, images):
    reader = ActivationReader(folders["sd"], ["up_blocks.0"])
    within = []

    def read_once_more(module, args, output):
        if not within:
            within.append(None)
            within.append(reader(images)[0])

    with torch.no_grad():
        wanted = reader(images)[0]
        hook = reader.generator.network.network.mid_block.register_forward_hook(read_once_more)
        found = reader(images)[0]
    hook.remove()
    assert torch.equal(found, wanted)
    assert torch.equal(within[1], wanted)


def test_cross_attention_maps_sum_to_one_and_leave_the_output_as_it_was(folders, prompt, images):
    plain, words = (
        ActivationReader(load_generator(folders["sd"]).told(prompt), [1, 3], attention=a) for a in (False, True)
    )
    with torch.no_grad():
        maps, told = plain(images), words(images)
    assert all(torch.equal(a, b) for a, b in zip(maps, told[:2], strict=True))
    info = [(i.name, i.channels, i.stride) for i in words.info[2:]]
    assert info == [("t50 attention.2", 7, 8)]
    assert told[2].shape == (2, 7, 4, 6)
    assert torch.allclose(told[2].sum(1), torch.ones(2, 4, 6), atol=1e-6)
    assert float(told[2].std()) > 1e-3, "words differ"


def test_cross_attention_is_that_of_the_layers_before_the_end(folders, prompt, images):
    """Computed once more from what a processor of diffusers sees."""
    from diffusers.models.attention_processor import AttnProcessor

    seen = {}

    class Recording(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            heads = [
                attn.head_to_batch_dim(f(x))
                for f, x in ((attn.to_q, hidden_states), (attn.to_k, encoder_hidden_states))
            ]
            weights = (heads[0] @ heads[1].mT * attn.scale).softmax(-1)
            seen[len(seen)] = weights.view(2, -1, *weights.shape[1:]).mean(1)
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    reader = ActivationReader(load_generator(folders["sd"]).told(prompt), ["up_blocks.0"], attention=True)
    with torch.no_grad():
        found = reader(images)[1]
        network = reader.generator.network.network
        network.set_attn_processor(
            {name: Recording() if "attn2" in name else AttnProcessor() for name in network.attn_processors}
        )
        reader(images)
    assert len(seen) == 4  # one on the way down, one in the middle, two on the way up
    mean = torch.stack(list(seen.values())).mean(0)
    assert torch.allclose(found, mean.mT.unflatten(2, (4, 6)), atol=1e-6)


def test_times_are_those_that_the_network_is_told(folders, images):
    """The features of time 50 are not those of the fiftieth of a sampler's descending times."""
    scheduler = diffusers.DDIMScheduler.from_pretrained(folders["sd"], subfolder="scheduler")
    scheduler.set_timesteps(100)
    descending = int(scheduler.timesteps[50])
    times = []
    at = {}
    for t in (50, descending):
        reader = ActivationReader(folders["sd"], ["mid_block"], [t])
        hook = reader.generator.network.network.register_forward_pre_hook(
            lambda m, args: times.append(args[1].tolist())
        )
        with torch.no_grad():
            at[t] = reader(images)[0]
        hook.remove()
    assert times == [[50.0, 50.0], [float(descending)] * 2]
    assert descending != 50
    assert not torch.allclose(at[50], at[descending], atol=1e-3)


PATHS = {
    "linear": diffusers.DDPMScheduler(),
    "scaled": diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50),
    "trained": diffusers.EulerDiscreteScheduler(trained_betas=[0.1, 0.2, 0.05], num_train_timesteps=3),
    "sigmoid": diffusers.DDPMScheduler(beta_schedule="sigmoid", prediction_type="sample"),
    "ends in noise": diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths_are_those_of_the_schedulers(name, folders, tmp_path):
    scheduler = PATHS[name]
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    scheduler.save_pretrained(folder / "scheduler")
    model = load_generator(folder)
    t = torch.arange(len(scheduler.betas))
    assert torch.allclose(model.schedule.alpha(t).square().float(), scheduler.alphas_cumprod, atol=1e-6)
    assert model.prediction == {"sample": "x0", "v_prediction": "v"}.get(scheduler.config.prediction_type, "eps")


def test_the_shift_of_flow_matching_moves_no_level(folders):
    """It moves the times that a sampler takes: sigma is told times 1000 whatever it is."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folders["sd3"], subfolder="scheduler")
    scheduler.set_timesteps(7)
    schedule = load_generator(folders["sd3"]).schedule
    sigmas = scheduler.sigmas[:-1]
    assert torch.allclose(schedule.sigma(sigmas).float(), sigmas)
    assert torch.allclose(schedule.alpha(sigmas).float(), 1 - sigmas)
    assert torch.allclose(schedule.conditioning(sigmas), scheduler.timesteps)


AUTOENCODERS = {
    "kl": autoencoder(),
    "kl of other moments": autoencoder(latents_mean=[0.1, 0, 0, -1.0], latents_std=[1.0, 2, 3, 4]),
    "vq": diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=16,
    ),
    "tiny": diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_latents_are_the_autoencoders_scaled(name, folders, tmp_path, images):
    vae = AUTOENCODERS[name].eval()
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    shutil.rmtree(folder / "vae")
    vae.save_pretrained(folder / ("vqvae" if name == "vq" else "vae"))
    space = load_generator(folder).space
    with torch.no_grad():
        signal = space.encode(images)
        found = vae.encode(2 * images - 1)
        codes = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        mean, spread = (
            getattr(vae.config, n, None) or [d] * 4 for n, d in (("latents_mean", 0.0), ("latents_std", 1.0))
        )
        shift = torch.tensor(mean).view(4, 1, 1) if name != "kl" else vae.config.shift_factor
        wanted = (codes - shift) / torch.tensor(spread).view(4, 1, 1) * vae.config.scaling_factor
        assert torch.allclose(signal, wanted, atol=1e-6)
        assert signal.shape == (2, 4, 32 // space.stride, 48 // space.stride)
        assert torch.allclose(space.expand(signal), vae.decode(codes).sample, atol=1e-5)


def test_older_names_and_forms_of_files_are_read(folders, tmp_path, images):
    """What the hub holds: shards, half precision alone, pickles, a network's own folder, Transformer2DModel."""
    network = network_of("dit")
    wanted = ActivationReader(folders["dit"], [1], label=0)(images)[0]

    def folder(name):
        return shutil.copytree(folders["dit"], tmp_path / name, ignore=shutil.ignore_patterns("transformer"))

    shards = folder("shards")
    network.save_pretrained(shards / "transformer", max_shard_size="50KB")
    assert len(list((shards / "transformer").glob("*-of-*.safetensors"))) > 1
    pickled = folder("pickled")
    network.save_pretrained(pickled / "transformer", safe_serialization=False)
    renamed = shutil.copytree(folders["dit"], tmp_path / "renamed")
    config = json.loads((renamed / "transformer" / "config.json").read_text())
    (renamed / "transformer" / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    for place in (shards, pickled, renamed, folders["dit"] / "transformer"):
        assert torch.equal(ActivationReader(place, [1], label=0)(images)[0], wanted), place
    in_file = ActivationReader(pickled, [1], label=0)  # a file must not name a pickle, and so holds what was in it
    assert not in_file.generator.network.leaves_weights
    assert in_file.generator.space.leaves_weights
    half = folder("half")
    network.half().save_pretrained(half / "transformer", variant="fp16")
    halves = folder("halves")
    network.save_pretrained(halves / "transformer", variant="fp16", max_shard_size="50KB")
    for place in (half, halves):
        assert torch.allclose(ActivationReader(place, [1], label=0)(images)[0], wanted, atol=0.05)


def test_deprecated_pipelines_are_read_by_component(folders, tmp_path, images, prompt):
    """AltDiffusion and Versatile Diffusion, whose pipelines diffusers no longer makes of their folders."""
    alt = shutil.copytree(folders["sd"], tmp_path / "alt")
    part = ["alt_diffusion", "RobertaSeriesModelWithTransformation"]
    (alt / "model_index.json").write_text(json.dumps({"_class_name": "AltDiffusionPipeline", "text_encoder": part}))
    versatile = shutil.copytree(alt, tmp_path / "versatile")
    (versatile / "model_index.json").write_text(json.dumps({"_class_name": "VersatileDiffusionPipeline"}))
    (versatile / "unet").rename(versatile / "image_unet")
    shutil.copytree(folders["flat"] / "unet", versatile / "text_unet")
    wanted = ActivationReader(load_generator(folders["sd"]).told(prompt), [1])(images)[0]
    for place in (alt, alt / "unet", versatile, versatile / "image_unet"):
        assert torch.equal(ActivationReader(load_generator(place).told(prompt), [1])(images)[0], wanted), place
    flat = load_generator(versatile / "text_unet")
    assert flat.network.architecture == "UNetFlatConditionModel"
    assert ActivationReader(flat, ["mid_block"])(images)[0].shape == (2, 32, 8, 12)


def changed(folder, tmp_path, part, **config):
    """A copy of a folder whose component's config says something else."""
    place = shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True)
    file = place / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return place


def rewritten(folder, tmp_path, file, text):
    """A copy of a folder with a file that says something else."""
    place = shutil.copytree(folder, tmp_path / "rewritten")
    (place / file).write_text(text)
    return place


MISTAKES = {
    "a repository": (
        lambda f, p: "stabilityai/sd-turbo",
        r"nothing is downloaded here: .* `hf download stabilityai/sd-t",
    ),
    "an empty folder": (
        lambda f, p: p,
        r"no folder of diffusers with a network \(unet, .*: it is empty; name such a folder",
    ),
    "no autoencoder": (
        lambda f, p: shutil.copytree(f["sd"] / "unet", p / "unet"),
        r"the UNet2DConditionModel in .* sees latents of 4 channels, and there is no vae beside it: name the folder",
    ),
    "another network": (
        lambda f, p: changed(f["sd"], p, "unet", _class_name="UNet3DConditionModel"),
        r"unet holds a UNet3DConditionModel, which is not run here: that is UNet2DModel, UNet2DCond",
    ),
    "quantized": (
        lambda f, p: changed(f["sd"], p, "unet", quantization_config={"quant_method": "gguf"}),
        r"unet holds quantized weights \(quantization_config\), which are not run: fetch full ones",
    ),
    "an index that is none": (
        lambda f, p: rewritten(f["dit"], p, "model_index.json", "[]"),
        r"model_index.json is no configuration of diffusers: it must be a JSON object",
    ),
    "another autoencoder": (
        lambda f, p: changed(f["sd"], p, "vae", _class_name="AutoencoderDC"),
        r"AutoencoderDC is no autoencoder that is run here: these are AutoencoderKL",
    ),
    "no class": (
        lambda f, p: changed(f["sd"], p, "unet", _class_name=None),
        r"config.json names no class of diffusers",
    ),
    "inpainting": (
        lambda f, p: write_pipeline(p / "in", "sd", in_channels=9),
        r"takes 9 channels and gives 4, but of an image there are 4: networks that fill in",
    ),
    "images in place of words": (
        lambda f, p: changed(f["sd"], p, "unet", encoder_hid_dim_type="image_proj"),
        r"it is told images in place of words \(encoder_hid_dim_type image_proj\)",
    ),
    "another path": (
        lambda f, p: changed(f["sd"], p, "scheduler", beta_schedule="other"),
        r"""scheduler_config.json: the scheduler's beta_schedule = "other" is not ours, only "linear\"""",
    ),
    "a path that is a list": (
        lambda f, p: rewritten(f["sd"], p, "scheduler/scheduler_config.json", "[1]"),
        r"scheduler_config.json is no configuration of diffusers: it must be a JSON object",
    ),
    "weights of another network": (
        lambda f, p: changed(f["sd"], p, "unet", block_out_channels=[32, 96]),
        r"diffusers does not read the weights in .*unet \(",
    ),
    "too few weights": (
        lambda f, p: without_one(shutil.copytree(f["sd"], p / "few")),
        r"does not fit its config.json: 1 name is missing or left over \(conv_in.bias\): fetch both again",
    ),
    "cut short": (
        lambda f, p: cut(shutil.copytree(f["sd"], p / "cut")),
        r"diffusers does not read the weights in .*unet",
    ),
    "no weights": (
        lambda f, p: shutil.copytree(f["sd"], p / "none", ignore=shutil.ignore_patterns("*.safetensors")),
        r"vae holds no weights of diffusers \(diffusion_pytorch_model.safetensors\), only config.json: fetch them too",
    ),
}


def without_one(folder):
    """The folder, without one of the network's weights."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "conv_in.bias"}, file)
    return folder


def cut(folder):
    """The folder, with half of the network's weights."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_folder_is_one_sentence(mistake, folders, tmp_path):
    make, complaint = MISTAKES[mistake]
    with pytest.raises((ValueError, FileNotFoundError), match=complaint) as error:
        load_generator(make(folders, tmp_path))
    assert "\n" not in str(error.value)


WRONG = {
    "near names": (
        {"blocks": ["up_block.1"]},
        r"UNet2DConditionModel has no module up_block.1; there are up_blocks.1,",
    ),
    "no map": ({"blocks": ["time_embedding"]}, r"has no map of the image in time_embedding; there are"),
    "a number": ({"blocks": [5]}, r"UNet2DConditionModel has no block 5; it has, in cells, stride 2: 0, 1; stride 1"),
    "a time": ({"timesteps": [1000]}, r"timesteps \[1000\] lie outside of this path: its times are whole, 0 to 999"),
    "a label": ({"label": 1}, r"trained without classes: leave labels out"),
    "attention": ({"blocks": ["down_blocks.0"], "attention": True}, r"up to the last of the blocks, attends to words"),
    "attention's stride": ({"blocks": ["attention.16"]}, r"attends to words at stride 16: attention.16"),
    "a text": ({"prompt": "a cell"}, r"no text encoder beside this UNet2DConditionModel to embed 'a cell': give the"),
    "nowhere to leave weights": (
        {"keep_weights": False, "model": True},
        r"needs the file or folder that the generator",
    ),
    "attention to nothing": (
        {"attention": True},
        r"attention needs words, for zeros are all attended to alike: give a",
    ),
    "no prompt": ({"prompt": "none.safetensors"}, r"there is no file none.safetensors with a prompt's embedding"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_option_is_one_sentence(mistake, folders):
    options, complaint = dict(WRONG[mistake][0]), WRONG[mistake][1]
    source = load_generator(folders["sd"], keep_weights=True) if options.pop("model", False) else folders["sd"]
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        DiffusionFeatures(source, **{"blocks": [1], "timesteps": [50]} | options)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        (
            {"prompt_embeds": torch.zeros(7, 8)},
            r"prompt_embeds is \(1, 7, 8\), but this UNet2DCond.* takes words 24 wide",
        ),
        ({"words": torch.zeros(7, 24)}, r"has no tensor prompt_embeds \(words, width\), but words"),
        (
            {"prompt_embeds": torch.full((7, 24), torch.nan)},
            r"the prompt: not all numbers are finite: embed the prompt",
        ),
        (
            {"prompt_embeds": torch.zeros(7, 24), "prompt_attention_mask": torch.ones(6)},
            r"prompt_attention_mask has 6 numbers for 7 words",
        ),
    ],
)
def test_a_prompt_of_another_width_is_one_sentence(tensors, complaint, folders):
    with pytest.raises(ValueError, match=complaint):
        load_generator(folders["sd"]).told(tensors)


def test_texts_are_embedded_as_the_pipeline_does(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        "a</w>",
        "red</w>",
        "cell</w>",
        *"aredcl",
        *(f"{c}</w>" for c in "edcl"),
    ]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(dict.fromkeys(words))}, merges=[])
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder / "tokenizer")
    layout = {"hidden_size": WORD, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=len(tokenizer), eos_token_id=1, **layout)
    )
    encoder.eval().save_pretrained(folder / "text_encoder")
    parts = {"vae": autoencoder(), "unet": network_of("sd"), "scheduler": diffusers.DDIMScheduler()}
    pipeline = diffusers.StableDiffusionPipeline(
        **parts, text_encoder=encoder, tokenizer=tokenizer, safety_checker=None, feature_extractor=None
    )
    wanted = pipeline.encode_prompt("a red cell", "cpu", 1, False)[0]
    assert torch.equal(load_generator(folder, prompt="a red cell").conditioner.tokens, wanted)
    assert not torch.equal(load_generator(folder, prompt="a cell").conditioner.tokens, wanted)


def test_images_of_another_size_are_one_sentence(folders):
    model = load_generator(folders["sd3"])
    with pytest.raises(ValueError, match=r"sides are multiples of 8 pixels, not 32 x 36"):
        model.signal_shape(32, 36)
    with pytest.raises(ValueError, match=r"at most 128 pixels a side, not 136 x 32: cut them into windows"):
        model.signal_shape(136, 32)


def test_masked_words_do_not_count(folders, images):
    torch.manual_seed(4)
    words = torch.randn(5, WORD)
    model = load_generator(folders["pixart"])
    mask = torch.tensor([1, 1, 1, 0, 0])
    few, masked, all_words = (
        ActivationReader(model.told(told), [2])(images)[0]
        for told in (
            {"prompt_embeds": words[:3]},
            {"prompt_embeds": words, "prompt_attention_mask": mask},
            {"prompt_embeds": words},
        )
    )
    assert torch.allclose(few, masked, atol=1e-5)
    assert not torch.allclose(few, all_words, atol=1e-3)


def test_without_diffusers_its_folders_and_files_on_them_say_what_to_install(folders, tmp_path, monkeypatch):
    DiffusionFeatures(folders["sd"], [1], [50]).save(tmp_path / "features.safetensors")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "diffusers" else found(name, *a))
    for load, source in ((load_generator, folders["sd"]), (Model.load, tmp_path / "features.safetensors")):
        with pytest.raises(ImportError, match=r"needs diffusers, which is not installed: `pip install diffusers`"):
            load(source)
    assert load_generator(folders["unconditional"]).network.in_channels == 3  # a UNet of ours needs none


def test_a_model_file_names_no_pickle(folders, tmp_path):
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    DiffusionFeatures(folder, [1], [50]).save(tmp_path / "features.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    network_of("sd").save_pretrained(folder / "unet", safe_serialization=False)
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model.bin is a pickle: save it as safetensors"):
        Model.load(tmp_path / "features.safetensors")


def test_a_model_file_chooses_no_folder_and_no_prompt(folders, prompt, tmp_path):
    features = DiffusionFeatures(folders["sd"], [1], [50])
    for name, place in (("generator", str(folders["sd"])), ("prompt", str(prompt))):
        features.arguments[name] = place
        features.save(tmp_path / "made.safetensors")
        with pytest.raises(
            ValueError, match=r"made.safetensors names the file .*, but a model file holds all of its parts"
        ):
            Model.load(tmp_path / "made.safetensors")


def test_frozen_weights_of_our_own_generators_can_stay_in_their_file_too(tmp_path, images):
    from tests.helpers.networks import tiny_unet

    torch.manual_seed(0)
    tiny_unet().save(tmp_path / "unet.safetensors")
    small, whole = (
        DiffusionFeatures(tmp_path / "unet.safetensors", [0, 1], [50], keep_weights=keep) for keep in (False, None)
    )
    small.save(tmp_path / "small.safetensors")
    whole.save(tmp_path / "whole.safetensors")
    assert set(small.state_dict()) == {"reader.noise", "reader.generator.network.weights_elsewhere"}
    for file in ("small", "whole"):
        found = Model.load(tmp_path / f"{file}.safetensors").maps(images[0]).maps
        assert all(torch.equal(a, b) for a, b in zip(found, whole.maps(images[0]).maps, strict=True))


def test_checkpoints_of_any_trainer_hold_a_number_of_the_frozen_weights(folders, tmp_path):
    backbone = UNetBackbone(folders["sd"], [1])
    state = backbone.state_dict()
    assert sum(value.numel() for value in state.values()) < 0.1 * sum(p.numel() for p in backbone.parameters())
    backbone.load_state_dict(state)
    other = UNetBackbone(write_pipeline(tmp_path / "other", "sd", seed=1), [1])
    with pytest.raises(RuntimeError, match=r"made with other frozen weights than those in .*other"):
        other.load_state_dict(state)


def test_averages_share_frozen_weights(folders):
    backbone = UNetBackbone(folders["sd"], [1])
    other = copy.deepcopy(backbone)
    tensors = [list(b.reader.generator.network.parameters()) for b in (backbone, other)]
    assert all(a is b for a, b in zip(*tensors, strict=True))
    assert all(a is not b for a, b in zip(backbone.norms.parameters(), other.norms.parameters(), strict=True))
    tuned = UNetBackbone(folders["sd"], [1], frozen=False)
    assert not {id(p) for p in tuned.parameters()} & {id(p) for p in copy.deepcopy(tuned).parameters()} - {
        id(p) for p in tuned.reader.generator.space.parameters()
    }


def test_half_precision(folders, prompt, images, tmp_path):
    model = load_generator(folders["sd"]).told(prompt)
    DiffusionFeatures(model, [1], [50], attention=True).save(tmp_path / "f.safetensors")
    full, half = (Model.load(tmp_path / "f.safetensors", dtype=t) for t in (torch.float32, torch.bfloat16))
    for a, b in zip(full.maps(images[0]).maps, half.maps(images[0]).maps, strict=True):
        assert b.dtype == torch.float32
        assert torch.allclose(a, b, atol=0.1)


def test_the_pages_program_runs(folders, tmp_path, monkeypatch):
    """On another folder and other pictures, with fewer minibatches and a small detector."""
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    program = page.split("### Its networks as sources of features")[1].split("```python\n")[1].split("```")[0]
    for part in ("train", "masks/train"):
        (tmp_path / part).mkdir(parents=True)
    for name in ("a.png", "b.png"):
        pixels = torch.randint(0, 255, (32, 48, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "train" / name)
        Image.fromarray((pixels[..., 0] > 128).byte().numpy()).save(tmp_path / "masks" / "train" / name)
    changes = {
        '"sd15"': f'"{folders["sd"]}"',
        "data/scenes": str(tmp_path),
        "DATA.classes)": "DATA.classes, 2, FitOptions(max_minibatches=20))",
        '["up_blocks.2", "up_blocks.1", "up_blocks.0"]': '["up_blocks.1", "mid_block"]',
        "strides=backbone.strides)": "strides=backbone.strides, min_size=None, num_boxes=8)",
    }
    for before, after in changes.items():
        assert before in program
        program = program.replace(before, after)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    said: list[str] = []
    names = {"__name__": "__main__", "print": lambda *words: said.append(str(words[0])), "FitOptions": FitOptions}
    exec(compile(program, "integrations.md", "exec"), names)
    assert said[0] == "t50 up_blocks.0: 32 channels, a cell is 4 pixels wide"
    assert said[3] == "t261 up_blocks.1: 16 channels, a cell is 4 pixels wide"
    assert said[-1].startswith("torch.Size([")
