"""Networks of diffusers as sources of features: tiny folders with random weights, nothing is downloaded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pixel_unshuffle

diffusers = pytest.importorskip("diffusers")

from diffperception.detection import DiffusionDet  # noqa: E402
from diffperception.integrations.diffusers.families import FAMILIES  # noqa: E402
from diffperception.integrations.diffusers.folder import betas_of, read_folder  # noqa: E402
from diffperception.models import ActivationReader, Model, UNetBackbone  # noqa: E402
from diffperception.models.generator import load_generator  # noqa: E402
from diffperception.segmentation import DiffusionFeatures, PixelEnsemble, PixelSegmenter  # noqa: E402
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
    try:
        call_of(family, network, x, t, condition)
    except RuntimeError as error:  # DiT puts the patches of squares alone together
        assert family == "dit" and "invalid for input" in str(error)
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
