"""The recipes for COCO and LVIS say what the reference's do (spec: AdamW, steps, drops, images a step, backbones)."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from diffperception.configuration.inheritance import with_bases
from diffperception.training.configured import options_for

CONFIGS = Path(__file__).parents[2] / "configs" / "detection"
FILES = {"coco": ["coco"], "lvis": ["coco", "coco_lvis"]}
DROPS = {"coco": (450_000, 350_000, 420_000), "lvis": (270_000, 210_000, 250_000)}
BACKBONES = {"": "resnet50", "_r101": "resnet101", "_swin_b": "swin_base_patch4_window7_224"}
# Classes of the federated loss, share of the images below which a class is repeated, whose rules score how many boxes.
RARE = {"coco": (None, None, "coco", None), "lvis": (50, 0.001, "lvis", 300)}
ANNOTATIONS = {
    "coco": ("coco/annotations/instances_train2017.json", "coco/annotations/instances_val2017.json"),
    "lvis": ("lvis/lvis_v1_train.json", "lvis/lvis_v1_val.json"),
}


@pytest.mark.parametrize("suffix", BACKBONES)
@pytest.mark.parametrize("data", DROPS)
def test_recipe(data, suffix):
    file = str(CONFIGS / f"{FILES[data][-1]}{suffix}.yaml")
    parser = options_for([file])
    options = parser.parse([file])
    model = options.model.init_args
    assert model.backbone.partition(".")[0] == BACKBONES[suffix]
    assert (model.pretrained, model.freeze_norm) == (True, True)
    assert Path(options.output).name == data + suffix
    recipe, run = (SimpleNamespace(**values) for values in parser.instantiate(options))
    values = SimpleNamespace(**vars(recipe), trainer=run.trainer)
    evaluation = values.evaluation
    federated = model.criterion.init_args.federated_classes if model.criterion else None
    rules = (federated, values.data.repeat_threshold, evaluation.protocol, evaluation.max_dets)
    assert rules == RARE[data]
    read = (values.data.train_annotations, values.data.val_annotations)
    assert tuple(Path(path).relative_to("data").as_posix() for path in read) == ANNOTATIONS[data]
    optimizer = values.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.grad_clip_norm) == (2.5e-5, 1e-4, 1.0)
    assert optimizer.ema_decay is None
    assert values.data.batch_size * values.trainer.devices == optimizer.base_batch_size == 16
    steps, first, second = DROPS[data]
    assert values.trainer.max_steps == steps
    at = (0, 500, 1000, first - 1, first, second - 1, second)
    rates = [optimizer.lr_factor(step, steps) for step in at]
    assert rates == pytest.approx([0.01, 0.505, 1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("coco_*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_states_its_differences_alone(path):
    """Nothing that the files before it say already."""
    before = with_bases(str(path))[:-1]
    said = [set(settings(yaml.safe_load(Path(file).read_text()))) for file in before]
    assert not set(settings(yaml.safe_load(path.read_text()))) & set().union(*said)


def settings(content: dict, name: str = "") -> Iterator[tuple[str, str]]:
    """The options that a file sets, by their full names, and to what."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from settings(value, f"{name}.{key}")
        else:
            yield f"{name}.{key}", str(value)
