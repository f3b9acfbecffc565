import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception.diffusion import FlowSchedule
from diffperception.generation.inference import require_same_path
from diffperception.models import DiffusionModel, NoisyClassifier, UNet
from diffperception.models.base import describe
from tests.parity import FOLDER, arrays, distance, fill_state

TOLERANCE = 1e-4


def tiny(**changes: object) -> NoisyClassifier:
    """A classifier of three classes whose logits depend on everything in it."""
    torch.manual_seed(0)
    arguments = {
        "image_size": 8,
        "channels": 32,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention": (2,),
        "num_head_channels": 16,
        **changes,
    }
    classifier = NoisyClassifier(["a", "b", "c"], **arguments)  # type: ignore[arg-type]
    for parameter in classifier.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return classifier.eval()


# Agreement with guided-diffusion

LAYOUTS = {
    "block": {"num_head_channels": 16},
    "conv": {"num_heads": 4, "new_attention_order": True},
    "pool": {"num_head_channels": 32},
}


def reference_state(name: str) -> dict[str, Tensor]:
    shapes = json.loads((FOLDER / "adm_classifiers_keys.json").read_text())[name]
    return fill_state({key: tuple(shape) for key, shape in shapes.items()})


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_and_gradients_are_the_references(name: str) -> None:
    """Both poolings, each resampling, grey and not square, half widths, both qkv orders."""
    parity = arrays("adm_classifiers")
    classifier = NoisyClassifier.from_reference(reference_state(name), **LAYOUTS[name]).eval()  # type: ignore[arg-type]
    x, t = parity[f"{name}_x"].requires_grad_(), torch.tensor([3, 800])
    assert distance(classifier(x, t).detach(), parity[f"{name}_logits"]) < TOLERANCE
    (gradient,) = torch.autograd.grad(classifier.log_probability(torch.tensor([1, 2]))(x, t).sum(), x)
    assert distance(gradient, parity[f"{name}_gradient"]) < TOLERANCE


@pytest.mark.parametrize(
    ("size", "channel_mult", "blocks", "attention", "parameters"),
    [
        (64, (1, 2, 3, 4), 4, (2, 4, 8), 65_438_568),
        (128, (1, 1, 2, 3, 4), 2, (4, 8, 16), 42_568_040),
        (256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), 54_096_360),
        (512, (0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64), 54_448_360),
    ],
)
def test_the_published_layouts_are_told_by_their_shapes(
    size: int, channel_mult: tuple, blocks: int, attention: tuple, parameters: int
) -> None:
    """Numbers of parameters are those of guided-diffusion's ImageNet classifiers."""
    classes = [str(label) for label in range(1000)]
    with torch.device("meta"):
        published = NoisyClassifier(
            classes, image_size=size, channel_mult=channel_mult, num_res_blocks=blocks, attention=attention
        )
    assert sum(parameter.numel() for parameter in published.parameters()) == parameters
    understood = NoisyClassifier.from_reference(to_reference(published), num_head_channels=64)
    assert describe(understood) == describe(published)


def to_reference(classifier: NoisyClassifier) -> dict[str, Tensor]:
    """Weights under the reference's names."""
    names = [
        ("stem.", "input_blocks.0.0."),
        ("middle.", "middle_block."),
        (".norm1.", ".in_layers.0."),
        (".conv1.", ".in_layers.2."),
        (".time.", ".emb_layers.1."),
        (".norm2.", ".out_layers.0."),
        (".conv2.", ".out_layers.3."),
        (".skip.", ".skip_connection."),
        ("out_norm.", "out.0."),
        ("pool.positions", "out.2.positional_embedding"),
        ("pool.qkv.", "out.2.qkv_proj."),
        ("pool.out.", "out.2.c_proj."),
    ]
    renamed = {}
    for name, value in classifier.state_dict().items():
        if name.startswith("encoder."):
            _, index, rest = name.split(".", 2)
            name = f"input_blocks.{int(index) + 1}.{rest}"
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        if name.startswith(("input", "middle")):
            name = name.replace(".out.", ".proj_out.")
        renamed[name] = value[..., None] if name.endswith(("qkv.weight", "proj.weight", "proj_out.weight")) else value
    return renamed


def test_depth_is_asked_for_where_names_fit_several() -> None:
    state = reference_state("block")  # levels 32, 64, 64 wide with attention in the second alone
    with pytest.raises(ValueError, match="not 3: give the number"):
        NoisyClassifier.from_reference(state, num_head_channels=16, num_res_blocks=3)
    plain = tiny(channel_mult=(1, 1), attention=())
    with pytest.raises(ValueError, match=r"fit num_res_blocks 1 or 3, not None"):
        NoisyClassifier.from_reference(to_reference(plain), num_head_channels=16)
    for num_res_blocks, levels in ((1, 2), (3, 1)):
        read = NoisyClassifier.from_reference(to_reference(plain), num_head_channels=16, num_res_blocks=num_res_blocks)
        assert len(read.arguments["channel_mult"]) == levels


def test_checkpoints_that_do_not_fit_are_explained() -> None:
    state = reference_state("conv")
    with pytest.raises(ValueError, match=r"it has no time_embed\.0\.weight"):
        NoisyClassifier.from_reference({"fc.weight": torch.zeros(1)}, num_heads=4)
    with pytest.raises(ValueError, match="either num_heads or num_head_channels"):
        NoisyClassifier.from_reference(state)
    with pytest.raises(ValueError, match="num_heads = 3"):
        NoisyClassifier.from_reference(state, num_heads=3)
    with pytest.raises(ValueError, match="2 class names are given for a checkpoint with 3 classes"):
        NoisyClassifier.from_reference(state, ["a", "b"], num_heads=4)
    unet = json.loads((FOLDER / "adm_layouts_keys.json").read_text())["conv"]
    with pytest.raises(ValueError, match="UNetModel, not of a classifier"):
        NoisyClassifier.from_reference(fill_state(unet), num_heads=4)
    spatial = {name: value for name, value in state.items() if not name.startswith("out.")}
    with pytest.raises(ValueError, match="neither by attention nor by averages"):
        NoisyClassifier.from_reference({**spatial, "out.2.weight": torch.zeros(3, 2048)}, num_heads=4)


# What it computes


@pytest.mark.parametrize("pool", ["attention", "adaptive"])
def test_log_probabilities_sum_to_one_and_their_gradient_is_finite_differences(pool: str) -> None:
    classifier, t = tiny(pool=pool).double(), torch.tensor([10, 700])
    x, direction = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    of_classes = torch.stack([classifier.log_probability(torch.tensor(label))(x, t) for label in range(3)])
    assert torch.allclose(of_classes.exp().sum(0), torch.ones(2, dtype=torch.float64))

    log_probability = classifier.log_probability(torch.tensor([2, 0]))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(log_probability(x, t).sum(), x)
    ahead, behind = (log_probability(x + step * direction, t).sum() for step in (1e-4, -1e-4))
    assert torch.allclose((gradient * direction).sum(), (ahead - behind) / 2e-4, rtol=1e-3)


@pytest.mark.parametrize("pool", ["attention", "adaptive"])
def test_every_parameter_has_a_part_in_the_logits(pool: str) -> None:
    classifier = tiny(pool=pool)
    logits = classifier(torch.randn(2, 3, 8, 8), torch.tensor([5, 600]))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in classifier.parameters())


@torch.no_grad()
def test_time_matters_and_samples_do_not_mix() -> None:
    classifier, x, t = tiny(), torch.randn(2, 3, 8, 8), torch.tensor([10, 700])
    together = classifier(x, t)
    assert torch.allclose(classifier(x[1:], t[1:]), together[1:], atol=1e-5)
    assert not torch.allclose(classifier(x, t.flip(0)), together, atol=1e-3)


@torch.no_grad()
def test_pooling_by_attention_sees_where_things_are() -> None:
    """A map and its shifted copy have the same mean; only positions tell them apart."""
    h = torch.randn(1, 64, 4, 4)
    for pool, same in (("attention", False), ("adaptive", True)):
        head = tiny(pool=pool).pool
        assert torch.allclose(head(h), head(h.roll(1, 3)), atol=1e-3) == same


@torch.no_grad()
def test_times_of_the_path_are_told_as_it_conditions() -> None:
    straight, x = tiny(schedule="flow"), torch.randn(2, 3, 8, 8)
    assert isinstance(straight.schedule, FlowSchedule)
    expected = F.log_softmax(straight(x, torch.tensor([250.0, 900.0])), 1)[:, 1]
    assert torch.allclose(straight.log_probability(torch.tensor(1))(x, torch.tensor([0.25, 0.9])), expected, atol=1e-6)


@torch.no_grad()
def test_shapes_other_than_square() -> None:
    wide, t = tiny(image_size=(8, 16)), torch.tensor([3])
    assert wide(torch.randn(1, 3, 8, 16), t).shape == (1, 3)
    with pytest.raises(ValueError, match="images of 8 x 16 pixels, not 16 x 8"):
        wide(torch.randn(1, 3, 16, 8), t)
    assert tiny(pool="adaptive")(torch.randn(1, 3, 16, 12), t).shape == (1, 3)
    with pytest.raises(ValueError, match="9 x 9 pixels do not allow"):
        tiny(image_size=9)
    with pytest.raises(ValueError, match="3 channels, not 1"):
        wide(torch.randn(1, 1, 8, 16), t)


@torch.no_grad()
def test_saved_classifiers_come_back_whole(tmp_path: Path) -> None:
    classifier, x, t = tiny(schedule="cosine", num_timesteps=50), torch.randn(1, 3, 8, 8), torch.tensor([7])
    classifier.save(tmp_path / "classifier.safetensors")
    loaded = NoisyClassifier.load(tmp_path / "classifier.safetensors")
    assert torch.equal(loaded(x, t), classifier(x, t))
    assert describe(loaded) == describe(classifier)
    assert torch.equal(loaded.schedule.sigma(t), classifier.schedule.sigma(t))
    UNet(channels=32, channel_mult=(1,), num_res_blocks=1, attention=(), num_head_channels=32).save(
        tmp_path / "unet.safetensors"
    )
    with pytest.raises(ValueError, match="holds a UNet, not a NoisyClassifier"):
        NoisyClassifier.load(tmp_path / "unet.safetensors")


def test_it_guides_along_its_own_betas_alone() -> None:
    unet = UNet(channels=32, channel_mult=(1,), num_res_blocks=1, attention=(), num_head_channels=32)
    generator = DiffusionModel(None, unet, schedule="betas", num_timesteps=2, betas=[0.1, 0.2], image_size=8)
    require_same_path(tiny(schedule="betas", num_timesteps=2, betas=[0.1, 0.2]), generator)
    with pytest.raises(ValueError, match=r"learned with betas \[0.1, 0.3\], but the generator with \[0.1, 0.2\]"):
        require_same_path(tiny(schedule="betas", num_timesteps=2, betas=[0.1, 0.3]), generator)
