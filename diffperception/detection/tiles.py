"""Detection in large pictures: window by window, and what the windows found put together."""

from collections.abc import Iterator, Sequence

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from diffperception.data.images import to_float
from diffperception.data.tiles import Tiling, Window
from diffperception.detection.detector import Detector, DiffusionDet
from diffperception.detection.sampler import BoxSampler
from diffperception.detection.start import StartBoxes
from diffperception.diffusion import sample_seed

MAX_DETECTIONS = 3000  # of a picture in several windows, the best
BORDER = 4.0  # pixels from a window's inner border to a box that counts as cut by it
ALIKE = 0.5  # IoU, in what two windows share, from which on they see one object
NMS_THRESHOLD = 0.5  # of detectors that have no sampler to say it

Detections = dict[str, Tensor]


def predict_images(
    detector: Detector,
    images: Sequence[Tensor],
    seeds: Sequence[int],
    sampler: BoxSampler | None,
    tiling: Tiling,
    batch_size: int,
    start: StartBoxes | None = None,
) -> list[Detections]:
    """`Detector.predict`, but that pictures larger than a tile are predicted in windows, `batch_size` of them at once.

    Args:
        images: (3, H, W), float32 in 0..1 or, where there is a tile, uint8 too: only windows become float.
        seeds: one per image; of the windows of a large one they follow from it and their numbers.
        start: boxes that a DiffusionDet starts from, where there is no tile.
    """
    if start is not None:
        assert isinstance(detector, DiffusionDet)
        assert tiling.tile is None
        return detector.predict(list(images), seeds, sampler, start=start)
    if tiling.tile is None:
        return detector.predict(list(images), seeds, sampler)
    return [
        _predict_tiles(detector, image, seed, sampler, tiling, batch_size)
        for image, seed in zip(images, seeds, strict=True)
    ]


def require_no_masks(detector: Detector, tiling: Tiling) -> None:
    """ValueError for a detector of masks where pictures are cut: masks of large pictures are not put together."""
    if tiling.tile is not None and detector.gives_masks:
        name = type(detector).__name__
        raise ValueError(f"this {name} gives masks, which are not put together over windows: leave the option tile out")


def _predict_tiles(
    detector: Detector, image: Tensor, seed: int, sampler: BoxSampler | None, tiling: Tiling, batch_size: int
) -> Detections:
    windows = tiling.windows(*image.shape[-2:])
    if len(windows) == 1:
        return detector.predict([to_float(image)], [seed], sampler)[0]
    found: list[Detections] = []
    for first in range(0, len(windows), batch_size):
        numbers = range(first, min(first + batch_size, len(windows)))
        parts = [to_float(windows[i].cut(image)) for i in numbers]
        predicted = detector.predict(parts, [sample_seed(seed, i) for i in numbers], sampler)
        found += [{name: values.cpu() for name, values in detections.items()} for detections in predicted]
    used = sampler or detector.sampler
    return merge_windows(found, windows, used.nms_threshold if used else NMS_THRESHOLD)


def merge_windows(found: Sequence[Detections], windows: Sequence[Window], nms_threshold: float | None) -> Detections:
    """What a picture shows, from what each of its overlapping windows does; best first, MAX_DETECTIONS at most.

    Two detections of a class are of one object if, in the part that both windows show, their boxes have an IoU of at
    least ALIKE and neither score is below half the other. A box that an inner border cuts is left out where another
    window has that object whole; where none has, as it is longer than the overlap, the pieces are joined: their hull,
    with their best score. Class-wise NMS leaves one of several whole ones.

    Args:
        found: of each window `boxes` (n, 4) xyxy in its pixels, `scores` and `labels` (n,), on the CPU.
        windows: that cover a picture.
        nms_threshold: None for no NMS.
    """
    edges = torch.tensor(windows, dtype=torch.float32)
    home = torch.arange(len(windows)).repeat_interleave(torch.tensor([len(f["scores"]) for f in found]))
    boxes = torch.cat([f["boxes"] for f in found]).float() + edges[home][:, [0, 1, 0, 1]]
    scores, labels = (torch.cat([f[name] for f in found]) for name in ("scores", "labels"))
    picture = torch.cat([edges[:, :2].amin(0), edges[:, 2:].amax(0)])
    cut = (((boxes - edges[home]).abs() <= BORDER) & (edges != picture)[home]).any(1)

    rows = torch.arange(len(boxes)).split([len(f["scores"]) for f in found])
    covered = torch.zeros_like(cut)
    links = [torch.empty(2, 0, dtype=torch.int64)]
    for i, j, shared in _overlapping(edges):
        a, b = rows[i], rows[j]
        if not (len(a) and len(b)):
            continue
        alike = _alike(boxes, scores, labels, a, b, shared)
        covered[a] |= (alike * ~cut[b] > 0).any(1)
        covered[b] |= (alike * ~cut[a, None] > 0).any(0)
        pieces = alike * cut[a, None] * cut[b]  # each goes with the one that fits it best, if that says the same
        pieces = (pieces > 0) & (pieces == pieces.amax(1, keepdim=True)) & (pieces == pieces.amax(0, keepdim=True))
        ends = pieces.nonzero().T
        links.append(torch.stack([a[ends[0]], b[ends[1]]]))
    kept = ~(cut & covered)
    boxes, scores, labels = _joined(boxes, scores, labels, kept, torch.cat(links, 1))
    best = scores.argsort(descending=True, stable=True)
    if nms_threshold is not None:
        best = batched_nms(boxes, scores, labels, nms_threshold)
    best = best[:MAX_DETECTIONS]
    return {"boxes": boxes[best], "scores": scores[best], "labels": labels[best]}


def _overlapping(edges: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Each two windows (W, 4) that overlap, by their numbers, and the part (4,) that they share."""
    for i, window in enumerate(edges):
        others = edges[i + 1 :]
        shared = torch.cat([torch.maximum(window, others)[:, :2], torch.minimum(window, others)[:, 2:]], 1)
        for j in (shared[:, 2:] > shared[:, :2]).all(1).nonzero().flatten().tolist():
            yield i, i + 1 + j, shared[j]


def _alike(boxes: Tensor, scores: Tensor, labels: Tensor, a: Tensor, b: Tensor, shared: Tensor) -> Tensor:
    """(len(a), len(b)) IoU, in what two windows share, of their detections (as row numbers); 0 where objects differ."""
    low, high = shared[[0, 1, 0, 1]], shared[[2, 3, 2, 3]]
    iou = box_iou(boxes[a].clamp(low, high), boxes[b].clamp(low, high))  # nan where a box is not in the shared part
    ratio = scores[a, None] / scores[b]
    return torch.where((labels[a, None] == labels[b]) & (ratio >= 0.5) & (ratio <= 2) & (iou >= ALIKE), iou, 0)


def _joined(
    boxes: Tensor, scores: Tensor, labels: Tensor, kept: Tensor, links: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The detections that are kept, those that are linked (2, n; row numbers) replaced by their hulls."""
    links = links[:, kept[links].all(0)]
    shape = (len(boxes), len(boxes))
    groups, of_row = connected_components(coo_array((torch.ones(links.shape[1]).numpy(), links.numpy()), shape), False)
    group = torch.from_numpy(of_row).long()[kept]
    wide = group[:, None].expand(-1, 2)
    low = boxes.new_zeros(groups, 2).scatter_reduce(0, wide, boxes[kept, :2], "amin", include_self=False)
    high = boxes.new_zeros(groups, 2).scatter_reduce(0, wide, boxes[kept, 2:], "amax", include_self=False)
    best = scores.new_zeros(groups).scatter_reduce(0, group, scores[kept], "amax", include_self=False)
    of_group = labels.new_zeros(groups).scatter(0, group, labels[kept])
    present = group.unique()
    return torch.cat([low, high], 1)[present], best[present], of_group[present]
