"""One step that learns what several find: a teacher's detections as soft scores of all boxes (arXiv 1503.02531).

Most of what several steps are worth to a noise-to-box detector is the pool of their predictions, of which NMS leaves
the box that is surest of itself. So each box of the student learns how good it is by what the teacher's pool came to,
whichever box the matcher gave an object to.
"""

from torch import Tensor

from diffperception.detection.boxes import paired_giou
from diffperception.detection.criterion import quality_focal
from diffperception.detection.heads.boxes import HeadOutput
from diffperception.detection.targets import PaddedTargets

MIN_IOU = 0.5  # boxes that overlap a detection less are none of its object


def taught_scores(boxes: Tensor, classes: int, taught: PaddedTargets) -> Tensor:
    """How good each box is as each class: score times IoU of the teacher's detection for which that is most.

    Args:
        boxes: (S, B, N, 4) xyxy in pixels.
        classes: K.
        taught: the teacher's detections of the B images, their `scores` (B, M) in `more`.

    Returns: (S, B, N, K) in 0..1; 0 where the IoU with every detection of the class is below MIN_IOU.
    """
    iou = paired_giou(boxes[:, :, :, None], taught.boxes[None, :, None])[0]  # (S, B, N, M)
    quality = iou * (iou >= MIN_IOU) * (taught.more["scores"] * taught.valid)[None, :, None]
    labels = taught.labels[None, :, None].expand_as(quality)
    return quality.new_zeros(*boxes.shape[:3], classes).scatter_reduce(3, labels, quality, "amax")


def distillation_loss(output: HeadOutput, taught: PaddedTargets) -> Tensor:
    """|q - p|^2 times the cross-entropy of the scores p with q = `taught_scores`, per object by the teacher; 0-d.

    That is the quality focal loss (arXiv 2006.04388, eq. 2), 0 where student and teacher agree, summed over stages,
    boxes and classes; the number of objects is the sum of the teacher's scores, 1 at least.
    """
    logits = output.logits.float()
    wanted = taught_scores(output.boxes.detach().float(), logits.shape[-1], taught)
    objects = (taught.more["scores"] * taught.valid).sum().clamp(min=1)
    return quality_focal(logits, wanted).sum() / objects
