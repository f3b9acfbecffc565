"""`track` and `evaluate --tracks` as a user calls them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from diffperception.cli.main import main
from diffperception.data import ShapesSettings, write_shapes
from diffperception.data.shapes import CLASSES
from tests.detection.scenes import tiny_detector

FEW = ["--device", "cpu", "--workers", "0", "--birth", "0.03", "--keep", "0.01", "--steps", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two clips of three frames."""
    folder = tmp_path_factory.mktemp("track")
    settings = ShapesSettings(train=0, val=0, clips=2, frames=3, min_side=48, max_side=56, max_objects=3)
    write_shapes(folder / "shapes", settings, workers=1)
    tiny_detector(classes=list(CLASSES)).save(folder / "model.safetensors")
    return folder


def command(data: Path, output: Path, *options: str, images: Path | None = None) -> list[str]:
    where = ["--images", str(images or data / "shapes/clips"), "--output", str(output)]
    return ["track", "--model", str(data / "model.safetensors"), *where, *FEW, *options]


def test_tracks_are_written_scored_and_drawn(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = str(data / "shapes/annotations/clips.json")
    assert main(command(data, tmp_path / "out", "--annotations", annotations, "--num_pictures", "1")) == 0
    said = capsys.readouterr().out
    assert "HOTA" in said
    rows = json.loads((tmp_path / "out/tracks.json").read_text())
    assert {"image_id", "category_id", "bbox", "score", "track_id", "video_id"} == rows[0].keys()
    frames = json.loads((tmp_path / "out/images.json").read_text())["images"]
    assert [(frame["file_name"], frame["video_id"], frame["frame_id"]) for frame in frames] == [
        (f"{clip:06d}/{number:06d}.png", clip + 1, number) for clip in (0, 1) for number in range(3)
    ]
    lines = [line.split(",") for line in (tmp_path / "out/mot/000000.txt").read_text().split()]
    assert len(lines) == sum(row["video_id"] == 1 for row in rows)
    assert [float(value) for value in lines[0][2:6]] == pytest.approx(rows[0]["bbox"], abs=0.01)
    assert (lines[0][:2], lines[0][7:]) == (["1", str(rows[0]["track_id"])], ["-1"] * 3)
    with Image.open(tmp_path / "out/pictures/000000.gif") as picture:
        assert picture.n_frames == 3
    score = ["evaluate", "--tracks", str(tmp_path / "out/tracks.json"), "--annotations", annotations]
    assert main([*score, "--output", str(tmp_path / "scores")]) == 0
    assert capsys.readouterr().out.split("\n\n")[0] in said
    written = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("out", "scores")]
    assert written[0] == written[1]


def test_a_clip_is_tracked_alike_alone_and_with_others(data: Path, tmp_path: Path) -> None:
    plain = ("--num_pictures", "0")
    assert main(command(data, tmp_path / "both", *plain)) == 0
    assert main(command(data, tmp_path / "one", *plain, images=data / "shapes/clips/000000")) == 0
    assert (tmp_path / "one/mot/000000.txt").read_bytes()
    assert (tmp_path / "both/mot/000000.txt").read_bytes() == (tmp_path / "one/mot/000000.txt").read_bytes()
    assert main(command(data, tmp_path / "other", *plain, "--carry", "false", images=data / "shapes/clips/000000")) == 0
    assert (tmp_path / "other/mot/000000.txt").read_bytes() != (tmp_path / "one/mot/000000.txt").read_bytes()


def test_what_cannot_be_tracked_is_one_sentence(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, side in enumerate((48, 50)):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        Image.new("RGB", (side, 48)).save(tmp_path / f"mixed/{number}.png")
    annotations = json.loads((data / "shapes/annotations/clips.json").read_text())
    annotations["images"][0]["file_name"] = "000000/gone.png"
    (tmp_path / "gone.json").write_text(json.dumps(annotations))
    for arguments, words in (
        (command(data, tmp_path / "out", images=tmp_path / "mixed"), "the frames of clip mixed differ in size"),
        (command(data, tmp_path / "out", "--annotations", str(tmp_path / "gone.json")), "gone.png"),
        (command(data, tmp_path / "out", images=tmp_path / "absent"), "absent"),
        (command(data, tmp_path / "out", "--start_time", "1000"), "start_time is 1000"),
        (
            ["evaluate", "--tracks", "absent.json", "--annotations", str(tmp_path / "gone.json")],
            "no results file absent",
        ),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert not (tmp_path / "out").exists()
