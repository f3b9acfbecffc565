"""Tracks: objects followed from frame to frame, their boxes carried by the warm start of a DiffusionDet.

The boxes of the tracks, moved on as they moved before, are noised a little and denoised in the next frame: the index of
a proposal says whose box it is. Without, detections of each frame are matched to the tracks by their overlap alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

from diffperception.detection.detector import Detector, DiffusionDet
from diffperception.detection.sampler import BoxSampler, Step, to_image_pixels
from diffperception.diffusion import sample_seed

SAME = 0.5  # overlap from which two boxes of a class are of one object
SAME_PLACE = 0.7  # and two boxes of any classes; overlap from which the boxes of one object are averaged
OWN = 0.5  # what its own proposal counts for a track beside the overlap of boxes, from 0 to 1
HIDDEN = 0.6  # of a box that others cover, for its object to be hidden
FORGETTING = 0.9  # per frame, of what earlier frames said of a track's class
INERTIA = 0.5  # of a track's velocity, which is smoothed
LEAST_SIDE = 2.0  # pixels of a box within the image that is worth starting from


@dataclass(frozen=True)
class TrackSettings:
    """How boxes of frames become tracks.

    Args:
        carry: carry boxes from frame to frame by the warm start of a DiffusionDet; without, and for other detectors,
            every frame is detected from noise alone and detections are matched to tracks by their overlap.
        start_time: the time of the schedule that the boxes of tracks are noised to.
        copies: proposals of each track, noised each by itself, whose boxes are averaged.
        birth: the score from which a detection that belongs to no track begins one.
        keep: the score from which a detection goes on with a track.
        overlap: of a detection with the place where a track is expected, for them to belong together.
        patience: frames for which a track that is not seen waits for its object, moving on as it moved.
        coast: for so many of them its box is given nevertheless, unless the objects seen hide it.

    Raises:
        ValueError: a value is out of its range.
    """

    carry: bool = True
    start_time: int = 200
    copies: int = 3
    birth: float = 0.5
    keep: float = 0.3
    overlap: float = 0.3
    patience: int = 10
    coast: int = 2

    def __post_init__(self) -> None:
        for name in ("birth", "keep", "overlap"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is {value}: it must be from 0 to 1")
        for name, least in (("start_time", 0), ("copies", 1), ("patience", 0), ("coast", 0)):
            if (count := getattr(self, name)) < least:
                raise ValueError(f"{name} is {count}: it must be at least {least}")
        if self.birth < self.keep:
            raise ValueError(
                f"birth is {self.birth}, below keep, {self.keep}: a track would begin with what could not go on with it"
            )


@dataclass
class Track:
    """An object that is followed; boxes (4,) are xyxy in pixels.

    Attributes:
        number: from 1, in the order of birth.
        box: where it is, or is expected to be.
        seen: where it was seen last.
        velocity: (2,) pixels a frame of its centre.
        belief: (K,) how much frames, the last ones most, spoke for each class.
        score: of the detection that was seen last.
        found: frames in which it was seen.
        missed: frames since.
    """

    number: int
    box: Tensor
    seen: Tensor
    belief: Tensor
    score: float
    velocity: Tensor = field(default_factory=lambda: torch.zeros(2))
    found: int = 1
    missed: int = 0

    @property
    def label(self) -> int:
        """The class that most speaks for."""
        return int(self.belief.argmax())

    def move(self) -> None:
        """Go on to the next frame at constant velocity, unseen as yet."""
        self.box = self.box + self.velocity.repeat(2)
        self.missed += 1

    def see(self, box: Tensor, probabilities: Tensor, score: float) -> None:
        """Take a box (4,) of this frame, with the probabilities (K,) of its classes, for that of the object."""
        moved = (box - self.seen).view(2, 2).mean(0) / self.missed
        self.velocity = moved if self.found == 1 else torch.lerp(moved, self.velocity, INERTIA)
        self.box = self.seen = box
        self.belief = FORGETTING * self.belief + probabilities
        self.score, self.missed = score, 0
        self.found += 1


@dataclass(frozen=True)
class Candidates:
    """Boxes of a frame on the CPU: boxes (P, 4), xyxy in its pixels; probabilities (P, K); owners (P,), indices of the
    tracks that proposals started from, -1 for others.
    """

    boxes: Tensor
    probabilities: Tensor
    owners: Tensor

    def __getitem__(self, rows: Tensor) -> "Candidates":
        return Candidates(self.boxes[rows], self.probabilities[rows], self.owners[rows])


class Tracker:
    """Follows the objects of one clip, frame by frame.

    Args:
        detector: in evaluation mode.
        settings: how boxes become tracks.
        sampler: instead of the detector's own. Of its steps the last is the warm one, into which the tracks come with
            what the steps before found; where there is one step alone, tracks and noise share it.
        seed: of the noise of the clip.

    Raises:
        ValueError: start_time is no time of the detector's schedule.
    """

    def __init__(
        self,
        detector: Detector,
        settings: TrackSettings | None = None,
        sampler: BoxSampler | None = None,
        seed: int = 0,
    ):
        self.detector, self.settings, self.seed = detector, settings or TrackSettings(), seed
        self.sampler = sampler or detector.sampler
        self.carries = isinstance(detector, DiffusionDet) and self.settings.carry
        self.tracks: list[Track] = []
        self.frames = self.born = 0
        if isinstance(detector, DiffusionDet) and self.carries:
            assert self.sampler is not None
            detector.require_start(replace(self.sampler, start_time=self.settings.start_time), given=True)

    @torch.no_grad()
    def update(self, image: Tensor) -> dict[str, Tensor]:
        """The tracks in the next frame, float32 (3, H, W), RGB, 0..1.

        Returns: on the CPU, `boxes` (n, 4) xyxy in pixels of the image, `scores` (n,), `labels` (n,) and `tracks` (n,),
            the numbers by which objects are known through all frames.
        """
        height, width = image.shape[-2:]
        size = torch.tensor([width, height] * 2, dtype=torch.float32)
        for track in self.tracks:
            track.move()
        seeds = [sample_seed(self.seed, 2 * self.frames + k) for k in (0, 1)]
        self.frames += 1
        candidates = self._carried(image, size, seeds) if self.carries else self._detected(image, seeds[0])
        found, own = detections(candidates, self.settings.keep, len(self.tracks))
        taken = self._match(found, own)
        self.tracks = [track for track in self.tracks if track.missed <= self.settings.patience]
        self._begin(found, taken)
        return self._shown(size)

    def _detected(self, image: Tensor, seed: int) -> Candidates:
        """What the detector finds by itself."""
        (found,) = self.detector.predict([image], [seed], self.sampler)
        boxes, scores, labels = (found[name].cpu() for name in ("boxes", "scores", "labels"))
        probabilities = torch.zeros(len(boxes), len(self.detector.classes))
        probabilities[torch.arange(len(boxes)), labels] = scores
        return Candidates(boxes, probabilities, torch.full((len(boxes),), -1))

    def _carried(self, image: Tensor, size: Tensor, seeds: Sequence[int]) -> Candidates:
        """All proposals of all steps, the last of which starts from the tracks and from what the others found."""
        detector, sampler = self.detector, self.sampler
        assert isinstance(detector, DiffusionDet)
        assert sampler is not None
        encoded = detector.encode([image])
        boxes, owners = self._starts(size)
        parts: list[Candidates] = []
        warm = sampler
        if sampler.steps > 1:
            cold = replace(
                sampler, steps=sampler.steps - 1, start_time=None, num_boxes=sampler.num_boxes or detector.num_boxes
            )
            sampled = detector.sample(encoded, seeds[:1], cold)
            parts += [_candidates(step, encoded.seen, encoded.sizes) for step in sampled]
            (first,) = cold.select(sampled, encoded.seen, encoded.sizes)
            boxes = torch.cat([boxes, first["boxes"][first["scores"] >= self.settings.keep].cpu()])
            warm = replace(sampler, steps=1, num_boxes=len(boxes))
        if len(boxes):
            boxes = boxes[: warm.num_boxes or detector.num_boxes]
            warm, start = replace(warm, start_time=self.settings.start_time), [boxes]
        else:
            warm, start = replace(warm, start_time=None), None
        if len(boxes) or sampler.steps == 1:
            sampled = detector.sample(encoded, seeds[1:], warm, start)
            parts += [_candidates(step, encoded.seen, encoded.sizes, owners) for step in sampled]
        joined = zip(*(vars(part).values() for part in parts), strict=True)
        return Candidates(*map(torch.cat, joined))

    def _starts(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes that the tracks in the image are expected in, each as often as it is noised, and whose they are."""
        expected = [torch.minimum(track.box.clamp(min=0), size) for track in self.tracks]
        inside = [k for k, box in enumerate(expected) if (box[2:] - box[:2] > LEAST_SIDE).all()]
        owners = torch.tensor(inside, dtype=torch.int64).repeat_interleave(self.settings.copies)
        boxes = torch.stack([expected[k] for k in owners.tolist()]) if inside else torch.empty(0, 4)
        return boxes, owners

    def _match(self, found: Candidates, own: Tensor) -> set[int]:
        """Let tracks see detections, one each; the indices of those detections."""
        if not self.tracks or not len(found.boxes):
            return set()
        expected = torch.stack([track.box for track in self.tracks])
        beliefs = torch.stack([track.belief for track in self.tracks])
        pairs = associate(expected, beliefs, found, own, self.settings.overlap)
        for track, detection in pairs:
            probabilities = found.probabilities[detection]
            self.tracks[track].see(found.boxes[detection], probabilities, float(probabilities.max()))
        return {detection for _, detection in pairs}

    def _begin(self, found: Candidates, taken: set[int]) -> None:
        """Begin tracks with the detections that are nobody's, unless they lie upon an object that is followed."""
        seen = [track.box for track in self.tracks if not track.missed]
        for k, (box, probabilities) in enumerate(zip(found.boxes, found.probabilities, strict=True)):
            score = float(probabilities.max())
            if k in taken or score < self.settings.birth:
                continue
            if not seen or box_iou(torch.stack(seen), box[None]).max() <= SAME:
                self.born += 1
                self.tracks.append(Track(self.born, box, box, probabilities, score))

    def _shown(self, size: Tensor) -> dict[str, Tensor]:
        """The tracks that are seen, and those that coast and are not hidden."""
        seen = [track.box for track in self.tracks if not track.missed]
        shown = []
        for track in self.tracks:
            box = torch.minimum(track.box.clamp(min=0), size)
            visible = bool((box[2:] - box[:2] > LEAST_SIDE).all())
            if visible and track.missed <= self.settings.coast and (not track.missed or not is_hidden(box, seen)):
                shown.append((box, track))
        return {
            "boxes": torch.stack([box for box, _ in shown]) if shown else torch.empty(0, 4),
            "scores": torch.tensor([track.score for _, track in shown]),
            "labels": torch.tensor([track.label for _, track in shown], dtype=torch.int64),
            "tracks": torch.tensor([track.number for _, track in shown], dtype=torch.int64),
        }


def track_clip(
    detector: Detector,
    images: Iterable[Tensor],
    settings: TrackSettings | None = None,
    sampler: BoxSampler | None = None,
    seed: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """The tracks in each of the images of a clip, as `Tracker.update` gives them."""
    tracker = Tracker(detector, settings, sampler, seed)
    return map(tracker.update, images)


def _candidates(step: Step, seen: Tensor, sizes: Tensor, owners: Tensor | None = None) -> Candidates:
    """The proposals of a step for one image; the first of them are the owners'."""
    boxes = to_image_pixels(step.output.boxes[0], seen, sizes).cpu()
    whose = torch.full((len(boxes),), -1)
    if owners is not None:
        whose[: len(owners)] = owners[: len(boxes)]
    return Candidates(boxes, step.output.logits[0].sigmoid().cpu(), whose)


def detections(candidates: Candidates, threshold: float, tracks: int) -> tuple[Candidates, Tensor]:
    """Of the boxes that score from a threshold, one for each object, best first, and whose proposals are of it.

    Boxes of one object are those of its best box's class that overlap with it by SAME, and of any class by SAME_PLACE;
    of the latter its box and probabilities are an average, weighted by their scores.

    Returns: D detections, and (T, D) bool: whether a proposal of the track is among the boxes of the detection.
    """
    areas = (candidates.boxes[:, 2:] - candidates.boxes[:, :2]).amin(1)
    scores = candidates.probabilities.amax(1)
    kept = torch.where((scores >= threshold) & (areas > 0))[0]
    boxes = candidates[kept[scores[kept].argsort(descending=True, stable=True)]]
    labels, scores = boxes.probabilities.argmax(1), boxes.probabilities.amax(1)
    overlap = box_iou(boxes.boxes, boxes.boxes)
    alike = ((overlap >= SAME) & (labels[:, None] == labels)) | (overlap >= SAME_PLACE)
    free = torch.ones(len(scores), dtype=torch.bool)
    best = []
    for row in range(len(scores)):
        if free[row]:
            best.append(row)
            free &= ~alike[row]
    chosen = torch.tensor(best, dtype=torch.int64)
    weights = scores * (overlap[chosen] >= SAME_PLACE)
    weights = weights / weights.sum(1, keepdim=True)
    found = Candidates(weights @ boxes.boxes, weights @ boxes.probabilities, boxes.owners[chosen])
    of_track = boxes.owners == torch.arange(tracks)[:, None]
    return found, (of_track.float() @ alike[:, chosen].float()) > 0


def associate(
    expected: Tensor, beliefs: Tensor, found: Candidates, own: Tensor, overlap: float
) -> list[tuple[int, int]]:
    """Pairs of a track and a detection that belong together, none twice, so that the sum of their agreements is most.

    They agree by the overlap of the detection with the box where the track is expected, and by OWN where a proposal of
    the track has become the detection. Only pairs count whose classes agree, and whose boxes overlap by so much or, of
    own proposals, at all.

    Args:
        expected, beliefs: (T, 4) and (T, K) of the tracks.
        found: D detections.
        own: (T, D) bool.
    """
    iou = box_iou(expected, found.boxes)
    share = beliefs / beliefs.sum(1, keepdim=True)
    spoken = found.probabilities / found.probabilities.sum(1, keepdim=True)
    same_class = (beliefs.argmax(1)[:, None] == found.probabilities.argmax(1)) | (share @ spoken.T > 0.25)
    allowed = same_class & ((iou >= overlap) | (own & (iou > 0.1)))
    agreement = torch.where(allowed, iou + OWN * own, 0.0)
    tracks, chosen = linear_sum_assignment(agreement.numpy(), maximize=True)
    return [(t, d) for t, d in zip(tracks.tolist(), chosen.tolist(), strict=True) if allowed[t, d]]


def is_hidden(box: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether one of the other boxes (4,) covers HIDDEN of this one."""
    if not others:
        return False
    boxes = torch.stack(list(others))
    sides = torch.minimum(boxes[:, 2:], box[2:]) - torch.maximum(boxes[:, :2], box[:2])
    return bool((sides.clamp(min=0).prod(1) >= HIDDEN * (box[2:] - box[:2]).prod()).any())
