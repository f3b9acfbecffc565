"""One step that learns from a teacher's detections: what is wanted of each box, by hand; what it leaves as it was."""

import pytest
import torch
from torch import Tensor

from diffperception.detection import DiffusionDet, HeadOutput
from diffperception.detection.distillation import distillation_loss, taught_scores
from diffperception.detection.targets import PaddedTargets
from tests.detection.scenes import random_image, random_target, tiny_detector

IMAGES = [random_image(64, 96, 1), random_image(70, 50, 2)]
TARGETS = [random_target(n, *image.shape[1:], seed=n) for n, image in zip([3, 0], IMAGES, strict=True)]
SIZES = torch.tensor([[96.0, 64, 96, 64], [50, 70, 50, 70]])


def detections(boxes: list[list[float]], scores: list[float], labels: list[int]) -> dict[str, Tensor]:
    named = {"boxes": torch.tensor(boxes).reshape(-1, 4), "scores": torch.tensor(scores)}
    return named | {"labels": torch.tensor(labels, dtype=torch.int64)}


# Two boxes of class 1 that both overlap the student's first, one of class 0; nothing in the second image.
TAUGHT = [
    detections([[0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 20]], [0.5, 0.9, 0.8], [1, 1, 0]),
    detections([], [], []),
]
BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4], [50, 50, 60, 60]]).expand(2, 2, 3, 4)


def test_wanted_is_the_most_of_score_times_iou_of_a_class() -> None:
    wanted = taught_scores(BOXES, 3, PaddedTargets.collate(TAUGHT, SIZES))
    assert wanted.shape == (2, 2, 3, 3)
    # of the first box: IoU 1 and 0.8 with class 1 (0.5 and 0.72), exactly 0.5 with class 0; of the second 0.4 and 0.5
    expected = torch.tensor([[0.8 * 0.5, 0.9 * 0.8, 0.0], [0, 0.9 * 0.5, 0], [0, 0, 0]])
    torch.testing.assert_close(wanted[1, 0], expected, atol=1e-5, rtol=0)
    assert (wanted[:, 1] == 0).all()


def test_the_loss_is_that_of_the_equation() -> None:
    logits = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    taught = PaddedTargets.collate(TAUGHT, SIZES)
    q, p = taught_scores(BOXES, 3, taught), logits.sigmoid()
    entropy = -q * p.log() - (1 - q) * (1 - p).log()
    expected = ((q - p) ** 2 * entropy).sum() / (0.5 + 0.9 + 0.8)
    torch.testing.assert_close(distillation_loss(HeadOutput(logits, BOXES), taught), expected)


def test_where_student_and_teacher_agree_there_is_nothing_to_learn() -> None:
    taught = PaddedTargets.collate(TAUGHT, SIZES)
    wanted = taught_scores(BOXES, 3, taught).clamp(1e-6, 1 - 1e-6)
    logits = wanted.logit().requires_grad_()
    loss = distillation_loss(HeadOutput(logits, BOXES), taught)
    loss.backward()
    assert loss < 1e-10
    assert logits.grad.abs().max() < 1e-5


def test_boxes_are_not_moved_by_what_their_scores_learn() -> None:
    boxes, logits = BOXES.clone().requires_grad_(), torch.zeros(2, 2, 3, 3, requires_grad=True)
    distillation_loss(HeadOutput(logits, boxes), PaddedTargets.collate(TAUGHT, SIZES)).backward()
    assert boxes.grad is None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("draws", [1, 3])
def test_the_other_terms_stay_as_they_were(draws: int) -> None:
    def losses(taught: list[dict] | None) -> dict[str, Tensor]:
        detector: DiffusionDet = tiny_detector(noise_draws=draws).train()
        return detector.loss(IMAGES, TARGETS, torch.Generator().manual_seed(0), taught)

    plain, taught = losses(None), losses(TAUGHT)
    assert taught.keys() - plain.keys() == {"distillation"}
    assert all(torch.equal(plain[name], taught[name]) for name in plain)
    assert taught["distillation"] > 0


def test_a_teacher_that_finds_nothing_wants_nothing() -> None:
    nothing = [detections([], [], [])] * 2
    logits = torch.full((2, 2, 3, 3), -30.0)
    assert distillation_loss(HeadOutput(logits, BOXES), PaddedTargets.collate(nothing, SIZES)) == 0
