"""Networks of diffusers as sources of features: tiny folders with random weights, nothing is downloaded."""

import shutil
from contextlib import suppress

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffperception.detection import DiffusionDet  # noqa: E402
from diffperception.models import ActivationReader, Model, UNetBackbone  # noqa: E402
from diffperception.models.base import describe  # noqa: E402
from diffperception.models.generator import load_generator  # noqa: E402
from diffperception.segmentation import DiffusionFeatures, PixelEnsemble, PixelSegmenter  # noqa: E402
from tests.integrations.diffusers_folders import (  # noqa: E402
    FLOW,
    NETWORKS,
    POOLED,
    WORD,
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("diffusers")
    return {family: write_pipeline(root / family, family) for family in NETWORKS}


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    """The embedding of a prompt of seven words."""
    from safetensors.torch import save_file

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


def test_kept_weights_load_where_the_folder_is_gone(folders, segmenter, tmp_path, images):
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    features = DiffusionFeatures(folder, ["up_blocks.0"], [50], keep_weights=True)
    features.save(tmp_path / "features.safetensors")
    shutil.rmtree(folder)
    loaded = Model.load(tmp_path / "features.safetensors")
    assert torch.equal(loaded.maps(images[0]).maps[0], features.maps(images[0]).maps[0])


@pytest.mark.parametrize("keep", [None, True])
def test_a_detector_on_words_loads_with_its_folder_or_without(keep, folders, tmp_path, images):
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    torch.manual_seed(0)
    backbone = UNetBackbone(folder, ["mid_block", "up_blocks.1"], keep_weights=keep)
    model = detector_on(backbone)
    model.save(tmp_path / "model.safetensors")
    if keep:
        shutil.rmtree(folder)
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


@pytest.mark.parametrize("family", ["sd", "sd3", "flux", "pixart", "unconditional"])
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


def test_a_pass_ends_early_inside_checkpointed_blocks_too(folders, prompt, images):
    grads = []
    for checkpointing in (False, True):
        backbone = UNetBackbone(folders["sd"], ["up_blocks.0"], frozen=False, prompt=prompt)
        if checkpointing:
            backbone.reader.generator.network.network.enable_gradient_checkpointing()
        backbone.train()(2 * images - 1)[0].square().sum().backward()
        grads.append([p.grad for p in backbone.reader.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))


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
