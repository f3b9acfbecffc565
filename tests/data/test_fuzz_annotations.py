"""Whatever is written into a COCO file, check, training and scoring judge it alike, in a sentence."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from diffperception.data import CocoDetection
from diffperception.data.check import check_coco
from diffperception.data.transforms import TrainingTransforms
from diffperception.detection.evaluator import CocoEvaluator
from diffperception.training.recipes.detection import DataOptions

VALUES: list[Any] = [None, True, False, 0, 1, -1, 7.5, 2**70, -(2**63), 10**400, 1e300, float("nan"), float("inf")]
VALUES += ["", " ", "5", "5.0", "x", "nan", "inf", "-3", "é\0", "../x", "a" * 300, [], [1], {}, {"a": 1}]
VALUES += [[[1, 2, 3, 4]], [0, 0, 0, 0], [1, 2, 3, 4], ["1", "2", "3", "4"], [None] * 4, [1e308] * 4]
VALUES += [{"size": [50, 20], "counts": "x"}, {"size": None}, [[1, 2, 3, 4, 5, 6]], [["a"] * 6]]


def mutated(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The content with one to three values replaced, removed, or entries put in."""
    new = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        entries = new[rng.choice(["images", "annotations", "annotations", "categories"])]
        entry = rng.choice(entries)
        if rng.random() < 0.1 or not isinstance(entry, dict) or not entry:
            entries.insert(rng.randrange(len(entries) + 1), copy.deepcopy(rng.choice([*VALUES, *entries])))
            continue
        key = rng.choice([*entry, "segmentation"])
        entry[key] = copy.deepcopy(rng.choice(VALUES))
        if rng.random() < 0.1:
            del entry[key]
    return new


def complaint(path: Path, folder: Path, judge: str) -> str | None:
    try:
        if judge == "train":
            options = DataOptions(path, folder, path, folder, TrainingTransforms(crop=0.0, short_sides=[]))
            options.remarks(*options.open())
        elif judge == "masks":
            dataset = CocoDetection(path, folder, masks=True)
            [dataset.target(index) for index in range(len(dataset))]
        else:
            CocoEvaluator(path).compute()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 2000), marks=pytest.mark.slow)])
def test_check_and_train_judge_alike_and_in_a_sentence(folder, content, save, seeds):
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[1, 2, 11, 2, 11, 14]]
    for seed in seeds:
        path = save(mutated(content, random.Random(seed)))
        errors = check_coco(path, folder, open_images=False).errors
        said = {judge: complaint(path, folder, judge) for judge in ("train", "masks", "score")}
        assert (said["train"] is not None) == bool(errors), (seed, said, json.loads(path.read_text()))
        assert all(text is None or (len(text) < 900 and "\n" not in text) for text in said.values()), (seed, said)
