"""`diffperception extract`: what it writes, what it says before, and how it goes on."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffperception.configuration.parser import call
from diffperception.data.images import read_image, to_float
from diffperception.models import Model
from diffperception.segmentation import DiffusionFeatures, ExtractedFeatures, PixelSegmenter, extract_features
from diffperception.segmentation.feature_cache import load_maps
from diffperception.training import FitOptions, fit_ensemble
from diffperception.training.options import TrainerOptions
from diffperception.visualization.draw import save_png, to_pil
from tests.helpers.networks import tiny_unet


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extract")
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(("a.png", "b.png", "more/a.png")):
        save_png(to_pil(torch.rand(3, 20, 24 + number, generator=generator)), folder / "images" / name)
    tiny_unet().save(folder / "unet.safetensors")
    return folder


def run(root: Path, output: Path, *options: str) -> None:
    arguments = ["--features", "diffperception.segmentation.DiffusionFeatures", "--device", "cpu"]
    arguments += ["--features.generator", str(root / "unet.safetensors"), "--features.blocks", "[0, 4]"]
    arguments += ["--features.timesteps", "[50]", "--features.window", "32"]
    assert (
        call(extract_features, [*arguments, "--images", str(root / "images"), "--output", str(output), *options]) == 0
    )


def features_of(root: Path) -> DiffusionFeatures:
    return DiffusionFeatures(root / "unet.safetensors", [0, 4], [50], 32)


def test_the_files_hold_the_extractors_maps(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "features"
    run(root, output)
    written = sorted(str(path.relative_to(output)) for path in output.rglob("[!.]*.*"))
    assert written == [
        "a.png.safetensors",
        "b.png.safetensors",
        "extractor.safetensors",
        "more/a.png.safetensors",
        "settings.json",
    ]
    maps = load_maps(output / "more" / "a.png.safetensors")
    wanted = features_of(root).maps(read_image(root / "images" / "more" / "a.png") / 255)
    assert maps.size == (20, 26)
    assert maps.strides == wanted.strides
    for ours, theirs in zip(maps.maps, wanted.maps, strict=True):
        assert ours.dtype == torch.float16
        assert torch.allclose(ours.float(), theirs, rtol=2e-3, atol=1e-3)
    on_disk = sum(path.stat().st_size for path in output.rglob("*.png.safetensors"))
    assert f": {on_disk} bytes" in capsys.readouterr().out


def test_it_goes_on_with_what_is_missing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "features"
    run(root, output)
    kept, lost = output / "a.png.safetensors", output / "b.png.safetensors"
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    capsys.readouterr()
    run(root, output)
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == content
    said = capsys.readouterr().out
    assert "of which" in said
    run(root, output)
    assert "of which 0 bytes are to be written" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other settings \(dtype\)"):
        run(root, output, "--dtype", "float32")


def test_an_interrupted_run_is_gone_on_with(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, encoded = DiffusionFeatures.encode, []

    def interrupted(self: DiffusionFeatures, images: torch.Tensor) -> list[torch.Tensor]:
        encoded.append(images)
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return whole(self, images)

    monkeypatch.setattr(DiffusionFeatures, "encode", interrupted)
    output = tmp_path / "features"
    with pytest.raises(KeyboardInterrupt):
        run(root, output)
    monkeypatch.undo()
    first = output / "a.png.safetensors"
    before, lost = first.stat().st_mtime_ns, output / "b.png.safetensors"
    part = output / ".diffperception-part-1"
    part.write_bytes(first.read_bytes())  # of one that was killed while it wrote
    assert not lost.exists()
    run(root, output)
    assert first.stat().st_mtime_ns == before
    assert not part.exists()
    run(root, tmp_path / "at_once")
    assert lost.read_bytes() == (tmp_path / "at_once" / lost.name).read_bytes()


def test_a_file_that_was_changed_is_named_and_written_anew_once_it_is_gone(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "features")
    file = tmp_path / "features" / "b.png.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"b\.png\.safetensors was changed since a run wrote it"):
        run(root, tmp_path / "features")
    assert file.read_bytes() == content[:-100]
    file.unlink()
    run(root, tmp_path / "features")
    assert file.read_bytes() == content


def test_features_of_another_generator_are_not_mixed(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "features")
    other, options = tiny_unet(), ["--features.generator", str(tmp_path / "unet.safetensors")]
    other.save(tmp_path / "unet.safetensors")
    run(root, tmp_path / "features", *options)
    other.stem.weight.data += 1
    other.save(tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"other settings \(weights\)"):
        run(root, tmp_path / "features", *options)


def test_the_limit_is_that_of_all_files_and_the_disk_that_of_those_to_write(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"take 116.2 kB, but only 1.0 kB are free"):
        run(root, tmp_path / "features")
    monkeypatch.undo()
    run(root, tmp_path / "features", "--max_bytes", "117kB")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    run(root, tmp_path / "features")
    with pytest.raises(ValueError, match=r"take 116.2 kB, more than the limit of 115.0 kB"):
        run(root, tmp_path / "features", "--max_bytes", "115kB")
    with pytest.raises(ValueError, match="no amount of memory"):
        run(root, tmp_path / "features", "--max_bytes", "1e999", "--images", "nowhere")


def test_a_picture_of_broken_pixels_is_tried_once(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, whole = tmp_path / "images", (root / "images" / "a.png").read_bytes()
    images.mkdir()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    options = ["--images", str(images)]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no image can be read: .*cut\.png"):
            run(root, tmp_path / "features", *options)
    (images / "good.png").write_bytes(whole)
    run(root, tmp_path / "features", *options)
    capsys.readouterr()
    run(root, tmp_path / "features", *options)
    said = capsys.readouterr().out
    assert "of which 0 bytes are to be written" in said
    assert "cut.png" in said
    (images / "cut.png").write_bytes(whole)
    run(root, tmp_path / "features", *options)
    assert (tmp_path / "features" / "cut.png.safetensors").exists()


def test_broken_files_are_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"no image can be read: .*bad\.png"):
        run(root, tmp_path / "features", "--images", str(tmp_path / "images"))
    assert not (tmp_path / "features").exists()


def test_a_picture_that_was_replaced_is_extracted_anew(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "images", tmp_path / "images")
    options = ["--images", str(tmp_path / "images")]
    run(root, tmp_path / "features", *options)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").glob("*.png.safetensors")}
    about = (tmp_path / "images/a.png").stat()
    # Of the same size and time, as tools that keep times leave it.
    picture = (tmp_path / "images/a.png").read_bytes()
    Image.fromarray(255 - np.asarray(Image.open(tmp_path / "images/a.png"))).save(tmp_path / "images/a.png")
    os.utime(tmp_path / "images/a.png", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (tmp_path / "images/a.png").read_bytes() != picture
    capsys.readouterr()
    run(root, tmp_path / "features", *options)
    assert "are kept from an earlier call, 1 are to be made, 1 of them again" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").glob("*.png.safetensors")}
    assert [name for name in after if after[name] != before[name]] == ["a.png.safetensors"]
    run(root, tmp_path / "anew", *options)
    for name in after:
        assert (tmp_path / "features" / name).read_bytes() == (tmp_path / "anew" / name).read_bytes()


def test_a_limit_that_is_too_small_says_what_would_fit(root: Path, tmp_path: Path) -> None:
    sizes = {h * w for h, w in features_of(root).map_sizes(20, 26)}
    assert len(sizes) == 2
    with pytest.raises(
        ValueError, match=r"of 3 images take .* limit of 100.0 kB: 1 of the images .* float16 .* block 4"
    ):
        run(root, tmp_path / "features", "--dtype", "float32", "--max_bytes", "100kB")
    assert not (tmp_path / "features").exists()


def test_broken_images_and_other_files(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "images" / "good.png").write_bytes((root / "images" / "a.png").read_bytes())
    run(root, tmp_path / "features", "--images", str(tmp_path / "images"), "--short_side", "16")
    said = capsys.readouterr().out
    assert "feature maps\n" in said
    assert "bad.png" in said
    assert load_maps(tmp_path / "features" / "good.png.safetensors").size == (16, 19)
    assert json.loads((tmp_path / "features" / "settings.json").read_text())["short_side"] == 16
    with pytest.raises(ValueError, match="is not empty: choose another"):
        run(root, tmp_path / "images")


def test_what_was_extracted_trains_the_same_classifiers(root: Path, tmp_path: Path, monkeypatch) -> None:
    """Maps come from the files, where the images are those of the files, and the segmenter works without them."""
    run(root, tmp_path / "features")
    extractor, kept = features_of(root), ExtractedFeatures(tmp_path / "features")
    images = [to_float(read_image(path)) for path in sorted((root / "images").glob("*.png"))]
    masks = [(image[0] > 0.5).long() for image in images]
    options, cpu = FitOptions(max_minibatches=5), TrainerOptions(accelerator="cpu")
    computed = fit_ensemble(extractor, images, masks, 2, 2, options, trainer=cpu)
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionFeatures, "encode", lambda *_: pytest.fail("computed what is on disk"))
        read = fit_ensemble(kept, images, masks, 2, 2, options, trainer=cpu)
    for name, value in computed.state_dict().items():
        assert torch.equal(read.state_dict()[name], value)
    PixelSegmenter(kept, read, ["dark", "bright"]).save(tmp_path / "model.safetensors")
    kept.save(tmp_path / "extractor.safetensors")
    shutil.rmtree(tmp_path / "features")
    loaded, other = PixelSegmenter.load(tmp_path / "model.safetensors"), torch.rand(3, 21, 30)
    assert isinstance(loaded.features, DiffusionFeatures)
    assert isinstance(Model.load(tmp_path / "extractor.safetensors"), DiffusionFeatures)
    expected = PixelSegmenter(extractor, computed, ["dark", "bright"]).segment(other, probabilities=True)
    assert torch.equal(loaded.segment(other, probabilities=True).probabilities, expected.probabilities)
