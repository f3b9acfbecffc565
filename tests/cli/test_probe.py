"""`diffperception probe`: the table, the file, the picture and the suggestion."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffperception.cli.probe import command
from diffperception.configuration.parser import call
from diffperception.segmentation import ProbeScore
from diffperception.segmentation.probe import expected_seconds, suggest
from tests.helpers.networks import tiny_unet
from tests.helpers.pixel_classifiers import diffusion
from tests.helpers.scenes import write_scenes


def test_blocks_and_timesteps_are_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scenes(tmp_path / "data", range(4))
    tiny_unet().save(tmp_path / "unet.safetensors")
    arguments = ["--model", str(tmp_path / "unet.safetensors"), "--output", str(tmp_path / "probe"), "--device", "cpu"]
    arguments += [f"--data.{kind}={tmp_path / 'data' / kind}" for kind in ("images", "masks")]
    arguments += ["--data.classes", "[red, green, blue]", "--timesteps", "800", "20", "--pixels", "200"]
    assert call(command, [*arguments, "--window", "32"]) == 0
    content = json.loads((tmp_path / "probe" / "probe.json").read_text())
    scores = [probe["miou"] for probe in content["scores"]]
    assert scores == sorted(scores, reverse=True)
    assert {(p["timestep"], p["block"]) for p in content["scores"]} == {(t, b) for t in (800, 20) for b in range(6)}
    found = {(probe["timestep"], probe["block"]): probe["miou"] for probe in content["scores"]}
    assert all(found[20, block] > 1.5 * found[800, block] for block in (3, 4, 5)), "colours drown in noise"
    assert {(p["block"], p["channels"], p["stride"]) for p in content["scores"]} >= {(0, 64, 4), (5, 32, 1)}
    said = capsys.readouterr().out
    assert f"--features.blocks '{content['suggested']['blocks']}' --features.timesteps '[20, 800]'" in said
    assert f"{100 * scores[0]:.1f}" in said
    with Image.open(tmp_path / "probe" / "probe.png") as picture:
        assert min(picture.size) > 100
    assert "2 timesteps, 6 blocks, 4 images: about" in said
    assert "will take more than" not in said
    with pytest.raises(ValueError, match="overwrite"):
        call(command, arguments)
    with pytest.raises(ValueError, match=r"no decoder blocks \[\]"):
        call(command, [*arguments, "--overwrite", "--blocks", "[]"])
    short = ["--seconds", "0", "--blocks", "4", "--window", "32", "--overwrite", "--data.max_images", "2"]
    assert call(command, [*arguments, *short]) == 0
    (tmp_path / "probe" / ".diffperception").unlink()  # then the files are somebody's
    with pytest.raises(ValueError, match=r"probe\.json would be replaced"):
        call(command, [*arguments, *short])
    said = capsys.readouterr().out
    assert "1 blocks, 2 images" in said
    assert "note: the first timestep alone will take more than --seconds 0" in said


def test_the_expected_time_grows_with_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    features, image, seconds = diffusion(), torch.rand(3, 32, 32), iter(range(0, 99, 3))
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))  # three seconds pass from one look at it to the next
    assert expected_seconds(features, [image]) == 3
    assert expected_seconds(features, [image] * 100 + [torch.rand(3, 320, 320)]) == 3 * 200


def test_the_best_on_average_are_suggested() -> None:
    scores = {(50, 3): 0.9, (50, 4): 0.1, (250, 3): 0.2, (250, 4): 0.8, (600, 3): 0.1, (600, 4): 0.1, (20, 3): 0.5}
    probes = [ProbeScore(t, block, miou, 64, 4) for (t, block), miou in scores.items()]
    assert suggest(probes) == {"blocks": [3, 4], "timesteps": [20, 50, 250]}
    many = [ProbeScore(50, block, block / 10, 64, 4) for block in range(8)]
    assert suggest(many) == {"blocks": [4, 5, 6, 7], "timesteps": [50]}
