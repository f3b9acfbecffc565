"""Detectors: what training, evaluation and users call."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from diffperception.detection.boxes import clamp_min_size, decode_boxes, encode_boxes
from diffperception.detection.criterion import Criterion, SetCriterion
from diffperception.detection.distillation import distillation_loss
from diffperception.detection.heads.boxes import DynamicHead, Head, HeadOutput
from diffperception.detection.heads.dense import AuxiliaryHead
from diffperception.detection.sampler import BoxSampler, Step, to_image_pixels
from diffperception.detection.start import Start, StartBoxes, encode_start
from diffperception.detection.targets import PaddedTargets, image_sizes
from diffperception.devices import to_device
from diffperception.diffusion import add_noise, cosine_schedule
from diffperception.models import Backbone, Model, build_backbone, build_pyramid, pad_images
from diffperception.models.convert import diffusiondet
from diffperception.models.ops.pooling import FeaturePyramid

# What a CPU predicts at once: with more, blocks of memory outgrow the 32 MB that glibc keeps for reuse, and filling new
# pages took a batch of four images a fifth of its time.
CPU_IMAGE_PIXELS = 400_000
CPU_BOXES = 320


class Detector(Model, ABC):
    """What every detector offers, ours or a user's.

    Args:
        classes: names of the classes; label k is `classes[k]`.
        min_size: images are resized for prediction so that their short side is this many pixels; null leaves them.
        max_size: but the long side is at most this.

    Attributes:
        sampler: how noise becomes boxes in prediction, for detectors that do so.
        class_frequencies: (K,) number of training images with each class; training sets it, ones before.
        pad_together: whether images of several sizes are padded to one in prediction, which a GPU is faster with; what
            is found in one then depends, a little, on the sizes of the others.
        gives_masks: whether predictions have `masks` (n, H, W) of the image, bool or 0..1, too.
        needs_masks: whether targets must have `masks` in training.
    """

    kind = "detector"
    sampler: BoxSampler | None = None
    class_frequencies: Tensor
    pad_together: bool = False
    gives_masks: bool = False
    needs_masks: bool = False

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
            targets: per image `boxes` (n, 4) xyxy pixels and `labels` (n,) int64, best on the CPU, so that nothing
                waits for a GPU; objects marked in `iscrowd` (n,) are left out.
            generator: of the training noise, on the CPU; torch's global one by default.
        """

    @abstractmethod
    def predict(
        self, images: list[Tensor], seeds: Sequence[int] | None = None, sampler: BoxSampler | None = None
    ) -> list[dict[str, Tensor]]:
        """Detections of each image, best first: `boxes` (n, 4) xyxy in pixels of the image, `scores`, `labels` (n,).

        Args:
            images: as in `loss`, of any sizes.
            seeds: of each image's noise, for detectors that draw some; 0 by default.
            sampler: instead of the detector's own, for detectors that have one (see `sampler_with`).
        """

    def sampler_with(self, **settings: Any) -> BoxSampler | None:
        """The detector's sampler with the settings that are not None; None for a detector without one.

        Raises:
            ValueError: there is no such setting, or its value is out of range.
        """
        known = vars(self.sampler) if self.sampler else {}
        unknown = sorted(name for name, value in settings.items() if value is not None and name not in known)
        if unknown:
            raise ValueError(f"{type(self).__name__} has no option {', '.join(unknown)} in prediction")
        return self.sampler and self.sampler.changed(**settings)

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
    """Images as prediction sees them: their pyramid, and sizes (B, 4) before and after resizing, on its device."""

    pyramid: FeaturePyramid
    sizes: Tensor
    seen: Tensor


class DiffusionDet(Detector):
    """Noise-to-box detection (arXiv 2211.09788): a backbone with FPN, and a head that denoises boxes.

    Args:
        classes: names of the classes; label k is `classes[k]`.
        backbone: timm model name, or a backbone such as a UNetBackbone.
        head: makes the head for a number of classes, such as a class of heads with some of its arguments; or a head.
        criterion: the training loss; by default a SetCriterion.
        sampler: how noise becomes boxes in prediction; by default a BoxSampler.
        strides: of the pyramid's levels, finest first, each twice the one before; those of a backbone already built.
        pretrained: start from timm's ImageNet weights (needs the network once).
        backbone_weights: instead, start from the weights of a timm backbone in this file, under timm's names
            (safetensors, .pth); a classifier in it is left. The detector's file brings them itself.
        freeze_norm: batch norm of a timm backbone with fixed statistics; leave it off when training from scratch.
        fpn_norm: batch norm in the pyramid; helps training from scratch.
        num_boxes: boxes in training, and in prediction unless the sampler has another number.
        signal_scale: size of the signal beside the unit noise.
        num_timesteps: T of the cosine schedule.
        noise_draws: how many times each image's boxes are noised in a training step, each at a time of its own; the
            backbone sees the image once. The loss is the mean over all.
        auxiliary: makes a further head, for a number of classes and the width of the pyramid, that learns from the
            pyramid in training alone, such as the class `DenseHead` with some of its arguments; or such a head. Its
            proposals are what prediction starts from where the sampler has a `start_time` and no boxes are given.
        proposal_share: so many of the images, as a fraction, are learned in training from the auxiliary head's best
            proposals, noised, instead of from their noised objects and random boxes: the head then learns to start from
            them. Objects among them would teach that proposals are not the best boxes to be had.
        min_size: images are resized for prediction so that their short side is this many pixels; null leaves them.
        max_size: but the long side is at most this.
    """

    sampler: BoxSampler
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        backbone: str | Backbone = "resnet50",
        head: Callable[[int], Head] = DynamicHead,
        criterion: Criterion | None = None,
        sampler: BoxSampler | None = None,
        strides: Sequence[int] = (4, 8, 16, 32),
        pretrained: bool = False,
        backbone_weights: str | Path | None = None,
        freeze_norm: bool = False,
        fpn_norm: bool = False,
        num_boxes: int = 300,
        signal_scale: float = 2.0,
        num_timesteps: int = 1000,
        noise_draws: int = 1,
        auxiliary: Callable[[int, int], AuxiliaryHead] | None = None,
        proposal_share: float = 0.0,
        min_size: int | None = 800,
        max_size: int | None = 1333,
    ):
        super().__init__(classes, min_size, max_size)
        if noise_draws < 1:
            raise ValueError(f"noise_draws is {noise_draws}: each image's boxes must be noised once at least")
        if not (num_boxes > 0 and signal_scale > 0):
            raise ValueError(f"num_boxes and signal_scale must be above 0, not {num_boxes} and {signal_scale}")
        if not 0 <= proposal_share <= 1:
            raise ValueError(f"proposal_share is {proposal_share}: it must be from 0 to 1")
        if proposal_share and auxiliary is None:
            raise ValueError(f"proposal_share is {proposal_share}, but there is no auxiliary head that proposes boxes")
        self.noise_draws = noise_draws
        self.proposal_share = proposal_share
        self.num_boxes = num_boxes
        self.signal_scale = signal_scale
        self.schedule = cosine_schedule(num_timesteps)
        self.sampler = self._complete(sampler or BoxSampler())
        body = build_backbone(backbone, strides, pretrained, freeze_norm, backbone_weights)
        self.strides, self.pad_multiple = body.strides, body.multiple
        # The pyramid has the width of the head, and its weights are drawn before the head's, whatever head that is.
        with torch.device("meta"):  # nothing is drawn there
            width = head.width if isinstance(head, Head) else head(len(self.classes)).width
        self.backbone = build_pyramid(body, width, fpn_norm)
        self.head = head if isinstance(head, Head) else head(len(self.classes))
        self.gives_masks = self.head.gives_masks
        self.auxiliary = self._build_auxiliary(auxiliary, width)
        self.criterion = criterion or SetCriterion(terms=self.head.terms() or None)
        self._require_terms()
        self.needs_masks = self.criterion.needs_masks
        # The file holds the parts as they were built, and brings the backbone's weights.
        self.record(head=self.head, criterion=self.criterion, sampler=self.sampler, auxiliary=self.auxiliary)
        self.record(pretrained=False, backbone_weights=None)
        self.register_buffer("mean", 255 * torch.tensor(body.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(body.std).view(3, 1, 1), persistent=False)
        self.warned_of_crowds = False
        self.to(memory_format=torch.channels_last)

    def _build_auxiliary(
        self, auxiliary: Callable[[int, int], AuxiliaryHead] | None, width: int
    ) -> AuxiliaryHead | None:
        if auxiliary is None:
            return None
        head = auxiliary if isinstance(auxiliary, AuxiliaryHead) else auxiliary(len(self.classes), width)
        if head.width != width:
            raise ValueError(f"the auxiliary head wants a pyramid of width {head.width}, but the head's is {width}")
        return head

    def _require_terms(self) -> None:
        """ValueError if the criterion lacks a term without which a part of the head would learn nothing."""
        if not isinstance(self.criterion, SetCriterion):
            return
        learned = {type(term) for _, term in self.criterion.terms.values()}
        for name, term in self.head.terms().items():
            if type(term) not in learned:
                raise ValueError(
                    f"the criterion has no {type(term).__name__}, without which this {type(self.head).__name__} would"
                    f" not learn all: give it terms: {{{name}: {{class_path: {type(term).__name__}}}}}"
                )

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Tensor], classes: Sequence[str] | None = None) -> "DiffusionDet":
        """The detector of a checkpoint of the reference DiffusionDet, in evaluation mode on the CPU.

        Backbone (ResNet-50/101, Swin-T/S/B), stages and widths follow from the names and shapes of the tensors. By
        default the K classes are COCO's if K is 80, else numbers.

        Raises:
            ValueError: it names the weights that are missing, left over or of another shape.
        """
        arguments = diffusiondet.constructor_arguments(state_dict, classes)
        detector = cls(**arguments | {"head": partial(DynamicHead, **arguments["head"])})
        detector.load_state_dict(diffusiondet.rename(state_dict, detector))
        return detector.eval()

    def forward(self, images: list[Tensor], boxes: Tensor, t: Tensor) -> HeadOutput:
        """One pass: classify and refine noisy boxes (B, N, 4; xyxy pixels) of time t (B,), at every stage.

        Images are float32 (3, H, W), RGB, 0..1, of any sizes, padded together and not resized.
        """
        return self.head(self.features(images), boxes, t)

    def features(self, images: list[Tensor]) -> FeaturePyramid:
        """The pyramid of images padded together."""
        return FeaturePyramid.from_maps([self.maps(images)], self.strides)

    def maps(self, images: list[Tensor]) -> list[Tensor]:
        """The feature maps of images padded together, (B, C, H / stride, W / stride) a level."""
        return self.backbone(pad_images(images, self.mean, self.std, self.pad_multiple))

    def loss(
        self,
        images: list[Tensor],
        targets: list[dict],
        generator: torch.Generator | None = None,
        taught: list[dict] | None = None,
    ) -> dict[str, Tensor]:
        """See `Detector.loss`. Terms are the criterion's: `classification`, `l1`, `giou`, each summed over the stages.

        And those of the auxiliary head, if there is one; and `distillation`, unweighted, if there are detections of a
        teacher to learn from, `taught`: dicts of `boxes`, `scores` and `labels`, as of `predict`.

        What is drawn, and the noisy boxes, are computed on the CPU: a GPU is not waited for, and starts from the same.
        """
        objects = PaddedTargets.collate(targets, image_sizes(images))
        learned = self._limit(objects.repeat(self.noise_draws), generator)
        t = torch.randint(self.schedule.num_timesteps, (len(learned.boxes),), generator=generator)
        maps = self.maps(images)
        dense = None if self.auxiliary is None else self.auxiliary(maps, self.strides)
        proposals = None
        if dense is not None and self.proposal_share:
            sizes = to_device(objects.image_sizes, self.device)
            proposals = dense.best(self.num_boxes, sizes).repeat(self.noise_draws, 1, 1)
        boxes = self._noisy_boxes(learned, t, generator, proposals)
        pyramid = FeaturePyramid.from_maps([maps], self.strides).repeat(self.noise_draws)
        output = self.head(pyramid, to_device(boxes, self.device), to_device(t, self.device))
        terms = self.criterion(output, learned.to(self.device), self.class_frequencies, generator)
        if taught is not None:
            found = PaddedTargets.collate(taught, objects.image_sizes).repeat(self.noise_draws)
            terms["distillation"] = distillation_loss(output, found.to(self.device))
        return terms if self.auxiliary is None or dense is None else terms | self.auxiliary.loss(dense, objects)

    def _limit(self, targets: PaddedTargets, generator: torch.Generator | None) -> PaddedTargets:
        """At most `num_boxes` objects per image, chosen at random each time, the rest neither noised nor matched."""
        most = targets.valid.shape[1]
        if most > self.num_boxes and not self.warned_of_crowds:
            self.warned_of_crowds = True
            warnings.warn(
                f"an image has {most} objects, more than num_boxes={self.num_boxes}: a random part is learned "
                "each time; raise num_boxes to learn all",
                stacklevel=3,
            )
        return targets.limit(self.num_boxes, generator)

    def _noisy_boxes(
        self, targets: PaddedTargets, t: Tensor, generator: torch.Generator | None, proposals: Tensor | None = None
    ) -> Tensor:
        """Objects, padded with random boxes to N, at noise level t: (B, N, 4) xyxy in pixels.

        Proposals (B, N, 4), on their device, take the place of all of them in a share of the images.
        """
        x0 = encode_boxes(self._padded_objects(targets, generator), targets.image_sizes, self.signal_scale)
        z = add_noise(self.schedule, x0, t, torch.randn(x0.shape, generator=generator))
        sizes = targets.image_sizes
        if proposals is not None:
            replaced = torch.rand(len(t), generator=generator) < self.proposal_share
            alpha = torch.where(replaced, self.schedule.alpha(t).float(), 0)[:, None, None]
            x0, z, sizes, alpha = (to_device(x, proposals.device) for x in (x0, z, sizes, alpha))
            z = z + alpha * (encode_boxes(proposals, sizes, self.signal_scale) - x0)  # z is linear in x0
        return clamp_min_size(decode_boxes(z, sizes, self.signal_scale))

    def _padded_objects(self, targets: PaddedTargets, generator: torch.Generator | None) -> Tensor:
        """Each image's objects first, then boxes from N(1/2, (1/6)^2) in cxcywh of the image: (B, N, 4) xyxy pixels."""
        normalised = 0.5 + torch.randn(len(targets.boxes), self.num_boxes, 4, generator=generator) / 6
        normalised[..., 2:].clamp_(min=1e-4)
        # An image with no object noises one box around the whole of it.
        normalised[~targets.valid.any(1), 0] = torch.tensor([0.5, 0.5, 1.0, 1.0])
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
        sampler: BoxSampler | None = None,
        steps: int | None = None,
        num_boxes: int | None = None,
        encoded: Encoded | None = None,
        start: StartBoxes | None = None,
        start_time: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """See `Detector.predict`. An image's detections do not depend on the other images of the list.

        Args:
            steps, num_boxes, start_time: instead of the sampler's own.
            encoded: what `encode` made of these images, for predicting several times from them.
            start: of each image, boxes (n, 4; xyxy in its pixels) to start from instead of pure noise, such as those
                found with other settings, in the frame before, or drawn by a user. They are noised to `start_time`, and
                where there are fewer than `num_boxes` the others are pure noise; so are all of an entry that is None.
                By default, where there is a `start_time`, those of `proposals`.

        Raises:
            ValueError: `start` is not such boxes, or has more than `num_boxes`; or there is `start` without a
                `start_time`, or the other way round without an auxiliary head.
        """
        if not images:
            return []
        sampler = (sampler or self.sampler).changed(steps=steps, num_boxes=num_boxes, start_time=start_time)
        encoded = encoded or self.encode(images)
        sampled = self.sample(encoded, [0] * len(images) if seeds is None else seeds, sampler, start)
        return self._select(sampled, sampler, encoded, images)

    def _select(
        self, sampled: list[Step], sampler: BoxSampler, encoded: Encoded, images: list[Tensor]
    ) -> list[dict[str, Tensor]]:
        selected = sampler.select(sampled, encoded.seen, encoded.sizes)
        detections = self.head.revisit(selected, encoded.pyramid, encoded.seen, encoded.sizes)
        return [self.head.finish(d, *image.shape[-2:]) for d, image in zip(detections, images, strict=True)]

    @torch.no_grad()
    def encode(self, images: list[Tensor]) -> Encoded:
        """What prediction needs of the images, whatever the settings of the sampler: the work of the backbone."""
        resized = [self.resize(to_device(image, self.device)) for image in images]
        sizes, seen = to_device(torch.stack([image_sizes(images), image_sizes(resized)]), self.device)
        return Encoded(self._separate_features(resized), sizes, seen)

    @torch.no_grad()
    def trajectory(
        self, image: Tensor, seed: int = 0, sampler: BoxSampler | None = None, start: Tensor | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """How noise turned into the boxes of one image, and what `predict` gives.

        The first is a dict per step, the noisiest first, with the time `t`, the noisy `boxes` (N, 4) that entered, and
        the `predicted` (N, 4), `scores` (N,) and `labels` (N,) that came out; boxes are xyxy in pixels of the image.
        It starts from the boxes `start` (n, 4), if there are some, as `predict` does.
        """
        sampler = sampler or self.sampler
        encoded = self.encode([image])
        sampled = self.sample(encoded, [seed], sampler, None if start is None else [start])
        scale = (encoded.sizes / encoded.seen)[0]
        steps = []
        for step in sampled:
            scores, labels = step.output.logits[0].sigmoid().max(-1)
            boxes, predicted = step.noisy_boxes[0] * scale, step.output.boxes[0] * scale
            steps.append({"t": step.t, "boxes": boxes, "predicted": predicted, "scores": scores, "labels": labels})
        return steps, self._select(sampled, sampler, encoded, [image])[0]

    @torch.no_grad()
    def sample(
        self, encoded: Encoded, seeds: Sequence[int], sampler: BoxSampler, start: StartBoxes | None = None
    ) -> list[Step]:
        """All steps from noise, or from what `predict` is given, to boxes.

        Raises:
            ValueError: the weights give numbers that are not finite; or as for `predict`.
        """
        sampler = self._complete(sampler)
        begin = self._start(encoded, sampler, start)
        at_once = self._at_once(len(seeds), sampler.num_boxes or 0, CPU_BOXES)
        pyramids = encoded.pyramid.split(at_once)

        def denoise(boxes: Tensor, t: Tensor) -> HeadOutput:
            parts = zip(pyramids, boxes.split(at_once), t.split(at_once), strict=True)
            return HeadOutput.last_stage([self.head(*part, last_only=True) for part in parts])

        sampled = sampler.sample(denoise, self.schedule, encoded.seen, seeds, self.signal_scale, begin)
        outputs = [tensor for step in sampled for tensor in vars(step.output).values()]
        if not torch.stack([tensor.isfinite().all() for tensor in outputs]).all():
            raise ValueError(
                "the detector predicts numbers that are not finite: its training has diverged; take an earlier model,"
                " or train it anew with a lower optimizer.lr"
            )
        return sampled

    def _start(self, encoded: Encoded, sampler: BoxSampler, start: StartBoxes | None) -> Start | None:
        """What sampling begins from, in diffusion space; None for pure noise."""
        self.require_start(sampler, start is not None)
        if sampler.start_time is None:
            return None
        count = sampler.num_boxes or 0
        boxes = [found["boxes"][:count] for found in self.proposals(encoded)] if start is None else start
        return encode_start(boxes, encoded.sizes, count, self.signal_scale)

    @torch.no_grad()
    def proposals(self, encoded: Encoded) -> list[dict[str, Tensor]]:
        """What the auxiliary head finds in each of the images that were encoded, best first, without any noise.

        Returns: `boxes` (n, 4) xyxy in pixels of the image, `scores` and `labels` (n,).

        Raises:
            ValueError: there is no auxiliary head.
        """
        if self.auxiliary is None:
            raise ValueError("this detector has no auxiliary head that would propose boxes: give it one and train it")
        images = []
        for number, (seen, size) in enumerate(zip(encoded.seen, encoded.sizes, strict=True)):
            found = self.auxiliary.proposals(self.auxiliary(encoded.pyramid.maps_of(number), self.strides), seen)
            images.append(found | {"boxes": to_image_pixels(found["boxes"].float(), seen, size)})
        return images

    def require_start(self, sampler: BoxSampler, given: bool) -> None:
        """ValueError unless the sampler has a time of the schedule and there are boxes for it, or neither."""
        time, last = sampler.start_time, self.schedule.num_timesteps - 1
        if given and time is None:
            raise ValueError(
                f"boxes to start from need a start_time, from 0 to {last}, that they are noised to: give one"
            )
        if time is not None and not given and self.auxiliary is None:
            raise ValueError(
                f"start_time is {time}, but there are no boxes to start from: give start, or train an auxiliary head"
            )
        if time is not None and time > last:
            raise ValueError(f"start_time is {time}: it must be from 0 to {last}, the times of this detector")

    def _complete(self, sampler: BoxSampler) -> BoxSampler:
        """The sampler with a number of boxes."""
        return sampler.changed(num_boxes=sampler.num_boxes or self.num_boxes)

    def _separate_features(self, images: list[Tensor]) -> FeaturePyramid:
        """The pyramid of images padded one by one, so that none depends on its neighbours' sizes.

        Convolutions see beyond an image's border into its padding. Only images that pad to one shape share a batch,
        unless `pad_together` is set.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            height, width = (-(-side // self.pad_multiple) * self.pad_multiple for side in image.shape[-2:])
            groups.setdefault((0, 0) if self.pad_together else (height, width), []).append(i)
        order: list[int] = []
        maps = []
        for (height, width), members in groups.items():
            at_once = self._at_once(len(members), height * width, CPU_IMAGE_PIXELS)
            for part in (members[i : i + at_once] for i in range(0, len(members), at_once)):
                maps.append(self.maps([images[i] for i in part]))
            order += members
        return FeaturePyramid.from_maps(maps, self.strides, sorted(range(len(images)), key=order.__getitem__))

    def _at_once(self, images: int, size: int, most: int) -> int:
        """How many of the images to predict together: on a CPU at most `most` pixels or boxes, `size` per image."""
        return max(1, most // max(1, size)) if self.device.type == "cpu" else images
