import json
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception.diffusion import (
    DiscreteSchedule,
    NetworkDenoiser,
    Objective,
    clip,
    cosine_schedule,
    learned_log_variance,
    linear_schedule,
    posterior_mean,
    sample_ddim,
    sample_ddpm,
    timestep_grid,
)
from diffperception.models import UNet
from diffperception.models.unet.blocks import double, double_and_convolve, time_embedding
from diffperception.models.ops.normalization import group_norm
from tests.parity import FOLDER, arrays, distance, filled_state
from tests.parity.fill import fill

TOLERANCE = 1e-4


def tiny(**changes: object) -> UNet:
    """A UNet of three levels whose output depends on everything in it."""
    torch.manual_seed(0)
    arguments = {
        "channels": 32,
        "multipliers": (1, 1, 2),
        "depth": 1,
        "attention": (4,),
        "head_channels": 16,
        **changes,
    }
    unet = UNet(**arguments)  # type: ignore[arg-type]
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return unet.eval()


# Agreement with guided-diffusion


@pytest.fixture(scope="module")
def parity() -> dict[str, Tensor]:
    return arrays("adm_small")


@pytest.fixture(scope="module")
def small() -> UNet:
    return UNet.from_reference(filled_state("adm_small"), head_channels=16).eval()


@torch.no_grad()
def test_output_and_every_block_are_the_references(small: UNet, parity: dict[str, Tensor]) -> None:
    assert distance(small(parity["x"], parity["t"]), parity["out"]) < TOLERANCE
    blocks = small.activations(parity["x"], parity["t"], range(12))
    for i, h in enumerate(blocks):
        assert distance(h.mean((2, 3)), parity[f"mean_output_block_{i}"]) < TOLERANCE
    assert distance(blocks[5][:1], parity["output_block_5"]) < TOLERANCE


@torch.no_grad()
def test_posterior_and_signal_are_the_references(small: UNet, parity: dict[str, Tensor]) -> None:
    schedule, x, t = linear_schedule(), parity["x"], parity["t"]
    estimate = clip(NetworkDenoiser(small, schedule, learned_range=True))(x, t)
    assert estimate.variance_range is not None
    log_variance = learned_log_variance(schedule, estimate.variance_range, t, t - 1)
    assert distance(estimate.x0, parity["pred_x0"]) < TOLERANCE
    assert distance(posterior_mean(schedule, x, estimate.x0, t, t - 1), parity["posterior_mean"]) < TOLERANCE
    assert distance(log_variance, parity["posterior_log_variance"]) < TOLERANCE


@torch.no_grad()
def test_losses_are_the_references(small: UNet, parity: dict[str, Tensor]) -> None:
    objective = Objective(linear_schedule(), learned_range=True)
    losses = objective(small, parity["x0"], parity["loss_t"], parity["noise"])
    assert distance(losses["mse"], parity["loss_mse"]) < TOLERANCE
    assert distance(losses["vlb"], parity["loss_vb"]) < TOLERANCE
    assert distance(losses["mse"] + losses["vlb"], parity["loss"]) < TOLERANCE


def test_respaced_timesteps_are_the_references(parity: dict[str, Tensor]) -> None:
    assert torch.equal(timestep_grid(1000, 25, "linspace")[:-1].flip(0), parity["spaced_25"])
    assert torch.equal(timestep_grid(1000, 25, "leading")[:-1].flip(0), parity["spaced_ddim25"])


def layout_state(name: str) -> dict[str, Tensor]:
    keys = json.loads((FOLDER / "adm_layouts_keys.json").read_text())[name]
    return {key: torch.from_numpy(fill(key, tuple(shape))) for key, shape in keys.items()}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "arguments", "labels"),
    [
        ("conv", {"heads": 4, "new_attention_order": True}, torch.tensor([4, 0])),
        ("pool", {"heads": 2}, None),
        ("half", {"head_channels": 32}, None),
        ("flat", {"heads": 1}, None),
    ],
)
def test_other_layouts_are_the_references(name: str, arguments: dict, labels: Tensor | None) -> None:
    """Grey, four channels, not square; classes; both qkv orders; each resampling; half widths; a single level."""
    parity = arrays("adm_layouts")
    unet = UNet.from_reference(layout_state(name), **arguments).eval()
    out = unet(parity[f"{name}_x"], torch.tensor([3.5, 800.25]), labels)
    assert distance(out, parity[f"{name}_out"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(("name", "schedule"), [("linear", linear_schedule()), ("cosine", cosine_schedule())])
def test_trajectories_and_losses_of_the_schedules_ends_are_the_references(
    name: str, schedule: DiscreteSchedule
) -> None:
    parity = arrays("adm_layouts")
    unet = UNet.from_reference(layout_state("half"), head_channels=32).eval()
    denoiser = clip(NetworkDenoiser(unet, schedule, learned_range=True))
    leading, even = (timestep_grid(1000, 10, spacing) for spacing in ("leading", "linspace"))
    assert distance(sample_ddim(denoiser, schedule, parity["noise"], leading), parity[f"ddim_{name}"]) < TOLERANCE
    torch.manual_seed(0)
    noisy = sample_ddim(denoiser, schedule, parity["noise"], leading, eta=0.7)
    assert distance(noisy, parity[f"ddim_eta_{name}"]) < TOLERANCE
    torch.manual_seed(0)
    assert distance(sample_ddpm(denoiser, schedule, parity["noise"], even), parity[f"ddpm_{name}"]) < TOLERANCE
    objective = Objective(schedule, learned_range=True)
    losses = objective(unet, parity["x0"], torch.tensor([0, 999]), parity["noise"].flip(0))
    assert distance(losses["mse"], parity[f"mse_{name}"]) < TOLERANCE
    assert distance(losses["vlb"], parity[f"vb_{name}"]) < TOLERANCE


def test_the_released_lsun_model_is_understood() -> None:
    keys = json.loads((FOLDER / "adm_lsun256_keys.json").read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    unet = UNet.from_reference(state, head_channels=64)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 552_814_086
    assert unet.arguments["multipliers"] == [1, 1, 2, 2, 4, 4]
    assert unet.arguments["attention"] == [8, 16, 32]
    described = [(info.channels, info.stride) for info in unet.block_info]
    # The blocks that label-efficient segmentation reads (arXiv 2112.03126): 5, 6, 7, 8 and 12.
    assert [described[i] for i in (5, 6, 7, 8, 12)] == [(1024, 8), (512, 8), (512, 8), (512, 4), (256, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either heads or head_channels"),
        ({"heads": 2, "head_channels": 16}, "either heads or head_channels"),
        ({"heads": 3}, "heads = 3"),
        ({"heads": 0}, "heads must be above 0"),
        ({"head_channels": 0}, "head_channels must be above 0"),
        ({"head_channels": 24}, "head_channels = 24"),
    ],
)
def test_heads_that_do_not_fit_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet.from_reference(layout_state("conv"), **arguments)


def test_checkpoints_that_do_not_fit_are_explained() -> None:
    state = layout_state("conv")
    with pytest.raises(ValueError, match=r"it has no time_embed\.0\.weight"):
        UNet.from_reference({"conv_in.weight": torch.zeros(1)}, heads=4)
    incomplete = {name: value for name, value in state.items() if name != "middle_block.1.norm.bias"}
    with pytest.raises(
        ValueError, match=r"1 weights are missing, such as those of our middle\.1\.norm\.bias.* attention"
    ):
        UNet.from_reference(incomplete, heads=4)
    with pytest.raises(ValueError, match=r"extra\.weight is 1, but by those it would not be there"):
        UNet.from_reference({**state, "extra.weight": torch.zeros(1)}, heads=4)


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "argument"),
    [
        ("out.2.bias", (7,), "is 7, but by those it would be 1", "out_channels"),
        ("middle_block.0.in_layers.2.bias", (8,), "is 8, but by those it would be 64", "channels, multipliers, depth"),
        ("middle_block.0.emb_layers.1.bias", (128,), "is 128, but by those it would be 64", "scale_shift"),
        ("middle_block.1.qkv.bias", (192 * 2,), "is 384, but by those it would be 192", "attention"),
    ],
)
def test_a_weight_of_another_layout_is_named_with_the_argument_that_decides_on_it(
    name: str, shape: tuple[int, ...], sizes: str, argument: str
) -> None:
    state = layout_state("conv")
    assert name in state
    with pytest.raises(ValueError, match=f"{name} {sizes}.*built with: {argument}") as error:
        UNet.from_reference({**state, name: torch.zeros(shape)}, heads=4)
    assert "{" not in str(error.value)
    assert "channels 32, multipliers" in str(error.value)


# What it computes


def test_a_new_model_predicts_nothing_and_its_branches_add_nothing() -> None:
    unet = UNet(channels=32, multipliers=(1, 1), depth=1, attention=(2,), head_channels=32)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 999])
    assert not unet(x, t).any()
    block = unet.encoder[0][0]
    h = torch.randn(2, 32, 8, 8)
    assert torch.allclose(block(h, torch.randn(2, 128)), h)


@pytest.mark.parametrize("resampling", ["block", "conv", "pool"])
def test_every_parameter_has_a_part_in_the_output(resampling: str) -> None:
    unet = tiny(resampling=resampling, num_classes=3, scale_shift=resampling != "conv")
    unet(torch.randn(3, 3, 8, 16), torch.tensor([1, 500, 900]), torch.tensor([0, 1, 2])).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in unet.parameters())


@torch.no_grad()
def test_time_and_label_matter_and_samples_do_not_mix() -> None:
    unet, x, t, labels = tiny(num_classes=2), torch.randn(2, 3, 8, 8), torch.tensor([10, 700]), torch.tensor([0, 1])
    together = unet(x, t, labels)
    assert torch.allclose(unet(x[1:], t[1:], labels[1:]), together[1:], atol=1e-5)
    assert not torch.allclose(unet(x, t + 5, labels), together, atol=1e-3)
    assert not torch.allclose(unet(x, t, 1 - labels), together, atol=1e-3)


@torch.no_grad()
def test_activations_stop_after_the_last_block_named() -> None:
    unet, x, t = tiny(), torch.randn(1, 3, 16, 24), torch.tensor([50])
    calls = []
    for i, stage in enumerate(unet.decoder):
        stage.register_forward_hook(lambda *_, i=i: calls.append(i))
    first, second, again = unet.activations(x, t, (3, 1, 3))
    assert calls == [0, 1, 2, 3]
    assert torch.equal(first, again)
    for h, info in ((first, unet.block_info[3]), (second, unet.block_info[1])):
        assert h.shape == (1, info.channels, 16 // info.stride, 24 // info.stride)


def test_recomputing_activations_changes_nothing_but_memory() -> None:
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 400])
    plain, saving = tiny(), tiny(checkpointing=True)
    kept = {True: 0, False: 0}
    outputs = {}
    for unet in (plain, saving):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value, key=unet is saving: (kept.__setitem__(key, kept[key] + value.numel()), value)[1], lambda v: v
        ):
            outputs[unet is saving] = unet(x, t)
        outputs[unet is saving].square().sum().backward()
    assert torch.equal(outputs[True], outputs[False])
    assert kept[True] < kept[False] / 2
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_single_precision_stays_close_to_double_in_wide_models() -> None:
    """Widths and sizes at which convolutions take Winograd's way."""
    unet, x, t = (
        tiny(channels=64, multipliers=(1, 2), attention=(2,)),
        torch.randn(2, 3, 32, 32),
        torch.tensor([3, 400]),
    )
    gradients, outputs = [], []
    for model, images in ((unet, x), (deepcopy(unet).double(), x.double())):
        outputs.append(model(images, t))
        outputs[-1].square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert distance(outputs[0].detach().double(), outputs[1].detach()) < TOLERANCE / 4
    for one, other in zip(*gradients, strict=True):
        assert distance(one.double(), other) < TOLERANCE


def test_half_precision_weights_and_autocast_stay_close() -> None:
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 400])
    exact = tiny()(x, t).detach()
    half = tiny().to(torch.bfloat16)(x.bfloat16(), t)
    assert half.dtype == torch.bfloat16
    assert distance(half.detach().float(), exact) < 0.2
    unet = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(x, t)
    out.float().square().sum().backward()
    assert distance(out.detach().float(), exact) < 0.2
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in unet.parameters())


def test_saved_models_come_back_whole(tmp_path) -> None:
    unet, x, t = tiny(num_classes=4), torch.randn(1, 3, 8, 8), torch.tensor([7])
    unet.save(tmp_path / "model.safetensors")
    loaded = UNet.load(tmp_path / "model.safetensors")
    labels = torch.tensor([2])
    assert torch.equal(loaded(x, t, labels), unet(x, t, labels))
    assert loaded.arguments == unet.arguments


# Its parts


def test_time_embedding_is_cosines_then_sines() -> None:
    embedding = time_embedding(torch.tensor([0, 3]), 8)
    frequencies = torch.tensor([1, 10, 100, 1000.0]).reciprocal()
    assert torch.allclose(embedding[1], torch.cat([(3 * frequencies).cos(), (3 * frequencies).sin()]))
    assert embedding[0].tolist() == [1] * 4 + [0] * 4
    assert time_embedding(torch.tensor([3]), 9).shape == (1, 9)


def test_doubling_and_convolving_at_once_is_the_same() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    at_once, in_turn = double_and_convolve(x, conv), conv(double(x))
    assert torch.allclose(at_once, in_turn)
    weights = torch.randn_like(in_turn)
    for one, other in zip(
        torch.autograd.grad((at_once * weights).sum(), [x, *conv.parameters()]),
        torch.autograd.grad((in_turn * weights).sum(), [x, *conv.parameters()]),
        strict=True,
    ):
        assert torch.allclose(one, other)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_group_norm_and_its_gradient_are_torchs(memory_format: torch.memory_format) -> None:
    norm = nn.GroupNorm(4, 8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    scale, shift = torch.randn(2, 2, 8, dtype=torch.float64, requires_grad=True)
    inputs, weights = [x, scale, shift, *norm.parameters()], torch.randn(2, 8, 3, 5, dtype=torch.float64)
    expected = F.group_norm(x, 4, norm.weight, norm.bias) * (1 + scale[..., None, None]) + shift[..., None, None]
    ours = group_norm(norm, x, scale, shift)
    assert torch.allclose(ours, expected)
    assert torch.allclose(group_norm(norm, x), norm(x))
    for one, other in ((ours, expected), (group_norm(norm, x, scale, shift, activate=True), F.silu(expected))):
        gradients = (torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True) for y in (one, other))
        assert torch.allclose(one, other)
        assert all(map(torch.allclose, *gradients))


def test_group_norm_is_exact_far_from_zero() -> None:
    x = (torch.randn(2, 32, 64, 64) + 30).contiguous(memory_format=torch.channels_last)
    norm = nn.GroupNorm(32, 32)
    assert torch.allclose(group_norm(norm, x).double(), F.group_norm(x.double(), 32), atol=2e-5)


# What it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 40}, r"multiple of 32; channels x multipliers are \[40, 40, 80\]"),
        ({"multipliers": (1, 1, 0.1)}, "multiple of 32"),
        ({"attention": (3,)}, r"factors are \[1, 2, 4\]; `attention` names \[3\]"),
        ({"head_channels": 48}, "64 channels wide cannot be split evenly by head_channels = 48"),
        ({"heads": 5}, "by heads = 5"),
        ({"heads": 0}, "heads must be above 0, not 0"),
        ({"head_channels": 0}, "head_channels must be above 0"),
        ({"channels": -32}, "multiple of 32"),
        ({"multipliers": ()}, "must be a level"),
        ({"depth": 0}, "depth must be above 0"),
        ({"in_channels": 0}, "in_channels must be above 0"),
        ({"out_channels": -3}, "out_channels must be above 0"),
        ({"num_classes": 0}, "num_classes must be above 0"),
    ],
)
def test_impossible_layouts_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_dropout_drops_in_training_alone_and_comes_with_a_checkpoint_as_asked() -> None:
    x, t, labels = arrays("adm_layouts")["conv_x"], torch.tensor([3.5, 800.25]), torch.tensor([4, 0])
    unet = UNet.from_reference(layout_state("conv"), heads=4, dropout=0.5, checkpointing=True)
    assert (unet.arguments["dropout"], unet.checkpointing) == (0.5, True)
    assert not torch.allclose(unet.train()(x, t, labels), unet(x, t, labels), atol=1e-2)
    plain = UNet.from_reference(layout_state("conv"), heads=4)
    assert (plain.arguments["dropout"], plain.checkpointing) == (0.0, False)
    assert torch.equal(plain.train()(x, t, labels), unet.eval()(x, t, labels))


def test_impossible_inputs_are_refused() -> None:
    unet, t = tiny(), torch.tensor([5])
    with pytest.raises(ValueError, match=r"30 x 64 pixels do not allow; crop to 28 x 64 or pad to 32 x 64"):
        unet(torch.zeros(1, 3, 30, 64), t)
    with pytest.raises(ValueError, match=r"2 x 64 pixels do not allow; pad to 4 x 64"):
        unet(torch.zeros(1, 3, 2, 64), t)
    with pytest.raises(ValueError, match="height must be above 0"):
        unet.check_size(-32, 32)
    with pytest.raises(ValueError, match="3 channels, not 1"):
        unet(torch.zeros(1, 1, 32, 32), t)
    with pytest.raises(ValueError, match="has no classes"):
        unet(torch.zeros(1, 3, 32, 32), t, torch.tensor([0]))
    with pytest.raises(ValueError, match="has 7 classes; give the labels"):
        tiny(num_classes=7)(torch.zeros(1, 3, 32, 32), t)
    for blocks in ((6,), (-1,), ()):
        with pytest.raises(ValueError, match="blocks among 0 to 5"):
            unet.activations(torch.zeros(1, 3, 32, 32), t, blocks)
