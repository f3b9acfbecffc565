"""Batches and folders of samples."""

import json
from pathlib import Path

import pytest
import torch

from diffperception.data.captions import read_captions
from diffperception.generation import SamplingOptions, sample
from diffperception.generation.inference import draw_samples, sample_folder
from tests.helpers.networks import CLASSES, captioned_generator, conditional_generator

GUIDED = SamplingOptions(steps=2, guidance=3.0)
TWO = SamplingOptions(steps=2)


def test_batches_are_the_images_of_their_numbers_with_classes_in_turn() -> None:
    model = conditional_generator()
    batches = list(draw_samples(model, range(3, 8), TWO, seed=5, batch_size=2))
    assert [list(numbers) for numbers, _ in batches] == [[3, 4], [5, 6], [7]]
    expected = sample(model, range(3, 8), TWO, 5, torch.tensor([1, 0, 1, 0, 1]))
    torch.testing.assert_close(torch.cat([images for _, images in batches]), expected, atol=1e-4, rtol=0)
    ((_, only),) = draw_samples(model, [4], TWO, seed=5, said=["square"])
    torch.testing.assert_close(only, sample(model, [4], TWO, 5, torch.tensor([1])), atol=1e-4, rtol=0)


def test_a_file_is_sampled_in_one_call_and_other_files_stay(tmp_path: Path) -> None:
    conditional_generator().save(tmp_path / "model.safetensors")
    output = tmp_path / "out"
    sample_folder(tmp_path / "model.safetensors", output, 3, TWO, device="cpu")
    (output / "images" / "disc" / "000009.png").touch()
    sample_folder(conditional_generator(), output, 1, TWO, ["square"], device="cpu", overwrite=True)
    found = {path.relative_to(output).as_posix() for path in output.rglob("*.png")}
    assert found == {"images/square/000000.png", "images/disc/000009.png", "grid.png"}
    with pytest.raises(ValueError, match="holds results of other settings"):
        sample_folder(conditional_generator(), output, 1, TWO, device="cpu")


def test_half_precision_stays_close(tmp_path: Path) -> None:
    model = conditional_generator()
    with torch.autocast("cpu", torch.bfloat16):
        ((_, rounded),) = draw_samples(model, range(2), TWO)
    ((_, exact),) = draw_samples(model, range(2), TWO)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.02


def test_noise_of_the_device_is_as_reproducible() -> None:
    """On the CPU both are the same."""
    model, options = conditional_generator(), SamplingOptions("ddpm", 3, noise="device")
    one, other = (sample(model, range(2), o, 1, torch.tensor([0, 1])) for o in (options, SamplingOptions("ddpm", 3)))
    assert torch.equal(one, other)
    assert model.classes == CLASSES


def test_prompts_take_turns_and_are_kept_beside_their_images(tmp_path: Path) -> None:
    model = captioned_generator()
    prompts = ["a red star", "a blue ring"]
    sample_folder(model, tmp_path / "out", 3, GUIDED, prompt=prompts, device="cpu")
    found = read_captions(tmp_path / "out" / "captions.json")
    assert found.by_name == {f"{i:06}.png": [prompts[i % 2]] for i in range(3)}
    assert len(found.of_paths(list((tmp_path / "out/images").glob("*.png")), tmp_path / "out/images")) == 3
    ((_, several),) = draw_samples(model, [0, 1, 2], GUIDED, said=prompts)
    ((_, alone),) = draw_samples(model, [1], GUIDED, said=["a star", "a blue ring"])
    torch.testing.assert_close(several[1:2], alone, atol=1e-3, rtol=0)
    ((_, other),) = draw_samples(model, [1], GUIDED, said=["a red ring"])
    assert (other - alone).abs().max() > 1e-2
    with pytest.raises(ValueError, match="holds results of other settings"):
        sample_folder(model, tmp_path / "out", 3, GUIDED, prompt=["a red star"], device="cpu")


def test_prompts_come_from_files_and_from_the_captions_that_were_learned(tmp_path: Path) -> None:
    model = captioned_generator()
    (tmp_path / "lines.txt").write_text("a red star\n\na ring\n")
    said = {"images": [{"id": 4, "file_name": "x.png"}], "annotations": [{"image_id": 4, "caption": "blue"}] * 2}
    (tmp_path / "captions.json").write_text(json.dumps(said))
    for name, wanted in (("lines.txt", ["a red star", "a ring"]), ("captions.json", ["blue", "blue"])):
        sample_folder(model, tmp_path / name[:4], 2, TWO, captions=tmp_path / name, device="cpu")
        assert list(read_captions(tmp_path / name[:4] / "captions.json")) == wanted
    sample_folder(model, tmp_path / "plain", 2, TWO, device="cpu")
    assert list(read_captions(tmp_path / "plain" / "captions.json")) == ["a red star", "a blue ring"]


def test_guidance_leads_away_from_what_is_not_wanted() -> None:
    """At every weight, away from what is wanted too leads nowhere."""
    model = captioned_generator()

    def drawn(guidance: float, unwanted: str | None) -> torch.Tensor:
        options = SamplingOptions(steps=2, guidance=guidance)
        return next(draw_samples(model, [0], options, said=["a red star"], unwanted=unwanted))[1]

    ((_, plain),) = draw_samples(model, [0], TWO, said=["a red star"])
    torch.testing.assert_close(drawn(7.0, "a red star"), plain, atol=1e-3, rtol=0)
    assert (drawn(7.0, "a blue ring") - drawn(7.0, None)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": ["a pink star"]}, "'pink' of the prompt 'a pink star'"),
        ({"prompt": ["a star"], "captions": Path("x.json")}, "either prompts or a file"),
        ({"prompt": [" "]}, "holds no text"),
        ({"prompt": ["a star"], "negative_prompt": "ring"}, "only guidance leads away"),
        ({"negative_prompt": "pink", "sampling": GUIDED}, "'pink' of the prompt 'pink'"),
        ({"classes": ["star"]}, "learned from captions, not from classes"),
        ({"prompt": ["a star"], "classes": ["star"]}, "go without classes"),
        ({"captions": Path("missing.json")}, "no annotation file"),
        ({"captions": Path("missing.txt")}, "no file missing"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        sample_folder(captioned_generator(), tmp_path / "out", 1, **{"sampling": TWO, "device": "cpu"} | options)
    assert not (tmp_path / "out").exists()


def test_a_generator_of_classes_attends_to_no_words(tmp_path: Path) -> None:
    for options in ({"prompt": ["disc"]}, {"prompt": ["disc", "square"]}, {"negative_prompt": "disc"}):
        with pytest.raises(ValueError, match="attends to no words"):
            sample_folder(conditional_generator(), tmp_path / "out", 1, GUIDED, device="cpu", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 0.0}, "threshold is a quantile"),
        ({"threshold": 1.5}, "threshold is a quantile"),
        ({"guidance_rescale": 0.7}, "belongs to guidance"),
        ({"guidance_rescale": 2.0, "guidance": 2.0}, "guidance_rescale is a fraction"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SamplingOptions(**options)  # type: ignore[arg-type]


def test_thresholds_and_rescaled_guidance_change_strongly_guided_images() -> None:
    model = captioned_generator()
    options = [{}, {"threshold": 0.9}, {"guidance_rescale": 0.7}, {"clip": False}]
    images = [
        next(draw_samples(model, [0], SamplingOptions(steps=2, guidance=9.0, **each), said=["a red star"]))[1]  # type: ignore[arg-type]
        for each in options
    ]
    assert all((image - images[0]).abs().max() > 1e-3 for image in images[1:])
