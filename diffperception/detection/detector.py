"""Detectors: what training, evaluation and users call."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from diffperception.detection.boxes import decode_boxes, encode_boxes, give_area
from diffperception.detection.criterion import LossWeights, draw_federated_classes, set_losses
from diffperception.detection.heads.boxes import DynamicHead
from diffperception.detection.matcher import PaddedTargets, match
from diffperception.detection.sampler import SamplerOptions, Step, sample_boxes, select_detections
from diffperception.diffusion import add_noise, cosine_schedule
from diffperception.models import Backbone, Model, build_backbone, build_pyramid, pad_images
from diffperception.models.convert import diffusiondet
from diffperception.models.ops.pooling import FeaturePyramid

# What a CPU predicts at once: with more, blocks of memory outgrow the 32 MB that glibc keeps for reuse, and filling new
# pages took a batch of four images a fifth of its time.
CPU_PIXELS = 400_000
CPU_BOXES = 320


class Detector(Model, ABC):
    """What every detector offers, ours or a user's.

    Args:
        classes: names of the classes; label k is `classes[k]`.
        min_size: images are resized for prediction so that their short side is this many pixels; null leaves them.
        max_size: but the long side is at most this.

    Attributes:
        class_frequencies: (K,) number of training images with each class; training sets it, ones before.
    """

    kind = "detector"
    class_frequencies: Tensor

    def __init__(self, classes: Sequence[str], min_size: int | None = None, max_size: int | None = None):
        super().__init__()
        if not classes:
            raise ValueError("a detector needs at least one class; the annotation file names none")
        self.classes = list(classes)
        self.min_size = min_size
        self.max_size = max_size
        self.register_buffer("class_frequencies", torch.ones(len(self.classes)), persistent=False)

    @abstractmethod
    def loss(
        self, images: list[Tensor], targets: list[dict], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Weighted terms of the training loss; their sum is what to minimise.

        Args:
            images: float32 (3, H, W), RGB, 0..1, of any sizes; not resized.
            targets: a dict an image with `boxes` (n, 4) xyxy pixels and `labels` (n,) int64; objects marked in
                `iscrowd` (n,) are left out.
            generator: of the training noise, on the CPU; torch's global one by default.
        """

    @abstractmethod
    def predict(self, images: list[Tensor], seeds: Sequence[int] | None = None) -> list[dict[str, Tensor]]:
        """Detections of each image, best first: `boxes` (n, 4) xyxy in pixels of the image, `scores`, `labels` (n,).

        Args:
            images: as in `loss`, of any sizes.
            seeds: of each image's noise, for detectors that draw some; 0 by default.
        """

    def resize(self, image: Tensor) -> Tensor:
        """The image as prediction sees it: (3, H, W) -> (3, H', W')."""
        if self.min_size is None:
            return image
        height, width = image.shape[-2:]
        factor = self.min_size / min(height, width)
        if self.max_size is not None:
            factor = min(factor, self.max_size / max(height, width))
        size = [max(1, round(height * factor)), max(1, round(width * factor))]
        return TF.resize(image, size, antialias=True)


@dataclass
class Encoded:
    """Images as prediction sees them: resized, and their pyramid."""

    resized: list[Tensor]
    pyramid: FeaturePyramid


class DiffusionDet(Detector):
    """Noise-to-box detection (arXiv 2211.09788): a backbone with FPN, and a head that denoises boxes.

    Args:
        classes: names of the classes; label k is `classes[k]`.
        backbone: timm model name, or a backbone such as a UNetBackbone.
        pretrained: start from timm's ImageNet weights (needs the network once).
        freeze_norm: batch norm of a timm backbone with fixed statistics; leave it off when training from scratch.
        strides: of the pyramid's levels, finest first, each twice the one before; those of a backbone already built.
        width: channels of the pyramid and of a box's feature.
        fpn_norm: batch norm in the pyramid; helps training from scratch.
        stages: refinements a pass through the head.
        pool_size: bins a side that a box is pooled to.
        pool_samples: points a bin and axis that are averaged; 1 trains a little faster.
        dynamic_width: inner channels of the dynamic convolution.
        ffn_width: inner channels of the feed-forward network.
        num_heads: heads of the attention between boxes.
        box_layers: depth of the box tower.
        num_boxes: boxes in training, and in prediction unless it asks for another number.
        steps: passes through the head in prediction, unless it asks for another number.
        signal_scale: size of the signal beside the unit noise.
        num_timesteps: T of the cosine schedule.
        class_loss_weight: of the focal loss beside 5 for L1 and 2 for GIoU; more speeds up short training.
        matching: `dynamic_k` (several boxes an object) or `hungarian` (one).
        federated_classes: for annotations that are not exhaustive (LVIS: 50), the classification loss counts this many
            classes a batch, those present and others drawn by frequency; null counts all.
        min_size: images are resized for prediction so that their short side is this many pixels; null leaves them.
        max_size: but the long side is at most this.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        backbone: str | Backbone = "resnet50",
        pretrained: bool = False,
        freeze_norm: bool = False,
        strides: Sequence[int] = (4, 8, 16, 32),
        width: int = 256,
        fpn_norm: bool = False,
        stages: int = 6,
        pool_size: int = 7,
        pool_samples: int = 2,
        dynamic_width: int = 64,
        ffn_width: int = 2048,
        num_heads: int = 8,
        box_layers: int = 3,
        num_boxes: int = 300,
        steps: int = 1,
        signal_scale: float = 2.0,
        num_timesteps: int = 1000,
        class_loss_weight: float = 2.0,
        matching: Literal["dynamic_k", "hungarian"] = "dynamic_k",
        federated_classes: int | None = None,
        min_size: int | None = 800,
        max_size: int | None = 1333,
    ):
        super().__init__(classes, min_size, max_size)
        self.record(pretrained=False)  # loading brings its own weights
        self.num_boxes = num_boxes
        self.steps = steps
        self.signal_scale = signal_scale
        self.num_timesteps = num_timesteps
        self.matching = matching
        self.federated_classes = federated_classes
        self.loss_weights = LossWeights(classification=class_loss_weight)
        self.schedule = cosine_schedule(num_timesteps)
        body = build_backbone(backbone, strides, pretrained, freeze_norm)
        self.pad_multiple = body.multiple
        self.backbone = build_pyramid(body, width, fpn_norm)
        self.head = DynamicHead(
            len(self.classes),
            stages,
            width,
            pool_size,
            pool_samples,
            dynamic_width,
            ffn_width,
            num_heads,
            box_layers,
        )
        self.register_buffer("mean", 255 * torch.tensor(body.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(body.std).view(3, 1, 1), persistent=False)
        self.warned_of_crowds = False
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Tensor], classes: Sequence[str] | None = None) -> "DiffusionDet":
        """The detector of a checkpoint of the reference DiffusionDet, in evaluation mode on the CPU.

        Backbone (ResNet-50/101, Swin-T/S/B), classes, stages and widths follow from the tensors' names and shapes.

        Args:
            state_dict: tensors by the reference's names.
            classes: names of labels 0..K-1; by default COCO's if K is 80, else the numbers.

        Raises:
            ValueError: it names the weights that are missing, left over or of another shape.
        """
        detector = cls(**diffusiondet.constructor_arguments(state_dict, classes))
        detector.load_state_dict(diffusiondet.rename(state_dict, detector))
        return detector.eval()

    def forward(self, images: list[Tensor], boxes: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """One pass: classify and refine noisy boxes, at every stage.

        Args:
            images: float32 (3, H, W), RGB, 0..1; any sizes, padded together and not resized.
            boxes: (B, N, 4) xyxy in pixels.
            t: (B,) diffusion time.

        Returns: logits (S, B, N, K) and boxes (S, B, N, 4; xyxy pixels).
        """
        return self.head(self.features(images), boxes, t)

    def features(self, images: list[Tensor]) -> FeaturePyramid:
        """The pyramid of images padded together."""
        batch = pad_images(images, self.mean, self.std, self.pad_multiple)
        return FeaturePyramid.from_maps(self.backbone(batch), self.backbone.strides)

    def loss(
        self, images: list[Tensor], targets: list[dict], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Detector.loss`. Terms: `classification`, `l1`, `giou`, each summed over the stages."""
        sizes = image_sizes(images, self.device)
        objects = PaddedTargets.collate(targets, sizes)
        padded = self._limit(objects, generator)
        t = torch.randint(self.num_timesteps, (len(images),), generator=generator).to(self.device)
        boxes = self._noisy_boxes(padded, t, generator)
        logits, refined = self(images, boxes, t)
        rows = padded.repeat(len(logits))
        matches = match(logits.flatten(0, 1), refined.flatten(0, 1), rows, self.matching).view(logits.shape[:3])
        losses = set_losses(logits, refined, padded, matches, self._class_mask(objects, generator))
        return {name: getattr(self.loss_weights, name) * value.sum() for name, value in losses.items()}

    def _class_mask(self, objects: PaddedTargets, generator: torch.Generator | None) -> Tensor | None:
        """The classes that the loss counts in each image, (B, K); None for all."""
        if self.federated_classes is None:
            return None
        labels = objects.labels[objects.valid]
        mask = draw_federated_classes(labels, self.class_frequencies, self.federated_classes, generator)
        return mask.expand(len(objects.labels), -1)

    def _limit(self, targets: PaddedTargets, generator: torch.Generator | None) -> PaddedTargets:
        """At most `num_boxes` objects an image, chosen at random each time, the rest neither noised nor matched."""
        most = targets.valid.shape[1]
        if most > self.num_boxes and not self.warned_of_crowds:
            self.warned_of_crowds = True
            warnings.warn(
                f"an image has {most} objects, more than num_boxes={self.num_boxes}: a random part is learned "
                "each time; raise num_boxes to learn all",
                stacklevel=3,
            )
        return targets.limit(self.num_boxes, generator)

    def _noisy_boxes(self, targets: PaddedTargets, t: Tensor, generator: torch.Generator | None) -> Tensor:
        """Objects, padded with random boxes to N, at noise level t: (B, N, 4) xyxy in pixels."""
        x0 = encode_boxes(self._padded_objects(targets, generator), targets.image_sizes, self.signal_scale)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        z = add_noise(self.schedule, x0, t, noise)
        return give_area(decode_boxes(z, targets.image_sizes, self.signal_scale))

    def _padded_objects(self, targets: PaddedTargets, generator: torch.Generator | None) -> Tensor:
        """Each image's objects first, then boxes from N(1/2, (1/6)^2) in cxcywh of the image: (B, N, 4) xyxy pixels."""
        shape = (len(targets.boxes), self.num_boxes, 4)
        normalised = 0.5 + torch.randn(shape, generator=generator).to(targets.boxes) / 6
        normalised[..., 2:].clamp_(min=1e-4)
        # An image with no object noises one box around the whole of it.
        empty = ~targets.valid.any(1)
        normalised[empty, 0] = normalised.new_tensor([0.5, 0.5, 1.0, 1.0])
        boxes = decode_boxes(2 * normalised - 1, targets.image_sizes, scale=1.0)
        count = min(targets.valid.shape[1], self.num_boxes)
        first = targets.valid.int().argsort(stable=True, dim=1, descending=True)[:, :count]
        objects = targets.boxes.gather(1, first[..., None].expand(-1, -1, 4))
        is_object = targets.valid.gather(1, first)[..., None]
        boxes[:, :count] = torch.where(is_object, objects, boxes[:, :count])
        return boxes

    @torch.no_grad()
    def predict(
        self,
        images: list[Tensor],
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        num_boxes: int | None = None,
        options: SamplerOptions | None = None,
        encoded: Encoded | None = None,
    ) -> list[dict[str, Tensor]]:
        """See `Detector.predict`. An image's detections do not depend on the other images of the list.

        Args:
            steps, num_boxes: instead of the model's own.
            options: all settings of the sampler; `steps` and `num_boxes` override it.
            encoded: what `encode` made of these images, for who predicts several times from them.

        Raises:
            ValueError: the weights give numbers that are not finite.
        """
        if not images:
            return []
        options = self.sampler_options(steps, num_boxes, options)
        encoded = encoded or self.encode(images)
        detections = select_detections(self._sample(images, seeds, options, encoded), options)
        return [
            to_image_pixels(detection, small.shape, image.shape)
            for detection, small, image in zip(detections, encoded.resized, images, strict=True)
        ]

    @torch.no_grad()
    def encode(self, images: list[Tensor]) -> Encoded:
        """What prediction needs of the images, whatever the settings of the sampler: the work of the backbone."""
        resized = [self.resize(image) for image in images]
        return Encoded(resized, self._separate_features(resized))

    @torch.no_grad()
    def trace(
        self,
        image: Tensor,
        steps: int = 4,
        num_boxes: int | None = None,
        seed: int = 0,
        options: SamplerOptions | None = None,
    ) -> list[dict]:
        """How noise turned into the boxes of one image: a dict a step, the noisiest first.

        Each has the time `t`, the noisy `boxes` (N, 4) that entered, and the `predicted` (N, 4), `scores` (N,) and
        `labels` (N,) that came out; boxes are xyxy in pixels of the image.
        """
        encoded = self.encode([image])
        sampled = self._sample([image], [seed], self.sampler_options(steps, num_boxes, options), encoded)
        scale = (image_sizes([image], self.device) / image_sizes(encoded.resized, self.device))[0]
        trace = []
        for step in sampled:
            scores, labels = step.logits[0].sigmoid().max(-1)
            boxes, predicted = step.noisy_boxes[0] * scale, step.boxes[0] * scale
            trace.append({"t": step.t, "boxes": boxes, "predicted": predicted, "scores": scores, "labels": labels})
        return trace

    def sampler_options(
        self, steps: int | None = None, num_boxes: int | None = None, options: SamplerOptions | None = None
    ) -> SamplerOptions:
        """`options`, or the model's own, with what is given replaced."""
        options = options or SamplerOptions(steps=self.steps, num_boxes=self.num_boxes)
        given: dict[str, Any] = {"steps": steps, "num_boxes": num_boxes}
        return replace(options, **{name: value for name, value in given.items() if value is not None})

    def _sample(
        self,
        images: list[Tensor],
        seeds: Sequence[int] | None,
        options: SamplerOptions,
        encoded: Encoded | None = None,
    ) -> list[Step]:
        encoded = encoded or self.encode(images)
        at_once = self._at_once(len(images), options.num_boxes, CPU_BOXES)
        pyramids = encoded.pyramid.split(at_once)

        def denoise(boxes: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            parts = zip(pyramids, boxes.split(at_once), t.split(at_once), strict=True)
            found = [self.head(*part, last_only=True) for part in parts]
            logits, refined = (torch.cat(x, dim=1)[-1] for x in zip(*found, strict=True))
            return logits.float(), refined

        sampled = sample_boxes(
            denoise,
            self.schedule,
            image_sizes(encoded.resized, self.device),
            seeds if seeds is not None else [0] * len(images),
            options,
            self.num_timesteps,
            self.signal_scale,
        )
        if not all(step.boxes.isfinite().all() and step.logits.isfinite().all() for step in sampled):
            raise ValueError(
                "the detector predicts numbers that are not finite: its training has diverged; take an earlier model,"
                " or train it anew with a lower optimizer.lr"
            )
        return sampled

    def _separate_features(self, images: list[Tensor]) -> FeaturePyramid:
        """The pyramid of images padded one by one, so that none depends on its neighbours' sizes.

        Convolutions see beyond an image's border into its padding. Only images that pad to one shape share a batch.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            height, width = (-(-side // self.pad_multiple) * self.pad_multiple for side in image.shape[-2:])
            groups.setdefault((height, width), []).append(i)
        order: list[int] = []
        pyramids = []
        for (height, width), members in groups.items():
            at_once = self._at_once(len(members), height * width, CPU_PIXELS)
            for part in (members[i : i + at_once] for i in range(0, len(members), at_once)):
                pyramids.append(self.features([images[i] for i in part]))
            order += members
        return FeaturePyramid.join(pyramids, sorted(range(len(images)), key=order.__getitem__))

    def _at_once(self, images: int, size: int, most: int) -> int:
        """How many of the images to predict together: on a CPU at most `most` pixels or boxes, `size` an image."""
        return max(1, most // size) if self.device.type == "cpu" else images


def image_sizes(images: Sequence[Tensor], device: torch.device) -> Tensor:
    """(B, 4) width, height, width, height in pixels."""
    return torch.tensor([[*image.shape[-2:]][::-1] * 2 for image in images], dtype=torch.float32, device=device)


def to_image_pixels(detection: dict[str, Tensor], seen: torch.Size, shape: torch.Size) -> dict[str, Tensor]:
    """From pixels of the resized image to pixels of the original, clipped to it; boxes without area are dropped."""
    height, width = shape[-2:]
    scale = detection["boxes"].new_tensor([width / seen[-1], height / seen[-2]] * 2)
    boxes = detection["boxes"] * scale
    boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], -1).flatten(1)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return {"boxes": boxes[keep], "scores": detection["scores"][keep], "labels": detection["labels"][keep]}
