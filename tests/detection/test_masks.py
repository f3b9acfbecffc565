"""Instance masks: the dynamic mask head, what it learns from, and what becomes of its masks."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.utils import save_image

from diffperception.data import CocoDetection
from diffperception.data.outlines import encode_masks
from diffperception.detection import (
    BoxSampler,
    Detector,
    DiffusionDet,
    DynamicHead,
    DynamicMaskHead,
    MaskLoss,
    MaskRCNN,
    SetCriterion,
)
from diffperception.detection.criterion import Matches
from diffperception.detection.evaluator import CocoEvaluator
from diffperception.detection.heads.masks import (
    MaskOutput,
    best_pairs,
    coordinates,
    dynamic_layers,
    enlarge,
    look_up,
    paste,
    split_layers,
)
from diffperception.detection.inference import detect_folder, evaluate_detector
from diffperception.detection.targets import PaddedTargets
from diffperception.models.warm_start import warm_start
from diffperception.training.recipes.detection import DataOptions, DetectionRecipe
from tests.detection.scenes import CLASSES, assert_same_detections, random_boxes, random_image, random_target

IMAGES = [random_image(64, 96, 1), random_image(70, 50, 2)]
BOXES = partial(DynamicHead, width=32, dynamic_width=8, ffn_width=32, num_heads=4, stages=2)
MASKS = partial(DynamicMaskHead, boxes=BOXES, mask_size=6, mask_channels=4, mask_width=4)


def detector_of(head=MASKS, **options) -> DiffusionDet:
    torch.manual_seed(0)
    sizes = {"strides": (4, 8, 16), "num_boxes": 12, "min_size": None}
    return DiffusionDet(CLASSES, "test_resnet", head, **sizes | options).eval()


def with_masks(target: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
    """The target with masks that fill the boxes."""
    x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    x1, y1, x2, y2 = target["boxes"].T[..., None, None]
    return target | {"masks": ((x > x1) & (x < x2) & (y > y1) & (y < y2)).byte()}


def targets_of(*counts: int) -> list[dict[str, Tensor]]:
    sizes = [image.shape[1:] for image in IMAGES]
    return [with_masks(random_target(n, *size, seed=n), *size) for n, size in zip(counts, sizes, strict=True)]


def loss_of(detector: DiffusionDet, targets: list[dict], **options) -> dict[str, Tensor]:
    return detector.loss(IMAGES, targets, torch.Generator().manual_seed(0), **options)


def test_dynamic_layers_are_those_of_a_loop():
    widths = [3, 4, 4, 1]
    generated, x = torch.randn(5, (3 + 1) * 4 + (4 + 1) * 4 + 4 + 1), torch.randn(5, 7, 3)
    found = dynamic_layers(x, generated, widths)
    for row, points, result in zip(generated, x, found, strict=True):
        for point, value in zip(points, result, strict=True):
            rest, seen = row, point
            for number, (a, b) in enumerate([(3, 4), (4, 4), (4, 1)]):
                weight, bias, rest = rest[: a * b].view(a, b), rest[a * b : a * b + b], rest[a * b + b :]
                seen = torch.stack([(seen.relu() if number else seen) @ weight[:, k] + bias[k] for k in range(b)])
            torch.testing.assert_close(value, seen)


def test_every_proposal_begins_with_much_the_same_network_of_unit_gain():
    head = MASKS(3)
    (first, bias), *_ = split_layers(head.generate.bias[None], [4 + 2, 4, 4, 1])
    assert bias.abs().max() == 0
    assert 0.1 < first.std() * (6 / 2) ** 0.5 < 3
    generated = head.generate(torch.nn.functional.normalize(torch.randn(9, 32)) * 32**0.5)
    assert generated.std(0).mean() < 0.3 * first.std()


def test_masks_are_looked_up_as_a_fine_roi_align_does():
    masks = torch.zeros(2, 3, 40, 50, dtype=torch.uint8)
    masks[0, 2, 5:30, 8:40] = 1
    masks[1, 0] = (torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) > 0.5).byte()
    objects = torch.tensor([[2], [0]])
    boxes = torch.tensor([[[10.0, 6, 37, 36]], [[4.0, 4, 16, 16]]])
    found = look_up(masks, objects, boxes, 14)
    exact = roi_align(masks[0, 2][None, None].float(), [boxes[0]], 14, 1.0, 32, aligned=True)[0]
    assert (found[0] - exact).abs().mean() < 0.02
    assert torch.equal(look_up(masks, objects, boxes, 12)[1, 0], masks[1, 0, 4:16, 4:16].float())
    beyond = torch.tensor([[[-20.0, -20, -4, -4]], [[60.0, 50, 80, 70]]])
    assert look_up(masks, objects, beyond, 4).sum() == 0


@pytest.mark.parametrize("box", [[10.0, 6.0, 38.0, 34.0], [-6.0, 20.0, 22.0, 48.0], [3.3, 4.1, 33.7, 28.9]])
def test_what_is_looked_up_is_pasted_back(box: list[float]):
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
    inside = (rows - 20.0) ** 2 + (columns - 18.0) ** 2 < 10**2
    boxes = torch.tensor([box])
    seen = look_up(inside[None, None].byte(), torch.zeros(1, 1, dtype=torch.long), enlarge(boxes)[None], 28)[0]
    (pasted,) = paste(seen - 0.5, boxes, 40, 50)
    x1, y1, x2, y2 = enlarge(boxes)[0].tolist()
    visible = inside & (columns + 0.5 > x1) & (columns + 0.5 < x2) & (rows + 0.5 > y1) & (rows + 0.5 < y2)
    assert (pasted & visible).sum() > 0.97 * (pasted | visible).sum() > 0


def test_pasting_interpolates_between_the_centres_of_cells():
    logits = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(0))
    side = 20 / 1.25
    boxes = torch.tensor([[15 - side / 2, 15 - side / 2, 15 + side / 2, 15 + side / 2]])  # whose grid is 5..25
    (found,) = paste(logits, boxes, 30, 30)
    fine = torch.nn.functional.interpolate(logits[None], (20, 20), mode="bilinear", align_corners=False)[0, 0] > 0
    assert torch.equal(found[5:25, 5:25], fine)
    assert found.sum() == fine.sum()
    assert paste(torch.zeros(0, 5, 5), torch.zeros(0, 4), 30, 20).shape == (0, 30, 20)


def test_masks_are_pasted_in_portions(monkeypatch):
    logits, boxes = torch.randn(7, 5, 5), random_boxes(7, 30, 20)
    whole = paste(logits, boxes, 20, 30)
    monkeypatch.setattr("diffperception.detection.heads.masks.PASTED_AT_ONCE", 1300)
    assert torch.equal(paste(logits, boxes, 20, 30), whole)


def test_the_best_pairs_have_every_object_before_any_twice():
    objects = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    targets = PaddedTargets.collate([{"boxes": objects, "labels": torch.tensor([0, 1])}], torch.tensor([[50.0] * 4]))
    boxes = torch.stack([objects[0] + shift for shift in (2, 0, 1)] + [objects[1] + 9, objects[1]])[None]
    index = torch.tensor([[0, 0, 0, 1, -1]])
    proposals, owners = best_pairs(index, boxes, targets, 3)
    assert (proposals.tolist(), owners.tolist()) == ([[1, 3, 2]], [[0, 1, 0]])
    assert best_pairs(index, boxes, targets, 9)[1].tolist() == [[0, 1, 0, 0, -1]]


def test_an_untrained_mask_head_leaves_boxes_as_they_were():
    sampler, targets = BoxSampler(2, renewal_threshold=0.0099), targets_of(3, 4)
    plain, masked = detector_of(BOXES), detector_of(MASKS)
    found, expected = masked.predict(IMAGES, [1, 2], sampler), plain.predict(IMAGES, [1, 2], sampler)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in b)
    assert [one.keys() - expected[0].keys() for one in found] == [{"masks"}] * 2
    losses, others = loss_of(masked, targets), loss_of(plain, targets)
    assert losses.keys() - others.keys() == {"mask"}
    assert all(torch.equal(losses[name], others[name]) for name in others)


def test_only_matched_proposals_teach_masks():
    torch.manual_seed(0)
    detector = detector_of()
    output = detector(IMAGES, torch.stack([random_boxes(12, 50, 60, seed) for seed in (1, 2)]), torch.tensor([5, 500]))
    targets = PaddedTargets.collate(targets_of(3, 0), torch.tensor([[96.0, 64, 96, 64], [50, 70, 50, 70]]))
    index = torch.full((2, 2, 12), -1)
    index[1, 0, 4], index[0, 0, 7] = 2, 1
    output.boxes.data[1, 0, 4] = targets.boxes[0, 2]
    output.features.retain_grad()
    value = MaskLoss()(output, targets, Matches(index))
    assert value.shape == (2,)
    assert value[0] == 0 < value[1]  # at the last stage alone
    value.sum().backward(retain_graph=True)
    touched = output.features.grad.abs().sum(3)
    assert touched[1, 0, 4] > 0
    assert touched.sum() == touched[1, 0, 4]
    none = MaskLoss()(output, targets, Matches(torch.full_like(index, -1)))
    assert none.tolist() == [0, 0]
    detector.zero_grad()
    none.sum().backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in detector.parameters())


def test_a_perfect_mask_costs_nothing_and_an_empty_one_is_not_learned():
    given = targets_of(2, 3)
    for target in given:
        target["boxes"] = target["boxes"].round()
    given = [with_masks(target, *image.shape[1:]) for target, image in zip(given, IMAGES, strict=True)]
    targets = PaddedTargets.collate(given, torch.tensor([[96.0, 64, 96, 64], [50, 70, 50, 70]]))
    index = torch.full((2, 2, 3), -1)
    index[1, 0, :2], index[1, 1] = torch.arange(2), torch.arange(3)

    def loss(sign: float) -> float:
        """Of masks that are right, or just wrong, on grids whose cells begin and end where objects do."""

        def told(proposals: Tensor, boxes: Tensor) -> Tensor:
            objects = index[1].gather(1, proposals).clamp(min=0)
            return sign * (look_up(targets.more["masks"], objects, enlarge(boxes), 10) - 0.5)

        boxes = targets.boxes.expand(2, -1, -1, -1)
        output = MaskOutput(torch.zeros(2, 2, 3, 3), boxes, torch.zeros(2, 2, 3, 4), told)
        return MaskLoss()(output, targets, Matches(index))[1].item()

    assert loss(100) == pytest.approx(0, abs=1e-3)
    assert loss(-100) > 5
    targets.more["masks"][1, 2] = 0  # it shows nothing, so what is said of it is all the same
    assert loss(100) == pytest.approx(0, abs=1e-3)
    one_less = loss(-100)
    index[1, 1, 2] = -1
    assert loss(-100) == one_less


def test_images_without_objects_crowds_and_precision_do_no_harm():
    detector, targets = detector_of(noise_draws=2).train(), targets_of(3, 0)
    targets[0]["iscrowd"] = torch.tensor([0, 1, 0])
    targets[0]["masks"][2] = 0
    losses = loss_of(detector, targets)
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())
    assert detector.head.generate.weight.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss_of(detector, targets)["mask"], losses["mask"], atol=0.1, rtol=0.1)
    assert loss_of(detector, targets_of(0, 0))["mask"] == 0


def test_batches_steps_and_warm_starts_give_the_masks_of_single_images():
    detector = detector_of(min_size=56)
    sampler = BoxSampler(3, renewal_threshold=0.0099, start_time=700)
    start = [random_boxes(4, 50, 60, seed) for seed in (3, 4)]
    found = detector.predict(IMAGES, [1, 2], sampler, start=start)
    alone = [detector.predict([i], [s], sampler, start=[b])[0] for i, s, b in zip(IMAGES, [1, 2], start, strict=True)]
    assert_same_detections(found, alone)
    for one, other, image in zip(found, alone, IMAGES, strict=True):
        assert one["masks"].shape == (len(one["boxes"]), *image.shape[1:])
        assert one["masks"].dtype == torch.bool
        assert (one["masks"] != other["masks"]).float().mean() < 1e-3
        assert one["masks"].any()


def test_an_image_without_detections_has_no_masks():
    detector = detector_of()
    detector.head.boxes.stages[-1].box_deltas.bias.data[:2] = 1e4  # all boxes lie beyond the image
    found = detector.predict(IMAGES)
    assert [one["masks"].shape for one in found] == [(0, 64, 96), (0, 70, 50)]


def test_a_saved_one_predicts_the_same_masks(tmp_path: Path):
    detector = detector_of()
    detector.save(tmp_path / "model.safetensors")
    loaded = Detector.load(tmp_path / "model.safetensors")
    assert loaded.gives_masks
    assert all(torch.equal(loaded.predict(IMAGES)[i]["masks"], detector.predict(IMAGES)[i]["masks"]) for i in (0, 1))


def test_a_detector_of_boxes_keeps_all_its_weights_with_a_mask_head(tmp_path: Path):
    plain = detector_of(BOXES)
    for parameter in plain.parameters():
        parameter.data += 0.01
    plain.save(tmp_path / "boxes.safetensors")
    masked = detector_of(MASKS)
    report = warm_start(masked, tmp_path / "boxes.safetensors")
    assert not report.unused
    assert {name.split(".")[1] for name in report.anew} == {"reduce", "convolutions", "generate"}
    found, expected = masked.predict(IMAGES, [1, 2]), plain.predict(IMAGES, [1, 2])
    assert all(torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in b)
    masked.save(tmp_path / "masks.safetensors")
    assert not warm_start(detector_of(MASKS), tmp_path / "masks.safetensors").anew


def test_masks_can_be_learned():
    head = partial(MASKS, mask_size=14, mask_channels=8, mask_width=8)
    detector, targets = detector_of(head).train(), targets_of(2, 2)
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    first = None
    for _ in range(12):
        loss = loss_of(detector, targets)["mask"]
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * first


def masked_data(folder: Path) -> CocoDetection:
    """Two images: a polygon, uncompressed run lengths and a crowd; and none."""
    for name, image in zip("ab", IMAGES, strict=True):
        save_image(image, folder / f"{name}.png")
    disc = torch.zeros(64, 96, dtype=torch.bool)
    disc[30:50, 50:80] = torch.rand(20, 30) > 0.2
    crowd = torch.zeros(64, 96, dtype=torch.bool)
    crowd[:10] = True
    outlines = [
        ([10, 20, 30, 25], [[10, 20, 40, 20, 40, 45, 10, 45]], 0),
        ([50, 30, 30, 20], encode_masks(disc[None])[0], 0),
        ([0, 0, 96, 10], encode_masks(crowd[None])[0], 1),
    ]
    sizes = [{"height": image.shape[1], "width": image.shape[2]} for image in IMAGES]
    objects = [
        {"bbox": box, "segmentation": outline, "iscrowd": is_crowd, "area": box[2] * box[3]}
        for box, outline, is_crowd in outlines
    ]
    content = {
        "images": [{"id": k, "file_name": f"{'xab'[k]}.png", **size} for k, size in enumerate(sizes, 1)],
        "categories": [{"id": 10 * k, "name": name} for k, name in enumerate(CLASSES, 1)],
        "annotations": [{"id": k, "image_id": 1, "category_id": 10 * k, **each} for k, each in enumerate(objects, 1)],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return CocoDetection(folder / "a.json", folder, masks=True)


def test_the_ground_truth_as_results_scores_one(tmp_path: Path):
    dataset = masked_data(tmp_path)
    evaluator = CocoEvaluator(dataset.table, ("bbox", "segm"))
    for index in range(len(dataset)):
        target = dataset[index][1]
        objects = target["iscrowd"] == 0
        found = {name: target[name][objects] for name in ("boxes", "labels", "masks")}
        evaluator.update([target["image_id"]], [found | {"scores": torch.ones(int(objects.sum()))}])
    metrics = evaluator.compute().metrics
    assert (metrics["AP"], metrics["mask_AP"], metrics["mask_AR100"]) == (1, 1, 1)


def test_masks_come_through_training_evaluation_and_files(tmp_path: Path):
    dataset = masked_data(tmp_path)
    detector = detector_of()
    images, targets = zip(*(dataset[i] for i in range(2)), strict=True)
    assert torch.isfinite(detector.loss(list(images), list(targets))["mask"])
    result = evaluate_detector(detector, dataset)
    assert {"AP", "mask_AP"} < result.metrics.keys()
    detect_folder(detector, tmp_path, tmp_path / "out", workers=0, annotations=tmp_path / "a.json")
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [row["segmentation"] for row in rows] == [row["segmentation"] for row in result.detections]
    found = detector.predict([dataset[0][0]], [0])[0]["masks"].numpy()
    decoded = np.stack([coco_mask.decode(code) for code in encode_masks(torch.from_numpy(found))])
    assert np.array_equal(decoded.astype(bool), found)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: detector_of(criterion=SetCriterion()),
            "criterion has no MaskLoss, without which",
        ),
        (lambda: loss_of(detector_of(), [random_target(1, 64, 96), random_target(1, 70, 50)]), "set data.masks: true"),
        (
            lambda: loss_of(detector_of(BOXES, criterion=SetCriterion(terms={"m": MaskLoss()})), targets_of(1, 1)),
            "masks of a DynamicMaskHead, but the head gave HeadOutput",
        ),
        (lambda: MASKS(3, mask_size=0), "mask_size, mask_channels and mask_width must be at least 1"),
    ],
)
def test_what_cannot_be_learned_is_one_sentence(call, words: str):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "build", [lambda _: detector_of(), partial(MaskRCNN, backbone="test_resnet", width=16, head_width=16)]
)
def test_training_without_masks_is_refused_before_it_begins(build, tmp_path: Path):
    masked_data(tmp_path)
    recipe = DetectionRecipe(build, DataOptions(*[tmp_path / "a.json", tmp_path] * 2))
    with pytest.raises(ValueError, match=r"learns from masks, which are not read: set data\.masks: true"):
        recipe.prepare(0)


def test_coordinates_are_centres_of_cells_row_by_row():
    assert coordinates(2).tolist() == [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]
