"""The bits of images, what is measured of them, and which are foreign to a generator."""

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffperception.cli.main import main
from diffperception.diffusion import Denoiser, DenoiserOutput, SampleNoise, add_noise
from diffperception.generation.likelihood import (
    LikelihoodOptions,
    bits_per_dimension,
    coded_bits,
    denoising_losses,
    likelihood_folder,
)
from diffperception.generation.outliers import Measured, auroc, cross_foreignness, foreignness
from diffperception.models import DiffusionModel
from diffperception.visualization.draw import save_png, to_pil
from tests.helpers.devices import Device
from tests.helpers.networks import conditional_generator, two_level_unet

VALUES = torch.tensor([20, 100, 140, 230])  # of 255
SHARES = torch.tensor([0.4, 0.3, 0.2, 0.1])


class KnownPixels(DiffusionModel):
    """A generator whose denoiser is exact for pixels that are each one of four values, independently."""

    def denoiser(self, said: object = None, guidance: float = 1.0) -> Denoiser:
        def denoise(x_t: Tensor, t: Tensor) -> DenoiserOutput:
            alpha, sigma = self.schedule.alpha(t[0]).float(), self.schedule.sigma(t[0]).float()
            signals = 2 * VALUES / 255 - 1
            logits = SHARES.log() - ((x_t[..., None] - alpha * signals) / sigma).square() / 2
            return DenoiserOutput((logits.softmax(-1) * signals).sum(-1))

        return denoise


def test_bits_are_the_entropy_and_what_the_decoder_adds() -> None:
    """That is known too: the bits of the bin of a value under a Gaussian around its noised place."""
    model = KnownPixels(None, two_level_unet(), image_size=16, schedule="cosine")
    torch.manual_seed(0)
    image = VALUES[torch.multinomial(SHARES, 8 * 3 * 256, replacement=True)].view(8, 3, 16, 16)
    options = LikelihoodOptions(steps=100, probes=1)
    found = bits_per_dimension(model, image / 255, SampleNoise(range(8)), options)
    counts = torch.stack([(image == value).double().mean((1, 2, 3)) for value in VALUES], 1)
    entropy = -(counts * SHARES.log2()).sum(1)
    ratio = float(model.schedule.sigma(0) / model.schedule.alpha(0))
    noise = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    standard = torch.distributions.Normal(0.0, 1.0)
    in_bin = standard.cdf(1 / 255 / ratio - noise) - standard.cdf(-1 / 255 / ratio - noise)
    decoder = -(in_bin.log2() * standard.log_prob(noise).exp()).sum() * (noise[1] - noise[0])
    torch.testing.assert_close(found, entropy + decoder, atol=0.04, rtol=0)


def test_bits_are_those_of_the_device(device: Device) -> None:
    model, images = DiffusionModel(None, two_level_unet(), image_size=8), torch.rand(2, 3, 8, 8)
    options = LikelihoodOptions(steps=2)
    expected = bits_per_dimension(model, images, SampleNoise([0, 1]), options)
    model, images = device.move(model), device.move(images)
    found = bits_per_dimension(model, images, SampleNoise([0, 1]), options)
    torch.testing.assert_close(device.host(found), expected, rtol=1e-4, atol=1e-3)
    assert len(device.waits) <= 4, device.report()


def test_losses_are_the_errors_of_the_noise() -> None:
    model = DiffusionModel(None, two_level_unet(), image_size=8)
    images = torch.rand(2, 3, 8, 8)
    found = denoising_losses(model, images, SampleNoise([3, 4]), times=2)
    draw = SampleNoise([3, 4])
    for k, t in enumerate((250, 750)):
        noise = draw(images)
        noisy = add_noise(model.schedule, 2 * images - 1, t, noise)
        predicted = model(noisy, torch.full((2,), t))
        expected = (predicted - noise).square().flatten(1).mean(1)
        torch.testing.assert_close(found[:, k], expected.detach(), atol=1e-4, rtol=1e-4)


def test_scores_tell_what_they_claim() -> None:
    torch.manual_seed(0)
    bits = 5 + torch.randn(400)
    reference = Measured(
        bits,
        bits + 0.1 * torch.randn(400),
        torch.exp(torch.randn(400, 3) @ torch.tensor([[1.0, 1, 0], [0, 0.1, 0], [0, 0, 1]])),
    )
    # Fewer bits than any reference image; and losses each usual alone, but not together.
    smooth = Measured(torch.zeros(1), torch.full((1,), -2.0), torch.ones(1, 3))
    odd = Measured(torch.full((1,), 5.0), torch.full((1,), 5.0), torch.tensor([[1.0, -1.0, 0.0]]).exp())
    assert auroc(smooth.bits, reference.bits) < 0.01
    scores = {name: foreignness(image, reference) for name, image in {"smooth": smooth, "odd": odd}.items()}
    own = foreignness(reference, reference)
    assert auroc(scores["smooth"]["typicality"], own["typicality"]) > 0.99
    # A smooth image that the general code takes even less for: the generator does not know it.
    assert auroc(scores["smooth"]["complexity"], own["complexity"]) > 0.99
    assert auroc(scores["odd"]["typicality"], own["typicality"]) < 0.2
    assert auroc(scores["odd"]["profile"], own["profile"]) > 0.99


def test_each_half_of_the_reference_is_scored_by_the_other() -> None:
    torch.manual_seed(0)
    reference = Measured(torch.randn(40), torch.randn(40), torch.randn(40, 2).exp())
    first = torch.arange(40) < 20
    images, own = cross_foreignness(reference.of(first), reference, first)
    expected = foreignness(reference.of(first), reference.of(~first))
    torch.testing.assert_close(own["profile"][first], expected["profile"])
    both = torch.stack([expected["profile"], foreignness(reference.of(first), reference.of(first))["profile"]])
    torch.testing.assert_close(images["profile"], both.mean(0))


def test_the_general_code_takes_less_for_what_is_plain() -> None:
    torch.manual_seed(0)
    assert coded_bits(torch.full((3, 32, 32), 0.3)) < 0.1
    assert 7.5 < coded_bits(torch.rand(3, 32, 32)) < 9


def test_auroc_counts_pairs() -> None:
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])) == 0.875
    assert auroc(torch.tensor([0.0]), torch.tensor([1.0, 2.0])) == 0


def draw(folder: Path, count: int, side: int, seed: int) -> Path:
    torch.manual_seed(seed)
    for index in range(count):
        save_png(to_pil(torch.rand(3, side, side + 5) * (1 if seed else 0.1)), folder / f"{index}.png")
    return folder


def test_the_command_measures_a_folder_beside_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DiffusionModel(None, two_level_unet(), image_size=8).save(tmp_path / "g.safetensors")
    dark, plain = draw(tmp_path / "dark", 3, 20, 0), draw(tmp_path / "plain", 16, 8, 1)
    (dark / "broken.png").write_text("nothing")
    arguments = ["likelihood", "--model", str(tmp_path / "g.safetensors"), "--images", str(dark), "--steps", "1"]
    arguments += ["--profile", "2", "--workers", "0", "--device", "cpu", "--reference", str(plain)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "AUROC" in said
    assert "broken.png" in said
    with open(tmp_path / "out" / "likelihood.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [len(rows), rows[0]["set"], rows[0]["image"]] == [19, "images", "0.png"]
    measured = ["bits_per_dimension", "webp_bits", "complexity", "typicality", "profile", "loss_0", "loss_1"]
    assert list(rows[0]) == ["set", "image", *measured]
    assert all(math.isfinite(float(row["profile"])) for row in rows)
    assert {p.name for p in (tmp_path / "out").glob("*.*g")} == {"scores.png"}
    # In other batches, and in one's own order, an image's numbers are the same up to rounding.
    assert main([*arguments, "--output", str(tmp_path / "one"), "--batch_size", "1"]) == 0
    with open(tmp_path / "one" / "likelihood.csv", newline="") as file:
        for row, other in zip(rows, csv.DictReader(file), strict=True):
            assert float(row["bits_per_dimension"]) == pytest.approx(float(other["bits_per_dimension"]), rel=1e-3)


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    few = draw(tmp_path / "few", 3, 8, 1)
    model = DiffusionModel(None, two_level_unet(), image_size=8)
    options = LikelihoodOptions(steps=1, profile=1)
    with pytest.raises(ValueError, match="the reference has 3 images: 16 are needed"):
        likelihood_folder(model, few, tmp_path / "a", few, options, workers=0, device="cpu")
    with pytest.raises(ValueError, match="without classes or words"):
        likelihood_folder(model, few, tmp_path / "b", said="disc", device="cpu")
    with pytest.raises(ValueError, match="there is no class ring"):
        likelihood_folder(conditional_generator(), few, tmp_path / "b", said="ring", device="cpu")
    with pytest.raises(ValueError, match="Take between 1 and 1000 steps"):
        likelihood_folder(model, few, tmp_path / "b", options=LikelihoodOptions(steps=2000), device="cpu")
    assert not (tmp_path / "b").exists()
    labelled = likelihood_folder(
        conditional_generator(False), few, tmp_path / "c", options=options, said="disc", workers=0, device="cpu"
    )
    assert len(labelled.rows) == 3
    assert not labelled.auroc
