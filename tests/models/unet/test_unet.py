import json
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

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
)
from diffperception.models import Condition, DiffusionModel, UNet
from diffperception.models.base import describe
from diffperception.models.convert import adm
from diffperception.models.unet.blocks import Resample, Told, time_embedding
from tests.helpers.devices import Device
from tests.helpers.networks import tiny_unet
from tests.parity import FOLDER, arrays, distance, filled_state
from tests.parity.fill import fill

TOLERANCE = 1e-4


def told(unet: UNet, batch: int) -> Condition:
    return Condition(vector=torch.randn(batch, unet.embedding))


# Agreement with guided-diffusion


@pytest.fixture(scope="module")
def parity() -> dict[str, Tensor]:
    return arrays("adm_small")


@pytest.fixture(scope="module")
def small() -> UNet:
    return UNet.from_reference(filled_state("adm_small"), num_head_channels=16).eval()


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
    output = clip(NetworkDenoiser(small, schedule, learned_range=True))(x, t)
    assert output.variance_range is not None
    log_variance = learned_log_variance(schedule, output.variance_range, t, t - 1)
    assert distance(output.x0, parity["pred_x0"]) < TOLERANCE
    assert distance(posterior_mean(schedule, x, output.x0, t, t - 1), parity["posterior_mean"]) < TOLERANCE
    assert distance(log_variance, parity["posterior_log_variance"]) < TOLERANCE


@torch.no_grad()
def test_losses_are_the_references(small: UNet, parity: dict[str, Tensor]) -> None:
    objective = Objective(linear_schedule(), learned_range=True)
    losses = objective(small, parity["x0"], parity["loss_t"], parity["noise"])
    assert distance(losses["mse"], parity["loss_mse"]) < TOLERANCE
    assert distance(losses["vlb"], parity["loss_vb"]) < TOLERANCE
    assert distance(losses["mse"] + losses["vlb"], parity["loss"]) < TOLERANCE


def test_respaced_timesteps_are_the_references(parity: dict[str, Tensor]) -> None:
    assert torch.equal(linear_schedule().grid(25, "linspace")[:-1].flip(0), parity["spaced_25"])
    assert torch.equal(linear_schedule().grid(25, "leading")[:-1].flip(0), parity["spaced_ddim25"])


def layout_state(name: str) -> dict[str, Tensor]:
    keys = json.loads((FOLDER / "adm_layouts_keys.json").read_text())[name]
    return {key: torch.from_numpy(fill(key, tuple(shape))) for key, shape in keys.items()}


def without_labels(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in layout_state(name).items() if key != adm.LABELS}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "arguments", "labels"),
    [
        ("conv", {"num_heads": 4, "new_attention_order": True}, torch.tensor([4, 0])),
        ("pool", {"num_heads": 2}, None),
        ("half", {"num_head_channels": 32}, None),
        ("flat", {"num_heads": 1}, None),
    ],
)
def test_other_layouts_are_the_references(name: str, arguments: dict, labels: Tensor | None) -> None:
    """Grey, four channels, not square; classes; both qkv orders; each resampling; half widths; a single level."""
    parity = arrays("adm_layouts")
    x = parity[f"{name}_x"]

    model = DiffusionModel.from_reference(layout_state(name), tuple(x.shape[2:]), **arguments)
    assert (model.conditioner is not None) == (labels is not None)
    out = model(x, torch.tensor([3.5, 800.25]), model.condition(labels))
    assert distance(out, parity[f"{name}_out"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(("name", "schedule"), [("linear", linear_schedule()), ("cosine", cosine_schedule())])
def test_trajectories_and_losses_of_the_schedules_ends_are_the_references(
    name: str, schedule: DiscreteSchedule
) -> None:
    parity = arrays("adm_layouts")
    unet = UNet.from_reference(layout_state("half"), num_head_channels=32).eval()
    denoiser = clip(NetworkDenoiser(unet, schedule, learned_range=True))
    leading, even = (linear_schedule().grid(10, spacing) for spacing in ("leading", "linspace"))
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
    unet = UNet.from_reference(state, num_head_channels=64)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 552_814_086
    assert unet.arguments["channel_mult"] == [1, 1, 2, 2, 4, 4]
    assert unet.arguments["attention"] == [8, 16, 32]
    described = [(info.channels, info.stride) for info in unet.block_info]
    # The blocks that label-efficient segmentation reads (arXiv 2112.03126): 5, 6, 7, 8 and 12.
    assert [described[i] for i in (5, 6, 7, 8, 12)] == [(1024, 8), (512, 8), (512, 8), (512, 4), (256, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either num_heads or num_head_channels"),
        ({"num_heads": 2, "num_head_channels": 16}, "either num_heads or num_head_channels"),
        ({"num_heads": 3}, "num_heads = 3"),
        ({"num_heads": 0}, "num_heads must be above 0"),
        ({"num_head_channels": 0}, "num_head_channels must be above 0"),
        ({"num_head_channels": 24}, "num_head_channels = 24"),
    ],
)
def test_heads_that_do_not_fit_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet.from_reference(layout_state("pool"), **arguments)


def test_checkpoints_that_do_not_fit_are_explained() -> None:
    state = without_labels("conv")
    with pytest.raises(ValueError, match="embedding of labels: take the whole generator"):
        UNet.from_reference(layout_state("conv"), num_heads=4)
    with pytest.raises(ValueError, match=r"it has no time_embed\.0\.weight"):
        UNet.from_reference({"conv_in.weight": torch.zeros(1)}, num_heads=4)
    incomplete = {name: value for name, value in state.items() if name != "middle_block.1.norm.bias"}
    with pytest.raises(ValueError, match=r"1 name is missing: our middle\.1\.norm\.bias\. .* built with: attention\."):
        UNet.from_reference(incomplete, num_heads=4)
    with pytest.raises(ValueError, match=r"1 name is left over: extra\.weight\."):
        UNet.from_reference({**state, "extra.weight": torch.zeros(1)}, num_heads=4)


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "argument"),
    [
        ("out.2.bias", (7,), r"\(7,\) instead of \(1,\)", "out_channels"),
        (
            "middle_block.0.in_layers.2.bias",
            (8,),
            r"\(8,\) instead of \(64,\)",
            "channels, channel_mult, num_res_blocks",
        ),
        ("middle_block.0.emb_layers.1.bias", (128,), r"\(128,\) instead of \(64,\)", "scale_shift"),
        ("middle_block.1.qkv.bias", (192 * 2,), r"\(384,\) instead of \(192,\)", "attention"),
    ],
)
def test_a_weight_of_another_layout_is_named_with_the_argument_that_decides_on_it(
    name: str, shape: tuple[int, ...], sizes: str, argument: str
) -> None:
    state = without_labels("conv")
    assert name in state
    with pytest.raises(ValueError, match=f"{name} {sizes}.*built with: {argument}") as error:
        UNet.from_reference({**state, name: torch.zeros(shape)}, num_heads=4)
    assert "{" not in str(error.value)
    assert "channels 32, channel_mult" in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("time_embed.0.weight", (), r"\(\) is no layer"),
        ("input_blocks.0.0.weight", (32,), r"\(32,\) is no layer"),
        ("input_blocks.3.1.qkv.weight", (3,), r"\(3,\) instead of \(192, 64\)"),
        ("input_blocks.3.1.qkv.bias", (), r"\(\) instead of \(192,\)"),
        ("input_blocks.3.1.proj_out.weight", (), r"\(\) instead of \(64, 64\)"),
        ("label_emb.weight", (), r"is \(\), which does not fit this UNet: it takes a row of 128 numbers per class"),
    ],
)
def test_a_weight_of_another_number_of_axes_is_named(name: str, shape: tuple[int, ...], sizes: str) -> None:
    state = {**layout_state("conv"), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"{name} {sizes}"):
        DiffusionModel.from_reference(state, 16, num_heads=4)


# What it computes


def test_a_new_model_predicts_nothing_and_its_branches_add_nothing() -> None:
    unet = UNet(channels=32, channel_mult=(1, 1), num_res_blocks=1, attention=(2,), num_head_channels=32)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 999])
    assert not unet(x, t).any()
    block = unet.encoder[0][0]
    h = torch.randn(2, 32, 8, 8)
    assert torch.allclose(block(h, Told(torch.randn(2, 128))), h)


@pytest.mark.parametrize("resampling", ["block", "conv", "pool"])
def test_every_parameter_has_a_part_in_the_output(resampling: str) -> None:
    unet = tiny_unet(resampling=resampling, scale_shift=resampling != "conv")
    unet(torch.randn(3, 3, 8, 16), torch.tensor([1, 500, 900]), told(unet, 3)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in unet.parameters())


@torch.no_grad()
def test_time_and_condition_matter_and_samples_do_not_mix() -> None:
    unet, x, t = tiny_unet(), torch.randn(2, 3, 8, 8), torch.tensor([10, 700])
    condition = told(unet, 2)
    assert condition.vector is not None
    together = unet(x, t, condition)
    assert torch.allclose(unet(x[1:], t[1:], Condition(vector=condition.vector[1:])), together[1:], atol=1e-5)
    assert not torch.allclose(unet(x, t + 5, condition), together, atol=1e-3)
    assert not torch.allclose(unet(x, t, Condition(vector=condition.vector.flip(0))), together, atol=1e-3)
    assert not torch.allclose(unet(x, t), together, atol=1e-3)
    assert torch.equal(unet(x, t, Condition()), unet(x, t))


@torch.no_grad()
def test_activations_stop_after_the_last_block_named() -> None:
    unet, x, t = tiny_unet(), torch.randn(1, 3, 16, 24), torch.tensor([50])
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
    plain, saving = tiny_unet(), tiny_unet(checkpointing=True)
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
        tiny_unet(channels=64, channel_mult=(1, 2), attention=(2,)),
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
    exact = tiny_unet()(x, t).detach()
    half = tiny_unet().to(torch.bfloat16)(x.bfloat16(), t)
    assert half.dtype == torch.bfloat16
    assert distance(half.detach().float(), exact) < 0.2
    unet = tiny_unet()
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(x, t)
    out.float().square().sum().backward()
    assert distance(out.detach().float(), exact) < 0.2
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in unet.parameters())


def test_saved_models_come_back_whole(tmp_path) -> None:
    unet, x, t = tiny_unet(), torch.randn(1, 3, 8, 8), torch.tensor([7])
    unet.save(tmp_path / "model.safetensors")
    loaded = UNet.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(x, t), unet(x, t))
    assert describe(loaded) == describe(unet)


# Its parts


def test_time_embedding_is_cosines_then_sines() -> None:
    embedding = time_embedding(torch.tensor([0, 3]), 8)
    frequencies = torch.tensor([1, 10, 100, 1000.0]).reciprocal()
    assert torch.allclose(embedding[1], torch.cat([(3 * frequencies).cos(), (3 * frequencies).sin()]))
    assert embedding[0].tolist() == [1] * 4 + [0] * 4
    assert time_embedding(torch.tensor([3]), 9).shape == (1, 9)
    shifted = time_embedding(torch.tensor([3]), 8, frequency_shift=1)[0, :4]
    assert torch.allclose(shifted, (3 * 10_000 ** -(torch.arange(4) / 3)).cos())


def test_one_sided_padding_moves_the_halved_map_by_a_pixel() -> None:
    both, one = (Resample(2, "down", True, one_sided) for one_sided in (False, True))
    one.load_state_dict(both.state_dict())
    x = torch.randn(1, 2, 6, 8)
    assert torch.allclose(one(F.pad(x, (1, 0, 1, 0)), x), both(x, x), atol=1e-6)


def test_norms_have_as_many_groups_and_the_epsilon_that_were_asked_for() -> None:
    norms = [m for m in tiny_unet(norm_groups=4, norm_eps=0.5).modules() if isinstance(m, nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(4, 0.5)}


# What it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 40}, r"multiple of 32; channels x channel_mult are \[40, 40, 80\]"),
        ({"frequency_shift": 16}, "frequency_shift must be 0 or above, and below half the 32 channels, not 16"),
        ({"channel_mult": (1, 1, 0.1)}, "multiple of 32"),
        ({"attention": (3,)}, r"factors are \[1, 2, 4\]; `attention` names \[3\]"),
        ({"num_head_channels": 48}, "64 channels wide cannot be split evenly by num_head_channels = 48"),
        ({"num_heads": 5}, "by num_heads = 5"),
        ({"num_heads": 0}, "num_heads must be above 0, not 0"),
        ({"num_head_channels": 0}, "num_head_channels must be above 0"),
        ({"channels": -32}, "multiple of 32"),
        ({"channel_mult": ()}, "must be a level"),
        ({"num_res_blocks": 0}, "num_res_blocks must be above 0"),
        ({"in_channels": 0}, "in_channels must be above 0"),
        ({"out_channels": -3}, "out_channels must be above 0"),
    ],
)
def test_impossible_layouts_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_unet(**changes)


def test_dropout_drops_in_training_alone() -> None:
    x, t, state = arrays("adm_layouts")["conv_x"], torch.tensor([3.5, 800.25]), without_labels("conv")
    plain = UNet.from_reference(state, num_heads=4)
    unet = UNet(**plain.arguments | {"dropout": 0.5})
    unet.load_state_dict(plain.state_dict())
    assert not torch.allclose(unet.train()(x, t), unet(x, t), atol=1e-2)
    assert torch.equal(plain.train()(x, t), unet.eval()(x, t))


def test_impossible_inputs_are_refused() -> None:
    unet, t = tiny_unet(), torch.tensor([5])
    with pytest.raises(ValueError, match=r"30 x 64 pixels do not allow; crop to 28 x 64 or pad to 32 x 64"):
        unet(torch.zeros(1, 3, 30, 64), t)
    with pytest.raises(ValueError, match=r"2 x 64 pixels do not allow; pad to 4 x 64"):
        unet(torch.zeros(1, 3, 2, 64), t)
    with pytest.raises(ValueError, match="height must be above 0"):
        unet.check_size(-32, 32)
    with pytest.raises(ValueError, match="3 channels, not 1"):
        unet(torch.zeros(1, 1, 32, 32), t)
    for slot, complaint in (("tokens", "takes no tokens"), ("maps", "no layers for labels or maps")):
        with pytest.raises(ValueError, match=complaint):
            unet(torch.zeros(1, 3, 32, 32), t, Condition(**{slot: torch.zeros(1, 4, 4)}))
    for blocks in ((6,), (-1,), ()):
        with pytest.raises(ValueError, match="blocks among 0 to 5"):
            unet.activations(torch.zeros(1, 3, 32, 32), t, blocks)


# Other ways to run it


@torch.no_grad()
def test_every_device_predicts_the_same_and_waits_for_nothing(device: Device) -> None:
    unet, x, t = tiny_unet(), torch.randn(2, 3, 16, 16), torch.tensor([3, 400])
    condition = told(unet, 2)
    expected = unet(x, t, condition)
    unet, x, t, vector = device.move((unet, x, t, condition.vector))
    out = unet(x, t, Condition(vector=vector))
    assert not device.waits, device.report()
    torch.testing.assert_close(device.host(out), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_exported_unet_takes_any_batch() -> None:
    unet = tiny_unet(channels=64, channel_mult=(1, 2), attention=(2,), num_head_channels=32)
    arguments = torch.randn(2, 3, 16, 16), torch.tensor([3, 400])
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(unet, arguments, dynamic_shapes=({0: batch}, {0: batch}))
    x, t = torch.randn(9, 3, 16, 16), torch.arange(9)
    torch.testing.assert_close(program.module()(x, t), unet(x, t), atol=1e-4, rtol=1e-4)


def test_forward_mode_derivatives_are_finite_differences() -> None:
    """Of a whole network, as MeanFlow and likelihoods need them."""
    unet = tiny_unet().double()
    x, direction, t = *torch.randn(2, 1, 3, 8, 8, dtype=torch.float64), torch.tensor([300.0])
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
        _, derivative = torch.func.jvp(lambda x: unet(x, t), (x,), (direction,))
        ahead, behind = (unet(x + step * direction, t) for step in (1e-5, -1e-5))
    torch.testing.assert_close(derivative, (ahead - behind) / 2e-5, atol=1e-5, rtol=1e-4)
