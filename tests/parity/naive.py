"""The reference DiffusionDet as plain functions of its weights (spec: detection), written for clarity alone."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou, roi_align

State = Mapping[str, Tensor]
BODY = "backbone.bottom_up."
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def prepare(images: list[Tensor]) -> Tensor:
    """Images (3, H, W) in 0..1, normalised and padded together to multiples of 32."""
    height, width = (-(-max(image.shape[axis] for image in images) // 32) * 32 for axis in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = (255 * image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
            STD
        ).view(3, 1, 1)
    return batch


def resnet_maps(state: State, images: Tensor) -> list[Tensor]:
    """(B, 3, H, W) -> the outputs of res2 to res5."""

    def convolve(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{BODY}{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return F.batch_norm(
            x, *(state[f"{BODY}{name}.norm.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
        )

    x = F.max_pool2d(F.relu(convolve(images, "stem.conv1", stride=2)), kernel_size=3, stride=2, padding=1)
    maps = []
    for stage in (2, 3, 4, 5):
        for block in range(_count(state, f"{BODY}res{stage}.")):
            name, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            shortcut = convolve(x, f"{name}.shortcut", stride) if block == 0 else x
            x = F.relu(convolve(x, f"{name}.conv1"))
            x = F.relu(convolve(x, f"{name}.conv2", stride))
            x = F.relu(convolve(x, f"{name}.conv3") + shortcut)
        maps.append(x)
    return maps


def swin_maps(state: State, images: Tensor, window: int) -> list[Tensor]:
    """(B, 3, H, W) -> the normalised outputs of the four stages, (B, C, H', W')."""
    x = F.conv2d(images, state[f"{BODY}patch_embed.proj.weight"], state[f"{BODY}patch_embed.proj.bias"], stride=4)
    x = _norm(state, f"{BODY}patch_embed.norm", x.permute(0, 2, 3, 1))
    maps = []
    for stage in range(4):
        for block in range(_count(state, f"{BODY}layers.{stage}.blocks.")):
            shift = window // 2 if block % 2 else 0
            x = _swin_block(state, f"{BODY}layers.{stage}.blocks.{block}", x, window, shift)
        maps.append(_norm(state, f"{BODY}norm{stage}", x).permute(0, 3, 1, 2))
        if stage < 3:
            four = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            normed = _norm(state, f"{BODY}layers.{stage}.downsample.norm", four)
            x = F.linear(normed, state[f"{BODY}layers.{stage}.downsample.reduction.weight"])
    return maps


def _swin_block(state: State, name: str, x: Tensor, window: int, shift: int) -> Tensor:
    """(B, H, W, C): every pixel attends to every other, but for a bias of minus infinity outside its window."""
    height, width = x.shape[1:3]
    table = state[f"{name}.attn.relative_position_bias_table"]
    padded = F.pad(_norm(state, f"{name}.norm1", x), (0, 0, 0, -width % window, 0, -height % window))
    qkv = _linear(state, f"{name}.attn.qkv", padded.flatten(1, 2)).unflatten(-1, (3, table.shape[1], -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, H * W, C / heads)
    scores = q @ k.mT / q.shape[-1] ** 0.5 + _window_bias(table, *padded.shape[1:3], window, shift)
    attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(padded.shape)
    x = x + _linear(state, f"{name}.attn.proj", attended)[:, :height, :width]
    hidden = F.gelu(_linear(state, f"{name}.mlp.fc1", _norm(state, f"{name}.norm2", x)))
    return x + _linear(state, f"{name}.mlp.fc2", hidden)


def _window_bias(table: Tensor, height: int, width: int, window: int, shift: int) -> Tensor:
    """(heads, H * W, H * W): the table by offset; -100 between parts that the shift brought together."""
    indices, together, apart = [], [], []
    for side in (height, width):
        place = (torch.arange(side) - shift) % side  # of each row or column after the cyclic shift
        part = (place >= side - window).int() + (place >= side - shift) if shift else torch.zeros(side)
        indices.append((place[:, None] - place + window - 1).clamp(0, 2 * window - 2))
        together.append(place[:, None] // window == place // window)
        apart.append(part[:, None] != part)

    def both_axes(of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor, Tensor]:
        shape = (height, width, height, width)
        return (
            of_rows[:, None, :, None].expand(shape).reshape(height * width, -1),
            of_columns[None, :, None, :].expand(shape).reshape(height * width, -1),
        )

    rows, columns = both_axes(*indices)
    bias = table[rows * (2 * window - 1) + columns]
    bias = bias - 100.0 * torch.logical_or(*both_axes(*apart))[..., None]
    return bias.masked_fill(~torch.logical_and(*both_axes(*together))[..., None], -torch.inf).permute(2, 0, 1)


def pyramid(state: State, maps: list[Tensor]) -> list[Tensor]:
    """FPN over maps of strides 4 to 32, finest first."""
    result: list[Tensor] = []
    above = None
    for level in (5, 4, 3, 2):
        x = F.conv2d(maps[level - 2], *(state[f"backbone.fpn_lateral{level}.{kind}"] for kind in ("weight", "bias")))
        above = x if above is None else x + above.repeat_interleave(2, -1).repeat_interleave(2, -2)
        out = (state[f"backbone.fpn_output{level}.{kind}"] for kind in ("weight", "bias"))
        result.insert(0, F.conv2d(above, *out, padding=1))
    return result


def head(state: State, maps: list[Tensor], boxes: Tensor, t: Tensor, heads: int = 8) -> tuple[Tensor, Tensor]:
    """Maps of strides 4 to 32, boxes (B, N, 4) xyxy pixels, t (B,) -> logits and boxes of every stage."""
    half = maps[0].shape[1] // 2
    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
    time = F.gelu(_linear(state, "head.time_mlp.1", torch.cat([angles.sin(), angles.cos()], 1)))
    time = _linear(state, "head.time_mlp.3", time)
    features = None
    all_logits, all_boxes = [], []
    for stage in range(_count(state, "head.head_series.")):
        logits, boxes, features = _stage(state, f"head.head_series.{stage}", maps, boxes, features, time, heads)
        all_logits.append(logits)
        all_boxes.append(boxes)
    return torch.stack(all_logits), torch.stack(all_boxes)


def _stage(
    state: State, name: str, maps: list[Tensor], boxes: Tensor, x: Tensor | None, time: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    width = maps[0].shape[1]
    side = math.isqrt(state[f"{name}.inst_interact.out_layer.weight"].shape[1] // width)
    rois = _rois(maps, boxes, side)  # (B, N, positions, d)
    x = rois.mean(2) if x is None else x
    attention = f"{name}.self_attn"
    qkv = F.linear(x, state[f"{attention}.in_proj_weight"], state[f"{attention}.in_proj_bias"])
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    attended = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = _norm(state, f"{name}.norm1", x + _linear(state, f"{attention}.out_proj", attended))

    dynamic = f"{name}.inst_interact"
    first, second = _linear(state, f"{dynamic}.dynamic_layer", x).chunk(2, -1)
    y = F.relu(_norm(state, f"{dynamic}.norm1", rois @ first.unflatten(-1, (width, -1))))
    y = F.relu(_norm(state, f"{dynamic}.norm2", y @ second.unflatten(-1, (-1, width))))
    y = F.relu(_norm(state, f"{dynamic}.norm3", _linear(state, f"{dynamic}.out_layer", y.flatten(2))))
    x = _norm(state, f"{name}.norm2", x + y)
    x = _norm(
        state, f"{name}.norm3", x + _linear(state, f"{name}.linear2", F.relu(_linear(state, f"{name}.linear1", x)))
    )

    scale, shift = _linear(state, f"{name}.block_time_mlp.1", F.silu(time))[:, None].chunk(2, -1)
    modulated = x * (1 + scale) + shift
    logits = _linear(state, f"{name}.class_logits", _tower(state, f"{name}.cls_module", modulated))
    deltas = _linear(state, f"{name}.bboxes_delta", _tower(state, f"{name}.reg_module", modulated))
    return logits, _refine(boxes, deltas), x


def _tower(state: State, name: str, x: Tensor) -> Tensor:
    for layer in range(_count(state, f"{name}.") // 2):  # Linear, LayerNorm, ReLU: two of three have weights
        x = F.relu(_norm(state, f"{name}.{3 * layer + 1}", F.linear(x, state[f"{name}.{3 * layer}.weight"])))
    return x


def _rois(maps: list[Tensor], boxes: Tensor, side: int) -> Tensor:
    """RoIAlign, a box at a time."""
    pooled = []
    for image, row in enumerate(boxes):
        for box in row:
            size = float((box[2:] - box[:2]).clamp(min=0).prod().sqrt())
            level = min(max(math.floor(4 + math.log2(size / 224 + 1e-8)), 2), 5)
            one_map = maps[level - 2][image, None]
            pooled.append(roi_align(one_map, [box[None]], side, 1 / 2**level, sampling_ratio=2, aligned=True))
    return torch.cat(pooled).flatten(2).mT.unflatten(0, boxes.shape[:2])


def _refine(boxes: Tensor, deltas: Tensor) -> Tensor:
    cx, cy, w, h = box_convert(boxes, "xyxy", "cxcywh").unbind(-1)
    dx, dy, dw, dh = deltas.unbind(-1)
    limit = math.log(100_000 / 16)
    refined = [cx + dx / 2 * w, cy + dy / 2 * h, w * dw.clamp(max=limit).exp(), h * dh.clamp(max=limit).exp()]
    return box_convert(torch.stack(refined, -1), "cxcywh", "xyxy")


def matching_cost(logits: Tensor, boxes: Tensor, objects: Tensor, labels: Tensor, size: Tensor) -> Tensor:
    """(N, n) of one image: logits (N, K), boxes (N, 4), objects (n, 4), labels (n,), size (4,) of the image."""
    p = logits.sigmoid()[:, labels]
    focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    l1 = (boxes[:, None] / size - objects / size).abs().sum(-1)
    centres = box_convert(boxes, "xyxy", "cxcywh")[:, None, :2]
    middle, extent = box_convert(objects, "xyxy", "cxcywh").split(2, -1)
    within = ((centres - middle).abs() < extent / 2).all(-1)
    near = ((centres - middle).abs() < 2.5 * extent).all(-1)
    cost = 2 * focal + 5 * l1 - 2 * generalized_box_iou(boxes, objects) + 100 * ~(within & near)
    return cost + 10_000 * ~(within | near).any(1, keepdim=True)


def dynamic_k(cost: Tensor, iou: Tensor) -> list[int]:
    """Object by object: cost and IoU (N, n) of one image -> the object of each proposal, or -1."""
    proposals, objects = cost.shape
    owner: list[set[int]] = [set() for _ in range(proposals)]
    for j in range(objects):
        k = max(1, int(iou[:, j].topk(min(5, proposals)).values.sum()))
        for i in cost[:, j].argsort()[:k].tolist():
            owner[i].add(j)
    result = [-1 if not o else next(iter(o)) if len(o) == 1 else int(cost[i].argmin()) for i, o in enumerate(owner)]
    while left := [j for j in range(objects) if j not in result]:
        wishes = {j: min((float(cost[i, j]), i) for i in range(proposals) if result[i] < 0) for j in left}
        for j, (price, i) in wishes.items():
            if price == min(p for p, other in wishes.values() if other == i):
                result[i] = j
    return result


def alpha_bars() -> list[float]:
    """Of the cosine schedule, t = 0..999."""
    levels = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    result, product = [], 1.0
    for before, after in pairwise(levels):
        product *= 1 - min(1 - after / before, 0.999)
        result.append(product)
    return result


def detect(
    denoise: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    size: Tensor,
    seed: int,
    count: int,
    steps: int,
    eta: float = 1.0,
    renewal: float | None = 0.5,
    ensemble: bool = True,
    nms: float | None = 0.5,
) -> dict[str, Tensor]:
    """Detections in one image of `size` (4,) width, height, width, height.

    The defects of the reference are none here: every box has at least a pixel a side, the last step is pooled too.

    Args:
        denoise: boxes (N, 4) xyxy pixels and t -> the last stage's logits (N, K) and boxes (N, 4).
        seed: of the noise: where boxes start, then each step's own noise and the boxes that renewal takes.
    """
    generator = torch.Generator().manual_seed(seed)
    levels = alpha_bars()
    times = [int(-1 + 1000 * step / steps) for step in range(steps, -1, -1)]
    z = torch.randn(count, 4, generator=generator)
    pooled = []
    for t, s in pairwise(times):
        cxcywh = (z.clamp(-2, 2) / 2 + 1) / 2 * size
        cxcywh[:, 2:] = cxcywh[:, 2:].clamp(min=1)
        logits, boxes = denoise(box_convert(cxcywh, "cxcywh", "xyxy"), t)
        pooled.append(_best(logits.sigmoid(), boxes))
        if s < 0:
            break
        a, b = levels[t], levels[s]
        x0 = ((2 * box_convert(boxes, "xyxy", "cxcywh") / size - 1) * 2).clamp(-2, 2)
        eps = (z / a**0.5 - x0) / (1 / a - 1) ** 0.5
        sigma = eta * ((1 - a / b) * (1 - b) / (1 - a)) ** 0.5
        noise, fresh = (torch.randn(count, 4, generator=generator) for _ in range(2))
        z = b**0.5 * x0 + (1 - b - sigma**2) ** 0.5 * eps + sigma * noise
        if renewal is not None:
            poor = logits.sigmoid().amax(1) <= renewal
            z[poor] = fresh[poor]
    found = _suppress([row for rows in (pooled if ensemble else pooled[-1:]) for row in rows], nms)
    boxes = torch.stack([box for _, _, box in found]).clamp(min=0).minimum(size)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    scores, labels = torch.tensor([row[0] for row in found]), torch.tensor([row[1] for row in found])
    return {"boxes": boxes[inside], "scores": scores[inside], "labels": labels[inside]}


def _best(scores: Tensor, boxes: Tensor) -> list[tuple[float, int, Tensor]]:
    """The N best of N x K scores, with label and box."""
    rows = [(float(scores[i, k]), k, boxes[i]) for i in range(len(boxes)) for k in range(scores.shape[1])]
    return sorted(rows, key=lambda row: -row[0])[: len(boxes)]


def _suppress(rows: list[tuple[float, int, Tensor]], threshold: float | None) -> list[tuple[float, int, Tensor]]:
    """Those that overlap no better one of their class by more than the threshold, best first."""
    kept: list[tuple[float, int, Tensor]] = []
    for score, label, box in sorted(rows, key=lambda row: -row[0]):
        rivals = [other for _, of, other in kept if of == label]
        if threshold is None or not rivals or box_iou(box[None], torch.stack(rivals)).max() <= threshold:
            kept.append((score, label, box))
    return kept


def _count(state: State, beginning: str) -> int:
    return len({name[len(beginning) :].split(".")[0] for name in state if name.startswith(beginning)})


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])
