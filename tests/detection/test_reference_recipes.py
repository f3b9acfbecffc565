"""The recipes for COCO and LVIS say what the reference's do (spec: AdamW, steps, drops, images a step, backbones)."""

from pathlib import Path

import pytest

from diffperception.cli.parsing import build_parser, parse
from diffperception.cli.train import train

CONFIGS = Path(__file__).parents[2] / "configs" / "detection"
DROPS = {"coco": (450_000, 350_000, 420_000), "lvis": (270_000, 210_000, 250_000)}
BACKBONES = {"": "resnet50", "_r101": "resnet101", "_swin_b": "swin_base_patch4_window7_224"}


@pytest.mark.parametrize("suffix", BACKBONES)
@pytest.mark.parametrize("data", DROPS)
def test_recipe(data, suffix):
    parser = build_parser(train)
    files = dict.fromkeys([data, data + suffix])
    options = parse(parser, train, [word for name in files for word in ("--config", str(CONFIGS / f"{name}.yaml"))])
    model = options.model.init_args
    assert model.backbone.partition(".")[0] == BACKBONES[suffix]
    assert (model.pretrained, model.freeze_norm) == (True, True)
    assert Path(options.output).name == data + suffix
    values = parser.instantiate(options)
    optimizer = values.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_norm) == (2.5e-5, 1e-4, 1.0)
    assert values.data.batch_size * values.trainer.devices == optimizer.base_batch_size == 16
    steps, first, second = DROPS[data]
    assert values.trainer.max_steps == steps
    at = (0, 500, 1000, first - 1, first, second - 1, second)
    rates = [optimizer.lr_factor(step, steps) for step in at]
    assert rates == pytest.approx([0.01, 0.505, 1, 1, 0.1, 0.1, 0.01])
