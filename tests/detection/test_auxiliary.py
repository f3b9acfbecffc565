"""The dense head beside the detector's own: which cell learns what, what it changes, and what it proposes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torchvision.ops import box_iou

from diffperception.data import CocoDetection
from diffperception.detection import BoxSampler, DenseHead, Detector, DiffusionDet
from diffperception.detection.evaluator import results_rows
from diffperception.detection.heads.dense import assign_cells
from diffperception.detection.sweep import combine, sweep_sampler
from diffperception.detection.targets import PaddedTargets, image_sizes
from diffperception.diffusion import sample_seed
from diffperception.models.ops.pooling import FeaturePyramid
from diffperception.models.warm_start import warm_start
from tests.detection.scenes import (
    CLASSES,
    assert_same_detections,
    random_boxes,
    random_image,
    random_target,
    tiny_detector,
)
from tests.helpers.runs import train
from tests.training.tiny_data import CLASSES as NAMES
from tests.training.tiny_data import write_tiny_config, write_tiny_data

IMAGES = [random_image(64, 96, 1), random_image(70, 50, 2)]
TARGETS = [random_target(n, *image.shape[1:], seed=n) for n, image in zip([3, 0], IMAGES, strict=True)]
STRIDES = (8, 16)
SMALL = partial(DenseHead, layers=1)


def grid(height: int = 64, width: int = 96) -> tuple[Tensor, list[int]]:
    """Anchors of the cells of two levels, 8 cells a side, and how many cells each has."""
    levels = [
        torch.tensor(
            [[x - 4 * s, y - 4 * s, x + 4 * s, y + 4 * s] for y in _middles(height, s) for x in _middles(width, s)]
        )
        for s in STRIDES
    ]
    return torch.cat(levels), [len(level) for level in levels]


def _middles(side: int, stride: int) -> list[float]:
    return [(i + 0.5) * stride for i in range(side // stride)]


def seeded(generator_seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(generator_seed)


def assigned_one_by_one(objects: Tensor, anchors: Tensor, cells: list[int]) -> list[int]:
    """ATSS in loops, after the paper's algorithm 1; an object with no cell takes the candidate it overlaps most."""
    iou = box_iou(objects, anchors)
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    best = [(-1.0, -1)] * len(anchors)
    for number, (x1, y1, x2, y2) in enumerate(objects.tolist()):
        middle, candidates = torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2]), []
        for level, count in enumerate(cells):
            first = sum(cells[:level])
            distance = (centre[first : first + count] - middle).norm(dim=1)
            candidates += [first + i for i in distance.argsort()[:9].tolist()]
        overlaps = iou[number, candidates]
        least = overlaps.mean() + overlaps.std(correction=0)
        inside = [x1 < x < x2 and y1 < y < y2 for x, y in centre[candidates].tolist()]
        chosen = [c for c, o, i in zip(candidates, overlaps, inside, strict=True) if i and o >= least]
        for cell in chosen or [candidates[int(overlaps.argmax())]]:
            best[cell] = max(best[cell], (float(iou[number, cell]), number))
    return [number for _, number in best]


@pytest.mark.parametrize("seed", range(3))
def test_cells_are_assigned_as_the_paper_does_it_object_by_object(seed: int) -> None:
    anchors, cells = grid()
    objects = random_boxes(6, 96, 64, seed)
    assert assign_cells(objects, anchors, cells).tolist() == assigned_one_by_one(objects, anchors, cells)


def test_an_object_that_is_an_anchor_is_its_cells_and_one_of_two_pixels_has_a_cell_too() -> None:
    anchors, cells = grid()
    tiny = torch.tensor([89.0, 57.0, 91.0, 59.0])
    index = assign_cells(torch.stack([anchors[26], tiny]), anchors, cells)
    assert index[26] == 0
    assert (index == 1).sum() == 1
    assert assign_cells(torch.empty(0, 4), anchors, cells).tolist() == [-1] * len(anchors)


def test_boxes_begin_as_the_anchors_of_their_cells() -> None:
    head = DenseHead(3, 16, layers=1)
    torch.nn.init.zeros_(head.box_sides.weight)
    maps = [torch.randn(2, 16, 64 // s, 96 // s) for s in STRIDES]
    output, (anchors, cells) = head(maps, STRIDES), grid()
    assert output.cells == cells
    assert torch.equal(output.anchors, anchors)
    torch.testing.assert_close(output.boxes, anchors.expand(2, -1, -1))
    assert output.logits.shape == (2, len(anchors), 3)


def test_fine_levels_may_be_left_to_the_detectors_head() -> None:
    head = DenseHead(3, 16, layers=1, min_stride=STRIDES[1])
    maps = [torch.rand(1, 16, 96 // stride, 96 // stride) for stride in STRIDES]
    output, coarse = head(maps, STRIDES), head(maps[1:], STRIDES[1:])
    assert torch.equal(output.logits, coarse.logits)
    assert torch.equal(output.anchors, coarse.anchors)
    with pytest.raises(ValueError, match=f"min_stride is 999, but the pyramid's coarsest level has {STRIDES[-1]} pix"):
        DenseHead(3, 16, min_stride=999)(maps, STRIDES)


def test_everything_else_is_as_without_it() -> None:
    plain, with_head = tiny_detector(), tiny_detector(auxiliary=SMALL)
    theirs = with_head.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in plain.state_dict().items())
    expected, found = (d.loss(IMAGES, TARGETS, seeded()) for d in (plain, with_head))
    assert found.keys() - expected.keys() == {"dense_classification", "dense_giou"}
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    calls = []
    with_head.auxiliary.register_forward_hook(lambda *_: calls.append(1))
    detections = zip(plain.predict(IMAGES, steps=2), with_head.predict(IMAGES, steps=2), strict=True)
    assert all(torch.equal(a[name], b[name]) for a, b in detections for name in a)
    assert not calls  # the head is for training


def test_all_of_it_learns_and_so_does_the_backbone() -> None:
    detector = tiny_detector(auxiliary=SMALL).train()
    terms = detector.loss(IMAGES, TARGETS, seeded())
    (terms["dense_classification"] + terms["dense_giou"]).backward()
    learning = {name for name, p in detector.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name for name, _ in detector.named_parameters() if name.startswith("auxiliary")} <= learning
    assert "backbone.backbone.body.conv1.0.weight" in learning
    assert not any(name.startswith("head") for name in learning)


def test_its_objects_are_those_of_the_images_however_often_these_are_noised_or_few_boxes_there_are() -> None:
    one, several, few = (
        tiny_detector(auxiliary=SMALL, **more).loss(IMAGES, TARGETS, seeded())
        for more in ({}, {"noise_draws": 3}, {"num_boxes": 3})
    )
    for name in ("dense_classification", "dense_giou"):
        assert torch.equal(one[name], several[name])
        assert torch.equal(one[name], few[name])


def test_an_image_without_objects_has_a_finite_loss_in_bfloat16_too() -> None:
    detector = tiny_detector(auxiliary=SMALL).train()
    with torch.autocast("cpu", torch.bfloat16):
        terms = detector.loss(IMAGES, [TARGETS[1], TARGETS[1]], seeded())
    assert all(value.isfinite() and value.dtype == torch.float32 for value in terms.values())
    assert terms["dense_giou"] == 0


def test_it_learns_where_objects_are_and_proposes_them() -> None:
    torch.manual_seed(0)
    head = DenseHead(3, 16, layers=1, min_score=0.3)
    maps = [torch.randn(1, 16, 64 // s, 96 // s) for s in STRIDES]
    objects = torch.tensor([[8.0, 8, 40, 36], [50, 20, 90, 60], [30, 40, 46, 58]])
    target = {"boxes": objects, "labels": torch.tensor([2, 0, 1])}
    sizes = torch.tensor([[96.0, 64.0, 96.0, 64.0]])
    padded = PaddedTargets.collate([target], sizes)
    optimizer = torch.optim.Adam(head.parameters(), 2e-2)
    for _ in range(80):
        sum(head.loss(head(maps, STRIDES), padded).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = head.proposals(head(maps, STRIDES), sizes[0])
    iou, owner = box_iou(found["boxes"], objects).max(1)
    assert set(owner[:3].tolist()) == {0, 1, 2}
    assert iou[:3].min() > 0.8
    assert torch.equal(found["labels"][:3], target["labels"][owner[:3]])
    assert found["scores"].diff().max() <= 0


def eager(**options: object) -> DiffusionDet:
    """A detector whose untrained dense head proposes boxes."""
    return tiny_detector(auxiliary=partial(SMALL, min_score=0.0), **options)


def test_proposals_are_in_pixels_of_their_image_and_do_not_depend_on_the_others() -> None:
    detector = eager(min_size=32, max_size=40)
    together = detector.proposals(detector.encode(IMAGES))
    for image, found in zip(IMAGES, together, strict=True):
        (alone,) = detector.proposals(detector.encode([image]))
        assert_same_detections([found], [alone])
        height, width = image.shape[1:]
        assert (found["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert found["boxes"][:, 2].max() > 0.9 * width


def test_a_time_without_boxes_starts_from_the_proposals() -> None:
    detector = eager()
    boxes = [found["boxes"][:20] for found in detector.proposals(detector.encode(IMAGES))]
    assert min(map(len, boxes)) > 3
    expected = detector.predict(IMAGES, [1, 2], steps=2, start=boxes, start_time=300)
    found = detector.predict(IMAGES, [1, 2], steps=2, start_time=300)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in a)


def test_a_sweep_has_pure_noise_beside_the_proposals(tmp_path: Path) -> None:
    annotations, images = write_tiny_data(tmp_path, images=2)
    detector = eager(classes=list(NAMES.values()), sampler=BoxSampler(start_time=300))
    (first, target), *_ = dataset = CocoDetection(annotations, images)
    noise = combine(detector, {"start_time": ["noise"]})
    (found,) = detector.predict([first], [sample_seed(0, target["image_id"])], noise[0])
    rows = results_rows(target["image_id"], found, dataset.category_ids)
    content = json.loads(annotations.read_text())
    content["annotations"] = [row | {"id": i, "area": 9} for i, row in enumerate(rows, 1)]
    annotations.write_text(json.dumps(content))
    samplers = combine(detector, {"start_time": ["noise", 300]})
    assert [sampler and sampler.start_time for sampler in samplers] == [None, 300]
    sweep = sweep_sampler(detector, CocoDetection(annotations, images), samplers, [0])
    pure, warm = sweep.rows
    assert pure.ap.mean > 0.5 > 2 * warm.ap.mean
    assert [line.split()[2] for line in sweep.table().splitlines()[:3]] == ["start", "noise", "300"]
    assert "start: the auxiliary head's proposals; they are no pass" in sweep.table()
    counted = []
    detector.auxiliary.register_forward_hook(lambda *_: counted.append(1))
    sweep_sampler(detector, CocoDetection(annotations, images), samplers, [0])
    assert len(counted) == 2  # the images of the row that starts from them, within what is timed


def test_without_proposals_it_starts_from_noise() -> None:
    detector = tiny_detector(auxiliary=SMALL)  # untrained, it is sure of nothing
    plain, warm = detector.predict(IMAGES, [1, 2]), detector.predict(IMAGES, [1, 2], start_time=999)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(plain, warm, strict=True) for name in a)


def test_its_weights_are_in_the_file(tmp_path: Path) -> None:
    detector = eager()
    detector.save(tmp_path / "model.safetensors")
    loaded = Detector.load(tmp_path / "model.safetensors")
    expected, found = (d.predict(IMAGES, start_time=300) for d in (detector, loaded))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in a)
    assert loaded.auxiliary.arguments == detector.auxiliary.arguments


def test_a_share_of_the_images_is_learned_from_proposals_alone() -> None:
    clean, many = torch.zeros(40, dtype=torch.int64), IMAGES[:1] * 40
    padded = PaddedTargets.collate(TARGETS[:1] * 40, image_sizes(many))
    proposals = random_boxes(8, 50, 50, 1).expand(40, -1, -1)
    objects = TARGETS[0]["boxes"]

    def noised(share: float) -> Tensor:
        detector = tiny_detector(auxiliary=SMALL, proposal_share=share, num_boxes=8)
        return detector._noisy_boxes(padded, clean, seeded(), proposals)

    def near(boxes: Tensor, others: Tensor) -> Tensor:  # as time 0 has little noise
        return (boxes - others).abs().amax((1, 2)) < 3

    assert near(noised(1.0), proposals).all()
    half = noised(0.5)
    of_proposals = near(half, proposals)
    assert 8 < of_proposals.sum() < 32
    assert torch.equal(of_proposals, ~near(half[:, : len(objects)], objects))


def test_the_best_cells_propose_inside_of_the_image() -> None:
    head = DenseHead(3, 16, layers=1)
    output = head([torch.rand(2, 16, 64 // stride, 96 // stride) for stride in STRIDES], STRIDES)
    sizes = torch.tensor([[96.0, 64] * 2, [50.0, 60] * 2])
    best = output.best(5, sizes)
    order = output.logits.amax(2).argsort(dim=1, descending=True)[:, :5]
    for boxes, unclipped, chosen, size in zip(best, output.boxes, order, sizes, strict=True):
        assert torch.equal(boxes, torch.minimum(unclipped[chosen].clamp(min=0), size))
    assert not best.requires_grad
    cells = output.boxes.shape[1]
    more = output.best(cells + 3, sizes)  # begins again where the cells are used up
    assert torch.equal(more[:, cells:], more[:, :3])


def test_learning_from_proposals_changes_the_noisy_boxes_alone() -> None:
    plain, other = tiny_detector(auxiliary=SMALL), tiny_detector(auxiliary=SMALL, proposal_share=1.0)
    expected, found = (d.loss(IMAGES, TARGETS, seeded()) for d in (plain, other))
    assert all(torch.equal(expected[name], found[name]) for name in ("dense_classification", "dense_giou"))
    assert all(expected[name] != found[name] for name in ("classification", "l1", "giou"))
    assert all(value.isfinite() for value in found.values())


def test_another_detector_starts_from_it_class_by_class(tmp_path: Path) -> None:
    source, model = eager(), eager(classes=["square", "moon", "circle"])
    torch.nn.init.normal_(source.auxiliary.class_logits.bias)
    source.save(tmp_path / "model.safetensors")
    before = model.auxiliary.class_logits.bias[1].clone()
    report = warm_start(model, tmp_path / "model.safetensors")
    theirs, ours = source.auxiliary.class_logits.bias, model.auxiliary.class_logits.bias
    assert torch.equal(ours, torch.stack([theirs[CLASSES.index("square")], before, theirs[CLASSES.index("circle")]]))
    assert report.parts["auxiliary"][0] > 0


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="width 64, but the head's is 32"):
        tiny_detector(auxiliary=lambda classes, _: DenseHead(classes, 64))
    detector = tiny_detector()
    with pytest.raises(ValueError, match="no auxiliary head"):
        detector.proposals(detector.encode(IMAGES))
    with pytest.raises(ValueError, match="but there is no auxiliary head that proposes boxes"):
        tiny_detector(proposal_share=0.5)
    with pytest.raises(ValueError, match="proposal_share is 2: it must"):
        tiny_detector(auxiliary=SMALL, proposal_share=2)
    with pytest.raises(ValueError, match="train an auxiliary head"):
        detector.predict(IMAGES, start_time=300)


def test_maps_of_an_image_are_those_that_the_pyramid_was_made_of() -> None:
    batches = [[torch.randn(n, 4, 8 // s, 12 // s) for s in (1, 2)] for n in (2, 1)]
    pyramid = FeaturePyramid.from_maps(batches, [4, 8], [2, 0, 1])
    for image, (batch, row) in enumerate([(1, 0), (0, 0), (0, 1)]):
        for ours, theirs in zip(pyramid.maps_of(image), batches[batch], strict=True):
            assert torch.equal(ours, theirs[row : row + 1])


def test_a_configuration_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny_config(tmp_path)
    content = yaml.safe_load(config.read_text())
    arguments = {"width": 32, "stages": 1, "dynamic_width": 8, "ffn_width": 32, "num_heads": 4}
    content["model"] = {
        "class_path": "DiffusionDet",
        "init_args": {
            "backbone": "test_resnet",
            "strides": [4, 8],
            "num_boxes": 6,
            "min_size": None,
            "noise_draws": 2,
            "head": {"class_path": "DynamicHead", "init_args": arguments},
            "auxiliary": {"class_path": "DenseHead", "init_args": {"layers": 1, "min_score": 0.0}},
            "sampler": {"start_time": 400},
        },
    }
    config.write_text(yaml.safe_dump(content))
    assert train(config, tmp_path / "run", "--trainer.max_steps", "2", "--evaluation.every", "null") == 0
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    assert "dense_giou" in header
    model = Detector.load(tmp_path / "run/model.safetensors")
    assert (model.auxiliary.width, len(model.classes), model.sampler.start_time) == (32, 2, 400)
    assert model.auxiliary.arguments["layers"] == 1
    assert json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]["AP"] >= 0
