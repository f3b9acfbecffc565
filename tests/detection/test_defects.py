"""The eleven defects of existing implementations (spec: detection), each as a test that fails where it is present."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from diffperception.cli.main import main
from diffperception.data import CocoDetection
from diffperception.detection import BoxSampler, DiffusionDet
from diffperception.detection.evaluator import CocoEvaluator
from diffperception.detection.inference import evaluate_detector
from diffperception.detection.matcher import match
from diffperception.detection.targets import PaddedTargets, image_sizes
from diffperception.diffusion import SampleNoise, sample_seed
from diffperception.training.module import NonFiniteLossError
from diffperception.training.options import OptimizerOptions
from diffperception.training.recipes.detection import DetectionModule
from tests.detection.scenes import CLASSES, random_boxes, random_image, random_target, set_losses, tiny_detector
from tests.training.tiny_data import write_tiny_config
from tests.training.tiny_detector import UnpluggedDiffusionDet

IMAGES = [random_image(64, 96, 1), random_image(70, 50, 2), random_image(96, 64, 3)]


def same(a: dict, b: dict) -> bool:
    return len(a["scores"]) == len(b["scores"]) and all(torch.allclose(a[k], b[k], atol=2e-2, rtol=1e-4) for k in a)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("renewal", [None, 0.0099])
@pytest.mark.parametrize("ensemble", [True, False])
def test_1_several_images_and_several_steps(steps, renewal, ensemble):
    detector = tiny_detector()
    sampler = BoxSampler(steps, num_boxes=12, renewal_threshold=renewal, ensemble=ensemble)
    together = detector.predict(IMAGES, seeds=[1, 2, 3], sampler=sampler)
    alone = [detector.predict([image], seeds=[i + 1], sampler=sampler)[0] for i, image in enumerate(IMAGES)]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_2_the_last_step_enters_the_ensemble(steps):
    sampler = BoxSampler(steps, num_boxes=6, nms_threshold=None, renewal_threshold=None)
    detector = tiny_detector()
    encoded = detector.encode(IMAGES[:1])
    sampled = detector.sample(encoded, [0], sampler)
    for step in sampled:
        step.output.boxes[:] = torch.tensor([10.0, 10.0, 20.0, 20.0])  # in the image: those outside would be left out
    (found,) = sampler.select(sampled, encoded.seen, encoded.sizes)
    expected = torch.cat([step.output.logits[0].sigmoid().flatten().topk(6).values for step in sampled])
    assert torch.equal(found["scores"], expected.sort(descending=True).values)


@pytest.mark.parametrize("count", [1, 3, 4, 63, 64, 255, 256, 1300])
def test_3_the_prior_is_in_the_class_bias_alone(count):
    detector = tiny_detector(classes=[str(i) for i in range(count)], width=64, dynamic_width=64, ffn_width=256)
    prior = -math.log(99)
    touched = {
        name
        for name, value in detector.named_parameters()
        if value.ndim == 1 and torch.isclose(value, torch.tensor(prior)).any()
    }
    assert touched == {f"head.stages.{i}.class_logits.bias" for i in range(2)}
    assert all(torch.equal(stage.box_deltas.bias, torch.zeros(4)) for stage in detector.head.stages)


def test_4_no_proposal_is_without_area():
    detector = tiny_detector(num_boxes=2000)
    steps, _ = detector.trajectory(IMAGES[0], 0, BoxSampler(4, 2000))
    sizes = [step["boxes"][:, 2:] - step["boxes"][:, :2] for step in steps]
    assert min(size.min() for size in sizes) >= 0.999
    padded = PaddedTargets.collate([random_target(3, 64, 96)], image_sizes(IMAGES[:1]))
    for t in (0, 300, 700, 999):
        boxes = detector._noisy_boxes(padded, torch.tensor([t]), None)
        assert (boxes[..., 2:] - boxes[..., :2]).min() >= 0.999
    # The noise itself would clamp this share to zero: the test sees what it guards against.
    z = SampleNoise([0])(torch.empty(1, 2000, 4))
    assert (z[..., 2:] <= -2).any(-1).float().mean() > 0.03


@pytest.mark.parametrize(("boxes", "objects"), [(1, 1), (3, 2), (4, 9), (500, 600)])
def test_5_few_proposals_and_many_objects(boxes, objects):
    detector = tiny_detector(num_boxes=boxes, stages=1).train()
    if objects > boxes:
        with pytest.warns(UserWarning, match=f"{objects} objects, more than num_boxes={boxes}"):
            losses = detector.loss(IMAGES[:1], [random_target(objects, 64, 96)])
    else:
        losses = detector.loss(IMAGES[:1], [random_target(objects, 64, 96)])
    assert all(torch.isfinite(value) for value in losses.values())


def test_5_what_is_noised_is_what_is_matched():
    detector = tiny_detector(num_boxes=4)
    padded = PaddedTargets.collate([random_target(9, 64, 96)], image_sizes(IMAGES[:1]))
    limited = padded.limit(4, torch.Generator().manual_seed(0))
    noised = detector._padded_objects(limited, None)
    assert torch.equal(noised[0], padded.boxes[limited.valid])


@pytest.mark.parametrize("mode", ["ddim", "fixed_time", "fresh_boxes"])
def test_6_several_steps_without_renewal(mode):
    sampler = BoxSampler(4, num_boxes=10, renewal_threshold=None, mode=mode)
    assert len(tiny_detector().predict(IMAGES, sampler=sampler)) == 3


def test_7_what_is_saved_and_scored_is_the_average_of_the_weights(tmp_path):
    config, run = write_tiny_config(tmp_path), tmp_path / "run"
    options = ["--model", "tests.training.tiny_detector.UnpluggedDiffusionDet", "--trainer.max_steps", "3"]
    assert main(["train", "--config", str(config), "--output", str(run), *options]) == 0

    parts = torch.load(run / "last.ckpt", weights_only=True)
    dataset = CocoDetection(tmp_path / "data" / "annotations.json", tmp_path / "data" / "images")
    detectors = []  # with what is saved, with the average, and with what the optimiser works on
    for state in (load_file(run / "model.safetensors"), parts["state_dict"], parts["current_model_state"]):
        detectors.append(UnpluggedDiffusionDet(dataset.classes).eval())
        detectors[-1].load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    saved, average, raw = (detector.predict(IMAGES[:1])[0] for detector in detectors)
    assert all(torch.equal(saved[key], average[key]) for key in saved)
    assert not torch.equal(saved["scores"], raw["scores"])
    assert evaluate_detector(detectors[0], dataset).detections == json.loads((run / "detections.json").read_text())


POISONED = [
    (layer, value, matcher)
    for layer in ("class_logits", "box_deltas")
    for value in (math.nan, math.inf, -math.inf)
    for matcher in ("dynamic_k", "hungarian")
]


def poisoned(layer: str, value: float, stage: int = 0, **options) -> DiffusionDet:
    detector = tiny_detector(**options)
    with torch.no_grad():
        getattr(detector.head.stages[stage], layer).bias[0] = value
    return detector


@pytest.mark.parametrize(("layer", "value", "matcher"), POISONED)
def test_8_a_loss_that_is_not_finite_names_the_batch(layer, value, matcher):
    targets = [random_target(2, 64, 50, seed) | {"image_id": 70 + seed} for seed in range(3)]
    task = DetectionModule(poisoned(layer, value, matcher=matcher).train(), OptimizerOptions(), seed=0)
    with pytest.raises(NonFiniteLossError, match=r"step 1 .* images with ids 70, 71, 72 "):
        task.training_step((IMAGES, targets), 0)


def test_8_a_single_box_that_is_not_finite_shows_in_the_loss():
    padded = PaddedTargets.collate([random_target(2, 64, 96)], image_sizes(IMAGES[:1]))
    boxes = random_boxes(5, 96, 64)[None, None].clone()
    matches = torch.tensor([[[0, 1, -1, -1, -1]]])
    assert set_losses(torch.zeros(1, 1, 5, 3), boxes, padded, matches)["l1"].isfinite()
    boxes[..., 4, 2] = torch.nan  # nobody's match
    assert not set_losses(torch.zeros(1, 1, 5, 3), boxes, padded, matches)["l1"].isfinite()


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("layer", ["class_logits", "box_deltas"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_8_weights_that_are_not_finite_do_not_predict(layer, value, stage):
    detector = poisoned(layer, value, stage)
    if (layer, stage) == ("class_logits", 0):
        assert len(detector.predict(IMAGES)) == 3  # prediction does not classify before the last stage
        return
    for steps in (1, 2):
        with pytest.raises(ValueError, match="not finite"):
            detector.predict(IMAGES, steps=steps)


def test_8_geometry_is_float32_under_autocast():
    """In bfloat16 a coordinate beyond 1024 is a multiple of 8 pixels."""
    detector = tiny_detector()
    for stage in detector.head.stages:
        torch.nn.init.zeros_(stage.box_deltas.weight)
    low = 1000.3 + torch.rand(1, 9, 2, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([low, low + 40.7], -1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        refined = detector(IMAGES[:1], boxes, torch.tensor([500])).boxes
    torch.testing.assert_close(refined, boxes.expand_as(refined), atol=1e-3, rtol=0)


def test_8_costs_are_float32_under_autocast():
    padded = PaddedTargets.collate([random_target(9, 64, 96)], image_sizes(IMAGES[:1]))
    generator = torch.Generator().manual_seed(0)
    # Near enough to one another that bfloat16 cannot tell which proposal is the cheaper.
    logits = (0.01 * torch.randn(1, 300, 3, generator=generator)).bfloat16()
    boxes = random_boxes(1, 96, 64) + 0.01 * torch.rand(1, 300, 4, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        matches = match(logits, boxes, padded)
    assert torch.equal(matches, match(logits.float(), boxes, padded))


def test_9_the_noise_of_an_image_depends_on_seed_and_id_alone():
    assert sample_seed(0, 7) == sample_seed(0, 7)
    assert len({sample_seed(seed, image) for seed in range(20) for image in range(-20, 20)}) == 800
    detector = tiny_detector()
    seeds = [sample_seed(0, i) for i in (5, 6, 7)]
    backwards = detector.predict(IMAGES[::-1], seeds=seeds[::-1])[::-1]
    assert all(same(a, b) for a, b in zip(detector.predict(IMAGES, seeds=seeds), backwards, strict=True))


def coco_file(folder, boxes):
    rows = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]]}
        for i, box in enumerate(boxes.tolist())
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 400, "height": 400}],
        "categories": [{"id": 1, "name": CLASSES[0]}],
        "annotations": [row | {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for row in rows],
    }
    path = folder / "a.json"
    path.write_text(json.dumps(content))
    return path


def detections(boxes):
    return {"boxes": boxes, "scores": torch.ones(len(boxes)), "labels": torch.zeros(len(boxes), dtype=torch.int64)}


@pytest.mark.parametrize(
    ("objects", "image_id", "predicted", "reason"),
    [
        (5, 1, 0, "no box was predicted in any of the 1 images"),
        (0, 1, 5, "has no object to find"),
        (5, 8, 5, "none of the predicted image ids is in a.json (8 is predicted, 1 is in the file)"),
    ],
)
def test_10_ap_of_zero_has_a_reason(tmp_path, objects, image_id, predicted, reason):
    boxes = random_boxes(5, 400, 400)
    evaluator = CocoEvaluator(coco_file(tmp_path, boxes[:objects]))
    evaluator.update([image_id], [detections(boxes[:predicted])])
    result = evaluator.compute()
    assert not result.metrics["AP"] > 0
    assert reason in result.explanation


def test_10_ground_truth_fed_as_predictions_scores_1(tmp_path):
    boxes = random_boxes(5, 400, 400)
    evaluator = CocoEvaluator(coco_file(tmp_path, boxes))
    evaluator.update([1], [detections(boxes)])
    result = evaluator.compute()
    assert result.metrics["AP"] == 1
    assert result.explanation is None


@pytest.mark.parametrize(("max_dets", "recall"), [(100, 100 / 150), (150, 1.0)])
def test_11_detections_beyond_the_hundredth_count_if_asked(tmp_path, max_dets, recall):
    # 150 objects side by side, none near another
    x = torch.arange(150)
    corners = torch.stack([(x % 15) * 26, (x // 15) * 26], 1).float()
    boxes = torch.cat([corners, corners + 20], 1)
    evaluator = CocoEvaluator(coco_file(tmp_path, boxes), max_dets=max_dets)
    evaluator.update([1], [detections(boxes)])
    assert evaluator.compute().metrics[f"AR{max_dets}"] == pytest.approx(recall, abs=0.01)
