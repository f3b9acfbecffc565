"""Tracks: identity through rest, motion and occlusion; births and deaths; what proposals say of whose box it is."""

from collections.abc import Iterable

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from diffperception.detection import BoxSampler, HeadOutput
from diffperception.detection.detector import Detector
from diffperception.detection.heads.boxes import Head
from diffperception.detection.tracks import (
    SAME_PLACE,
    Candidates,
    Tracker,
    TrackSettings,
    associate,
    detections,
    is_hidden,
    track_clip,
)
from tests.detection.scenes import tiny_detector

MATCHING = TrackSettings(carry=False)
RED, GREEN = 0, 1


class Blobs(Detector):
    """Finds connected regions of pure red and pure green, without any learning."""

    def loss(self, images: list[Tensor], targets: list[dict], generator: torch.Generator | None = None) -> dict:
        raise NotImplementedError

    def predict(self, images: list, seeds: object = None, sampler: object = None) -> list[dict[str, Tensor]]:
        return [self._find(image) for image in images]

    def _find(self, image: Tensor) -> dict[str, Tensor]:
        boxes, labels = [], []
        for label in (RED, GREEN):
            for y, x in ndimage.find_objects(ndimage.label((image[label] - image[1 - label] > 0.5).numpy())[0]):
                boxes.append([x.start, y.start, x.stop, y.stop])
                labels.append(label)
        found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return {
            "boxes": found,
            "scores": torch.full((len(boxes),), 0.9),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }


def frame(*squares: tuple[int, int, int], side: int = 8) -> Tensor:
    """Black, 40 x 60, with squares (x, y, label), of which later ones hide earlier ones."""
    image = torch.zeros(3, 40, 60)
    for x, y, label in squares:
        image[:, max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)] = 0
        image[label, max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)] = 1
    return image


def followed(images: Iterable[Tensor], settings: TrackSettings = MATCHING) -> list[dict[int, list[float]]]:
    """Of each frame the boxes by track."""
    found = track_clip(Blobs(["red", "green"]), images, settings)
    return [dict(zip(each["tracks"].tolist(), each["boxes"].tolist(), strict=True)) for each in found]


def test_what_does_not_move_stays_the_same_track() -> None:
    still = followed([frame((5, 5, RED), (30, 20, RED), (30, 5, GREEN))] * 6)
    assert all(each == still[0] for each in still)
    assert sorted(still[0].values()) == [[5, 5, 13, 13], [30, 5, 38, 13], [30, 20, 38, 28]]


def test_a_track_goes_on_behind_what_hides_it_for_as_long_as_its_patience() -> None:
    images = [frame((4 * k, 10, GREEN), (20, 8, RED), side=12) for k in range(9)]
    tracks = followed(images)
    (mover,) = [number for number, box in tracks[0].items() if box[0] == 0]
    assert [number for number in tracks[-1] if number != mover] == [number for number in tracks[0] if number != mover]
    assert tracks[-1][mover] == [32, 10, 44, 22]
    hidden = [k for k, each in enumerate(tracks) if mover not in each]
    images[hidden[0] : hidden[0]] = [images[hidden[0]]] * 4  # for which it would have gone on unseen
    assert mover not in followed(images, TrackSettings(carry=False, patience=2))[-1]


def test_births_and_deaths() -> None:
    images = [frame((5, 5, RED))] * 2 + [frame()] * 4 + [frame((5, 5, RED), (30, 5, GREEN))] * 2
    short = followed(images, TrackSettings(carry=False, patience=2, coast=0))
    assert [list(each) for each in short] == [[1], [1], [], [], [], [], [2, 3], [2, 3]]
    long = followed(images, TrackSettings(carry=False, patience=4, coast=1))
    assert [list(each) for each in long] == [[1], [1], [1], [], [], [], [1, 2], [1, 2]]


def test_weak_detections_go_on_with_tracks_but_begin_none() -> None:
    class Weak(Blobs):
        def _find(self, image: Tensor) -> dict[str, Tensor]:
            found = super()._find(image)
            return found | {"scores": found["scores"] * image.max()}

    images = [frame((5, 5, RED)), 0.6 * frame((5, 5, RED), (30, 5, RED))]
    settings = TrackSettings(carry=False, birth=0.6, keep=0.5)
    found = [each["tracks"].tolist() for each in track_clip(Weak(["red", "green"]), images, settings)]
    assert found == [[1], [1]]


def candidates(boxes: list[list[float]], probabilities: list[list[float]], owners: list[int]) -> Candidates:
    return Candidates(torch.tensor(boxes, dtype=torch.float32), torch.tensor(probabilities), torch.tensor(owners))


def test_boxes_of_one_object_become_one_detection_that_knows_whose_proposals_it_has() -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [50, 0, 60, 10], [0, 0, 10, 10.0]]
    given = candidates(boxes, [[0.6, 0.1], [0.2, 0.1], [0.1, 0.9], [0.01, 0.02]], [1, -1, 0, 0])
    found, own = detections(given, 0.15, 2)
    torch.testing.assert_close(found.boxes, torch.tensor([[50.0, 0, 60, 10], [0, 0, 10, 0.75 * 10 + 0.25 * 9]]))
    torch.testing.assert_close(found.probabilities, torch.tensor([[0.1, 0.9], [0.5, 0.1]]))
    assert own.tolist() == [[True, False], [False, True]]


def test_two_classes_in_one_place_are_one_object_and_beside_each_other_two() -> None:
    for shift, count in ((0.0, 1), (10 * (1 - SAME_PLACE), 2)):
        given = candidates([[0, 0, 10, 10], [shift, 0, 10 + shift, 10]], [[0.6, 0.1], [0.1, 0.5]], [-1, -1])
        assert len(detections(given, 0.1, 0)[0].boxes) == count
    assert len(detections(candidates([[0, 0, 10, 10]], [[0.05, 0.02]], [-1]), 0.1, 3)[0].boxes) == 0


def test_where_overlaps_say_little_the_index_of_the_proposal_decides() -> None:
    expected = torch.tensor([[0.0, 0, 10, 10], [3, 0, 13, 10]])
    found = candidates([[1, 0, 11, 10], [2, 0, 12, 10]], [[0.9, 0.0], [0.9, 0.0]], [-1, -1])
    beliefs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    none = torch.zeros(2, 2, dtype=torch.bool)
    crossed = torch.tensor([[False, True], [True, False]])
    assert associate(expected, beliefs, found, none, 0.3) == [(0, 0), (1, 1)]
    assert associate(expected, beliefs, found, crossed, 0.3) == [(0, 1), (1, 0)]
    assert associate(expected, beliefs, found, crossed, 0.9) == [
        (0, 1),
        (1, 0),
    ]  # which overlap too little by themselves
    other = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert associate(expected, other, found, none, 0.3) == [(1, 1)]  # the first is of another class


def test_two_tracks_never_share_a_detection() -> None:
    expected = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10.5]])
    found = candidates([[0, 0, 10, 10]], [[0.9, 0.0]], [-1])
    pairs = associate(expected, torch.ones(2, 2), found, torch.ones(2, 1, dtype=torch.bool), 0.3)
    assert pairs == [(0, 0)]


def test_hidden_is_what_one_other_covers() -> None:
    box = torch.tensor([0.0, 0, 10, 10])
    assert not is_hidden(box, [])
    assert is_hidden(box, [torch.tensor([0.0, 0, 10, 7])])
    assert not is_hidden(box, [torch.tensor([0.0, 0, 10, 5]), torch.tensor([0.0, 5, 10, 10])])


class Magnet(Head):
    """Pulls every proposal to the nearest of the places where objects are, and is sure of what it finds there."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.width, self.num_classes = 32, num_classes
        self.places, self.labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)

    def forward(self, pyramid: object, boxes: Tensor, t: Tensor, last_only: bool = False) -> HeadOutput:
        centres, places = boxes.view(*boxes.shape[:-1], 2, 2).mean(-2), self.places.view(-1, 2, 2).mean(-2)
        distance, nearest = torch.cdist(centres, places).min(-1)
        logits = torch.full((*boxes.shape[:-1], self.num_classes), -6.0)
        logits.scatter_(-1, self.labels[nearest][..., None], (40 - distance[..., None]) / 4)
        return HeadOutput(logits[None], self.places[nearest][None])


def carried(places: list[list[list[float]]], labels: list[int], steps: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """The tracks in frames of 60 x 60 pixels that have objects at these places."""
    detector = tiny_detector(head=Magnet, sampler=BoxSampler(steps=steps), num_boxes=30)
    tracker, found = Tracker(detector, TrackSettings(start_time=100), seed=seed), []
    for boxes in places:
        detector.head.places, detector.head.labels = torch.tensor(boxes), torch.tensor(labels)
        found.append(tracker.update(torch.zeros(3, 60, 60)))
    return found


def number_at(found: dict[str, Tensor], place: list[float]) -> int:
    """Of the one track that is there."""
    (row,) = torch.where((found["boxes"] - torch.tensor(place)).abs().amax(1) < 0.01)[0].tolist()
    return int(found["tracks"][row])


@pytest.mark.parametrize("steps", [1, 3])
def test_proposals_that_are_carried_keep_their_track_when_nothing_moves(steps: int) -> None:
    still = [[5.0, 5, 20, 20], [35, 30, 50, 55], [8, 38, 24, 50]]
    found = carried([still] * 4, [0, 1, 1], steps)
    numbers = [[number_at(each, place) for place in still] for each in found]
    assert sorted(numbers[0]) == [1, 2, 3]
    assert numbers == [numbers[0]] * 4
    assert all(len(each["tracks"]) == 3 for each in found)


def test_proposals_that_are_carried_keep_their_track_when_objects_pass_each_other() -> None:
    """At 3 pixels a frame two of one class pass each other at a distance of less than their height."""
    frames = [[[3.0 * k, 20, 14 + 3.0 * k, 34], [44 - 3.0 * k, 28, 58 - 3.0 * k, 42]] for k in range(14)]
    numbers = [
        [number_at(found, place) for place in places]
        for found, places in zip(carried(frames, [1, 1], 2), frames, strict=True)
    ]
    assert numbers == [numbers[0]] * 14


def test_tracks_depend_on_the_seed_of_their_clip_alone() -> None:
    detector = tiny_detector()
    settings = TrackSettings(birth=0.02, keep=0.01)
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))

    def boxes(seed: int) -> list[list[float]]:
        found = track_clip(detector, [image, image.flip(2)], settings, detector.sampler.changed(steps=2), seed)
        return [box for each in found for box in each["boxes"].tolist()]

    first = boxes(1)
    assert first
    list(track_clip(detector, [image.flip(1)] * 2, settings))
    assert boxes(1) == first
    assert boxes(2) != first


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong, words in (
        ({"birth": 1.2}, "birth is 1.2"),
        ({"birth": 0.2}, "below keep"),
        ({"copies": 0}, "copies is 0"),
        ({"patience": -1}, "patience is -1"),
    ):
        with pytest.raises(ValueError, match=words):
            TrackSettings(**wrong)
    with pytest.raises(ValueError, match="start_time is 1000: it must be from 0 to 999"):
        Tracker(tiny_detector(), TrackSettings(start_time=1000))
    Tracker(Blobs(["red", "green"]), TrackSettings(start_time=1000))  # which carries nothing
