"""A generator of images: a UNet together with the path it was trained on and what its images are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffperception import weights
from diffperception.diffusion import (
    Denoiser,
    NetworkDenoiser,
    Objective,
    Prediction,
    ScheduleName,
    classifier_free_guidance,
    named_schedule,
)
from diffperception.models import UNet


class DiffusionModel(nn.Module):
    """A UNet with its path from image to noise: all that sampling needs to know, in one file.

    Args:
        classes: names of the labels, None for a model without.
        unet: the network; with ``learned_range`` it has twice as many channels of output as of input.
        schedule: linear (DDPM), cosine (Improved DDPM) or straight (flow matching; its ``prediction`` is ``flow``).
        num_timesteps: T of the discrete schedules.
        prediction: what the network predicts.
        learned_range: it learns the variance too (Improved DDPM, arXiv 2102.09672).
        image_size: side, or height and width, of the images it learned from; what is sampled by default.
        absent_label: the UNet's last label stands for none, as classifier-free guidance needs.

    Raises:
        ValueError: if UNet and arguments do not fit each other.
    """

    def __init__(
        self,
        classes: Sequence[str] | None,
        unet: UNet,
        schedule: ScheduleName = "linear",
        num_timesteps: int = 1000,
        prediction: Prediction = "eps",
        learned_range: bool = False,
        image_size: int | tuple[int, int] = 64,
        absent_label: bool = False,
    ) -> None:
        super().__init__()
        height, width = both_sides(image_size)
        self.arguments: dict[str, Any] = {
            "classes": None if classes is None else list(classes),
            "unet": unet,
            "schedule": schedule,
            "num_timesteps": num_timesteps,
            "prediction": prediction,
            "learned_range": learned_range,
            "image_size": [height, width],
            "absent_label": absent_label,
        }
        self.unet = unet
        self.schedule = named_schedule(schedule, num_timesteps)
        self.prediction = prediction
        self.learned_range = learned_range
        self.image_size = (height, width)
        self.classes = None if classes is None else list(classes)
        self.absent_label = absent_label
        self._check(schedule)

    def _check(self, schedule: ScheduleName) -> None:
        channels, outputs = self.unet.in_channels, self.unet.out_channels
        if outputs != channels * (2 if self.learned_range else 1):
            raise ValueError(
                f"The UNet has {channels} channels in and {outputs} out: learned_range needs twice as many out, else"
                " as many as in; set unet.out_channels or learned_range."
            )
        if (self.prediction == "flow") != (schedule == "straight"):
            raise ValueError("The prediction flow belongs to the schedule straight, and to no other: set both.")
        self.unet.check_size(*self.image_size)
        wanted = None if self.classes is None else len(self.classes) + self.absent_label
        if self.unet.num_classes != wanted:
            raise ValueError(
                f"The UNet has {self.unet.num_classes or 'no'} labels, but there are {wanted or 'no'} classes"
                f"{' (one of them absent)' if self.absent_label else ''}: set unet.num_classes to {wanted or 'null'}."
            )

    @property
    def device(self) -> torch.device:
        return self.unet.stem.weight.device

    def network(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The UNet's output for noisy images (B, C, H, W), times (B,) as it is told them, and labels (B,)."""
        return self.unet(x, t, labels)

    def objective(self, min_snr: float | None = None) -> Objective:
        """The training loss."""
        return Objective(self.schedule, self.prediction, self.learned_range, min_snr)

    def denoiser(self, labels: Tensor | None = None, guidance: float = 1.0) -> Denoiser:
        """What samplers work on.

        Args:
            labels: (B,) int64 classes wanted; None where the model has none, or for no class in particular.
            guidance: weight of classifier-free guidance; 1 is none.

        Raises:
            ValueError: if labels or guidance are asked of a model that has not learned them.
        """
        if self.classes is None:
            if labels is not None or guidance != 1.0:
                raise ValueError("This model was trained without classes: leave labels and guidance out.")
            return self._denoiser(None)
        if (labels is None or guidance != 1.0) and not self.absent_label:
            raise ValueError(
                "This model has not learned images without a label, which unlabelled samples and guidance need: give"
                " labels and guidance 1, or train it with absent_label."
            )
        if labels is None:
            return self._denoiser(self.absent)
        if guidance == 1.0:
            return self._denoiser(labels)
        return classifier_free_guidance(self._denoiser(labels), self._denoiser(self.absent), guidance)

    @property
    def absent(self) -> Tensor:
        """0-d, the label that stands for none."""
        assert self.classes is not None
        return torch.tensor(len(self.classes), device=self.device)

    def _denoiser(self, labels: Tensor | None) -> Denoiser:
        def network(x: Tensor, t: Tensor) -> Tensor:
            return self.unet(x, t, None if labels is None else labels.expand(len(x)))

        return NetworkDenoiser(network, self.schedule, self.prediction, self.learned_range)

    def save(self, path: str | Path) -> None:
        """Write weights and constructor arguments, the UNet's among them, to one safetensors file."""
        weights.save_model(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "DiffusionModel":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds another model, or none.
        """
        model = weights.load_model(path)
        if not isinstance(model, cls):
            raise ValueError(f"{path} holds a {type(model).__name__}, not a generator of images.")
        return model


def both_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a square's side, or of the two as they are."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
