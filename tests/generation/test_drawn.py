"""Whether pictures show what captions say, on pictures of which that is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffperception.cli.main import main
from diffperception.data import ShapesSettings, write_shapes
from diffperception.data.shapes import draw_scene
from diffperception.data.shapes_captions import describe_scene
from diffperception.generation.drawn import Statement, is_drawn, judge_drawn, statement_of

SETTINGS = ShapesSettings(train=0, val=24, min_side=64, max_side=64, max_objects=2, captions=True)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_shapes(folder := tmp_path_factory.mktemp("shapes") / "shapes", SETTINGS, workers=1)
    return folder


@pytest.mark.parametrize(
    ("caption", "statement"),
    [
        ("a small red star left of a blue ring", Statement([("red", "star"), ("blue", "ring")], "left of")),
        ("一个小的红色星形在一个蓝色圆环的左边", Statement([("red", "star"), ("blue", "ring")], "left of")),
        ("a picture of a white cross", Statement([("white", "cross")], None)),
        ("一个白色十字形的图片", Statement([("white", "cross")], None)),
        (
            "a red star, a red ring and a green ellipse",
            Statement([("red", "star"), ("red", "ring"), ("green", "ellipse")], None),
        ),
    ],
)
def test_what_a_caption_says(caption: str, statement: Statement) -> None:
    assert statement_of(caption) == statement


@pytest.mark.parametrize("caption", ["a dog", "a red dog", "star red", "a red star and a ring"])
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="is no caption of the shapes data set"):
        statement_of(caption)


def test_both_languages_say_the_same() -> None:
    for index in range(20):
        rng = np.random.default_rng(index)
        for caption in describe_scene(rng, draw_scene(rng, SETTINGS)):
            assert statement_of(caption["en"]) == statement_of(caption["zh"])


@pytest.mark.parametrize(("language", "size", "shapes_right"), [("", None, 0.85), ("_zh", (24, 24), 0.65)])
def test_the_judge_is_right_on_real_pictures(
    shapes: Path, language: str, size: tuple[int, int], shapes_right: float
) -> None:
    found = judge_drawn(shapes / "val", shapes / f"annotations/captions_val{language}.json", size)
    assert found.images == 24
    assert found.colors > 0.95
    assert found.things >= shapes_right
    assert found.order > 0.8
    assert found.related >= 5


def test_what_is_drawn_otherwise_is_wrong(shapes: Path) -> None:
    """Each caption with the picture of another, and turned round."""
    content = json.loads((shapes / "annotations/captions_val.json").read_text())
    texts = [content["annotations"][5 * i]["caption"] for i in range(24)]
    images = [np.asarray(Image.open(shapes / f"val/{i:06}.png")) / 255 for i in range(24)]
    others = [is_drawn(image, statement_of(text)) for image, text in zip(images, texts[1:] + texts[:1], strict=True)]
    assert np.mean([things for _, _, things, _ in others]) < 0.15
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    related = [
        (image, said) for image, text in zip(images, texts, strict=True) if (said := statement_of(text)).relation
    ]
    turned = [is_drawn(image, said._replace(relation=opposite[str(said.relation)]))[3] for image, said in related]
    assert not any(turned)


def test_the_command_scores_a_folder_beside_real_pictures(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ["evaluate", "--drawn", str(shapes / "val"), "--captions", str(shapes / "annotations/captions_val.json")]
    real = [
        "--reference",
        str(shapes / "val"),
        "--reference_captions",
        str(shapes / "annotations/captions_val_zh.json"),
    ]
    assert main([*drawn, *real, "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["drawn"] == found["real"]
    assert f"{found['drawn']['colors']:.3f}" in capsys.readouterr().out
    assert main([*drawn, *real[:2]]) == 2
    assert "neither" in capsys.readouterr().err
