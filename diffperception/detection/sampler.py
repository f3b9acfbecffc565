"""From noise to boxes: the sampling loop of DiffusionDet (arXiv 2211.09788, algorithm 2), batched."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, nms

from diffperception.detection.boxes import clamp_min_size, decode_boxes, encode_boxes
from diffperception.detection.heads.boxes import HeadOutput
from diffperception.detection.start import Start
from diffperception.devices import to_device
from diffperception.diffusion import DiscreteSchedule, SampleNoise, add_noise, ddim_step, derive_seed, spread_noise

# (boxes (B, N, 4) xyxy pixels, t (B,)) -> the last stage's output, its tensors (B, N, ...)
BoxDenoiser = Callable[[Tensor, Tensor], HeadOutput]
Mode = Literal["ddim", "fixed_time", "fresh_boxes"]
NOISE: Literal["noise"] = "noise"  # in place of a `start_time`: that there is none


@dataclass
class Step:
    """One pass through the head: its time, its noisy boxes (B, N, 4), and what came out, tensors (B, N, ...)."""

    t: int
    noisy_boxes: Tensor
    output: HeadOutput


@dataclass(frozen=True)
class BoxSampler:
    """How noise becomes boxes.

    Args:
        steps: passes through the head; more are slower and a little better.
        num_boxes: boxes to start from, whatever the training used; more find more in crowded images. Null: as many as
            in training.
        eta: how much noise a step adds: 1 is the ancestral step, 0 the deterministic one.
        renewal_threshold: box renewal: between steps, boxes whose best class is not above this probability are drawn
            anew; null keeps all.
        ensemble: pool the predictions of all steps, not of the last alone.
        nms_threshold: of two boxes of a class whose IoU is above this, only the better counts; null keeps all.
        box_voting: what NMS leaves becomes the mean, weighted by score, of all boxes of its class whose IoU with it is
            above this, such as 0.75 (arXiv 1505.01749); null leaves it as it is.
        mode: `ddim` walks t from T to 0; two controls show what the walk is worth: `fixed_time` tells the network, and
            the step from one noise level to the next, that t is T - 1 every time, while the levels stepped to fall as
            in `ddim`; `fresh_boxes` starts every step from new noise.
        spread: the boxes of pure noise are spread evenly over places and sizes, and so find more objects where they are
            few, instead of being drawn independently of each other.
        start_time: where boxes are given to start from, they are noised to this time of the schedule, 0 to T - 1, and
            the steps go on from there: the smaller, the more of them is kept. Null: there are none.

    Raises:
        ValueError: a value is out of its range.
    """

    steps: int = 1
    num_boxes: int | None = None
    eta: float = 1.0
    renewal_threshold: float | None = 0.5
    ensemble: bool = True
    nms_threshold: float | None = 0.5
    box_voting: float | None = None
    mode: Mode = "ddim"
    spread: bool = False
    start_time: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.num_boxes is not None and self.num_boxes < 1):
            raise ValueError(f"steps and num_boxes must be at least 1, not {self.steps} and {self.num_boxes}")
        fractions = {"eta": self.eta, "renewal_threshold": self.renewal_threshold, "nms_threshold": self.nms_threshold}
        for name, value in fractions.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: it must be from 0 to 1")
        if self.box_voting is not None and not 0 <= self.box_voting < 1:
            raise ValueError(f"box_voting is {self.box_voting}: it must be from 0 to below 1")
        if self.start_time is not None and self.start_time < 0:
            raise ValueError(f"start_time is {self.start_time}: it must be a time of the schedule, from 0 on")
        if self.mode not in get_args(Mode):
            raise ValueError(f"there is no mode {self.mode!r}: it is one of {', '.join(get_args(Mode))}")

    def changed(self, **settings: Any) -> "BoxSampler":
        """The same with some settings replaced; those that are None stay, and a `start_time` of NOISE is none."""
        given = {name: value for name, value in settings.items() if value is not None}
        if given.get("start_time") == NOISE:
            given["start_time"] = None
        return replace(self, **given)

    def sample(
        self,
        denoise: BoxDenoiser,
        schedule: DiscreteSchedule,
        image_sizes: Tensor,
        seeds: Sequence[int],
        signal_scale: float,
        start: Start | None = None,
    ) -> list[Step]:
        """Denoise boxes step by step, random ones unless some are given, and return every step, the noisiest first.

        Args:
            image_sizes: (B, 4) width, height, width, height in pixels.
            seeds: one per image.
            signal_scale: size of the signal beside the unit noise.
            start: boxes to start from, noised to `start_time` (SDEdit, arXiv 2108.01073).
        """
        noise, times = to_device(self.draw(seeds), image_sizes.device), self.times(schedule)
        if start is not None:
            noised = add_noise(schedule, start.boxes, times[0], noise[0])
            noise = torch.cat([torch.where(start.given[..., None], noised, noise[0])[None], noise[1:]])
        return self.walk(denoise, schedule, times, noise, image_sizes, signal_scale)

    def times(self, schedule: DiscreteSchedule) -> list[int]:
        """The time of each step, from the first on, and the clean end, -1."""
        return schedule.grid(self.steps, "diffusiondet", self.start_time).tolist()

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """All the noise of a batch: (2 * steps - 1, B, N, 4), on the CPU.

        The first boxes, then the noise and fresh boxes of each step but the last. All are drawn whatever the settings
        are, so that these do not shift later draws.
        """
        noise, like = SampleNoise(seeds), torch.empty(len(seeds), self.num_boxes or 0, 4)
        drawn = torch.stack([noise(like) for _ in range(2 * self.steps - 1)])
        for number in range(0, len(drawn), 2) if self.spread else []:
            drawn[number] = spread_noise([derive_seed(seed, number) for seed in seeds], *like.shape[1:])
        return drawn

    def walk(
        self,
        denoise: BoxDenoiser,
        schedule: DiscreteSchedule,
        times: Sequence[int],
        noise: Tensor,
        image_sizes: Tensor,
        signal_scale: float,
    ) -> list[Step]:
        """All steps, as of `sample`, at the times that `times` gives and with what `draw` drew: a function of these."""
        z, *draws = noise
        steps: list[Step] = []
        for number, (t, s) in enumerate(itertools.pairwise(times)):
            time = times[0] if self.mode == "fixed_time" else t
            noisy = clamp_min_size(decode_boxes(z, image_sizes, signal_scale))
            output = denoise(noisy, torch.full(z.shape[:1], time, device=z.device))
            steps.append(Step(time, noisy, output))
            if s >= 0:
                step_noise, fresh = draws[2 * number : 2 * number + 2]
                x0 = encode_boxes(output.boxes, image_sizes, signal_scale).clamp(-signal_scale, signal_scale)
                stepped = ddim_step(schedule, z, x0, time, s, self.eta, step_noise)
                z = self._renew(stepped, fresh, output)
        return steps

    def _renew(self, stepped: Tensor, fresh: Tensor, output: HeadOutput) -> Tensor:
        """Boxes of the next step (B, N, 4): the step's own where they are worth going on with, else fresh ones."""
        if self.mode == "fresh_boxes":
            return fresh
        if self.renewal_threshold is None:
            return stepped
        keep = output.logits.amax(-1, keepdim=True).sigmoid() > self.renewal_threshold
        return torch.where(keep, stepped, fresh)

    def candidates(self, steps: Sequence[Step]) -> dict[str, Tensor]:
        """Of every step that counts the N best of N x K scores, as tensors (B, P, ...): what `select` begins with."""
        pooled = [_top_scores(step.output) for step in (steps if self.ensemble else steps[-1:])]
        return {name: torch.cat([part[name] for part in pooled], dim=1) for name in pooled[0]}

    def select(self, steps: Sequence[Step], seen: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        """Detections of each image: of every step the N best of N x K scores, pooled, then class-wise NMS.

        Args:
            seen, sizes: (B, 4) width, height, width, height of the images that were predicted and of the originals.

        Returns: best first, `boxes` xyxy in pixels of the original, clipped to it, none without area; `scores`,
            `labels`, and whatever more the head gave.
        """
        found = self.candidates(steps)
        kept = _kept(found["boxes"], found["scores"], found["labels"], self.nms_threshold)
        found["boxes"] = to_image_pixels(found["boxes"], seen[:, None], sizes[:, None])
        images, per_image = found["scores"].shape
        has_area = (found["boxes"][..., 2:] > found["boxes"][..., :2]).all(-1).flatten()[kept]
        image, order = torch.where(has_area, kept // per_image, images).sort(stable=True)
        numbers = (image[:, None] == torch.arange(images + 1, device=image.device)).sum(0).tolist()
        kept = kept[order]
        parts = [values.flatten(0, 1)[kept].split(numbers)[:-1] for values in found.values()]
        detections = [dict(zip(found, values, strict=True)) for values in zip(*parts, strict=True)]
        if self.box_voting is not None:
            for number, own in enumerate(detections):
                candidates = {name: values[number] for name, values in found.items()}
                own["boxes"] = _vote(own["boxes"], own["labels"], candidates, self.box_voting)
        return detections


def to_image_pixels(boxes: Tensor, seen: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (..., 4; xyxy) from pixels of the resized image to pixels of the original, clipped to it.

    `seen` and `sizes` (..., 4) are width, height, width, height of the resized and of the original image.
    """
    return torch.minimum((boxes * (sizes / seen)).clamp(min=0), sizes)


def _top_scores(output: HeadOutput) -> dict[str, Tensor]:
    """The N best (box, class) pairs of an image: scores (B, N), labels (B, N), and all that their proposals have."""
    count, classes = output.logits.shape[1:]
    scores, index = output.logits.sigmoid().flatten(1).topk(count, dim=1)
    image = torch.arange(index.shape[0], device=index.device)[:, None]
    chosen = {name: value[image, index // classes] for name, value in vars(output).items() if name != "logits"}
    return {"boxes": chosen.pop("boxes"), "scores": scores, "labels": index % classes, **chosen}


def _kept(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float | None) -> Tensor:
    """Which of the boxes (B, P, 4) NMS leaves, as (k,) indices of B * P; of each image the best first."""
    images, per_image = scores.shape
    if threshold is None:
        order = scores.argsort(descending=True, stable=True, dim=1)
        return (order + per_image * torch.arange(images, device=order.device)[:, None]).flatten()
    if boxes.device.type != "cuda":
        parts = zip(boxes, scores, labels, strict=True)
        return torch.cat([batched_nms(*part, threshold) + i * per_image for i, part in enumerate(parts)])
    # A GPU is asked once: boxes of another class or image are moved so far apart that they do not overlap, in float64,
    # as there may be so many of them that float32 would round pixels away.
    group = labels + (labels.max() + 1) * torch.arange(images, device=labels.device)[:, None]
    low, high = boxes.aminmax()
    moved = boxes.double() + (group * (high - low + 1))[..., None]
    return nms(moved.flatten(0, 1), scores.double().flatten(), threshold)


def _vote(boxes: Tensor, labels: Tensor, candidates: dict[str, Tensor], threshold: float) -> Tensor:
    """Each of an image's boxes (n, 4) becomes the mean of the candidates (P) of its class that overlap it.

    They are weighted by their scores; arXiv 1505.01749, section 5.
    """
    near = (box_iou(boxes, candidates["boxes"]) > threshold) & (labels[:, None] == candidates["labels"])
    weights = (near * candidates["scores"].clamp(min=torch.finfo(torch.float32).tiny))[..., None]
    return (weights * candidates["boxes"]).sum(1) / weights.sum(1)  # autocast would round a matrix product of pixels
