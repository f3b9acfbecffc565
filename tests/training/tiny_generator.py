"""A folder of small pictures, the configuration that trains a generator on it, and one that loses power."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from diffperception.diffusion import Objective
from diffperception.generation import DiffusionModel
from diffperception.models import UNet
from tests.training.tiny_detector import PowerCut


def write_tiny_pictures(folder: Path, number: int = 6) -> Path:
    """Noise in two folders, the classes."""
    rng = np.random.default_rng(0)
    for i in range(number):
        path = folder / ("even" if i % 2 == 0 else "odd") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(path)
    return folder


def write_tiny_generator(folder: Path) -> Path:
    """The pictures and a configuration with everything that has a state: labels, dropout, learned times and range."""
    pictures = str(write_tiny_pictures(folder / "pictures"))
    unet = {
        "out_channels": 6,
        "channels": 32,
        "channel_mult": [1, 1],
        "num_res_blocks": 1,
        "attention": [],
        "num_head_channels": 32,
        "dropout": 0.1,
    }
    config = {
        "task": "generation",
        "model": {
            "class_path": "tests.training.tiny_generator.UnpluggedModel",
            "init_args": {
                "network": {"class_path": "diffperception.models.UNet", "init_args": unet},
                "num_timesteps": 3,
                "learned_range": True,
                "image_size": 8,
                "null_class": True,
            },
        },
        "data": {"images": pictures, "val_images": pictures, "labelled": True, "batch_size": 4, "workers": 0},
        "objective": {"times": "loss_second_moment", "label_dropout": 0.3},
        "optimizer": {"lr": 0.003, "base_batch_size": 4, "warmup_steps": 2, "ema_decay": 0.9},
        "trainer": {"max_steps": 12, "log_every": 1, "checkpoint_every": 3, "accelerator": "cpu"},
        "preview": {"every": 4, "num_samples": 2, "num_held_out": 4, "sampling": {"steps": 2}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


class UnpluggedModel(DiffusionModel):
    """Ends the program with PowerCut when its loss is asked for the `die_at`-th time."""

    def __init__(
        self,
        classes: Sequence[str] | None,
        network: UNet,
        num_timesteps: int = 1000,
        learned_range: bool = False,
        image_size: int | tuple[int, int] = 64,
        null_class: bool = False,
        die_at: int | None = None,
    ):
        super().__init__(
            classes,
            network,
            schedule="cosine",
            num_timesteps=num_timesteps,
            learned_range=learned_range,
            image_size=image_size,
            null_class=null_class,
        )
        self.record(die_at=None)
        self.left = die_at

    def objective(self, min_snr: float | None = None) -> Objective:
        """The loss, for as long as there is power; the held-out loss does not count."""
        return super().objective(min_snr) if self.left is None else UnpluggedObjective(self)


class UnpluggedObjective(Objective):
    def __init__(self, model: UnpluggedModel):
        super().__init__(model.schedule, model.prediction, model.learned_range)
        self.model = model

    def __call__(self, *arguments):  # type: ignore[no-untyped-def]
        if self.model.training and self.model.left is not None:
            self.model.left -= 1
            if self.model.left == 0:
                raise PowerCut
        return super().__call__(*arguments)
