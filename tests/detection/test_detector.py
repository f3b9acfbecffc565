import re
import warnings
from functools import partial

import pytest
import torch

from diffperception.detection import FCOS, BoxSampler, Detector, DiffusionDet, DynamicHead
from diffperception.detection.heads.boxes import HeadOutput
from diffperception.detection.sampler import Step
from diffperception.detection.targets import PaddedTargets, image_sizes
from tests.detection.scenes import CLASSES, assert_same_detections, random_image, random_target, tiny_detector

IMAGES = [random_image(64, 96, 1), random_image(70, 50, 2), random_image(64, 96, 3)]
TARGETS = [random_target(n, *image.shape[1:], seed=n) for n, image in zip([3, 0, 5], IMAGES, strict=True)]


def test_forward_gives_every_stage():
    detector = tiny_detector()
    boxes = torch.stack([random_target(7, 50, 50, seed)["boxes"] for seed in range(3)])
    output = detector(IMAGES, boxes, torch.tensor([0, 500, 999]))
    assert output.logits.shape == (2, 3, 7, 3)
    assert output.boxes.shape == (2, 3, 7, 4)


def test_noise_depends_on_the_seed_alone():
    detector = tiny_detector()
    first, again, other = (detector.predict(IMAGES[:1], seeds=[seed])[0] for seed in (1, 1, 2))
    assert torch.equal(first["boxes"], again["boxes"])
    assert not torch.equal(first["boxes"][:3], other["boxes"][:3])


def test_no_images_have_no_detections():
    assert tiny_detector().predict([]) == []
    assert FCOS(CLASSES, "test_resnet", width=64, min_size=None).eval().predict([]) == []


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"mode": "walk"}, "no mode 'walk': it is one of ddim, fixed_time, fresh_boxes"),
        ({"eta": -3.0}, "eta is -3.0"),
        ({"nms_threshold": 7.0}, "nms_threshold is 7.0"),
        ({"renewal_threshold": 9.0}, "renewal_threshold is 9.0"),
        ({"box_voting": 1.0}, "box_voting is 1.0: it must be from 0 to below 1"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_named(setting, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        BoxSampler(**setting)


def test_boxes_vote_by_score_with_those_of_their_class_that_overlap_them():
    # Of one object three boxes, an IoU of 0.8 and more apart; another class at the same place; and one far away.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [0, 0, 10, 10], [30, 30, 40, 40]])
    logits = torch.full((5, 2), -30.0)
    for row, (label, score) in enumerate([(0, 0.8), (0, 0.6), (0, 0.2), (1, 0.7), (0, 0.5)]):
        logits[row, label] = torch.tensor(score).logit()
    steps = [Step(0, boxes[None], HeadOutput(logits[None], boxes[None]))]
    sizes = torch.tensor([[60.0, 60, 60, 60]])
    plain, voted = (
        BoxSampler(1, 5, box_voting=threshold).select(steps, sizes, 2 * sizes)[0] for threshold in (None, 0.79)
    )
    assert plain["scores"][:3].tolist() == pytest.approx([0.8, 0.7, 0.5])
    assert torch.equal(plain["scores"], voted["scores"])
    assert torch.equal(plain["boxes"][1:], voted["boxes"][1:])  # each is alone with its class
    mean = 2 * (0.8 * 10 + 0.6 * 9 + 0.2 * 8) / 1.6
    torch.testing.assert_close(voted["boxes"][0], torch.tensor([0.0, 0, 20, mean]))
    far = BoxSampler(1, 5, box_voting=0.95).select(steps, sizes, 2 * sizes)[0]
    assert torch.equal(far["boxes"], plain["boxes"])


def test_votes_are_those_of_the_image_alone_and_pixels_stay_float32_under_autocast():
    detector = tiny_detector()
    sampler = BoxSampler(2, 20, box_voting=0.5)
    together = detector.predict(IMAGES, seeds=[1, 2, 3], sampler=sampler)
    alone = [detector.predict([image], [seed], sampler)[0] for seed, image in enumerate(IMAGES, 1)]
    assert_same_detections(together, alone)
    steps = detector.sample(detector.encode(IMAGES[:1]), [1], sampler)
    size = image_sizes(IMAGES[:1])
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = sampler.select(steps, size, size)
    (expected,) = sampler.select(steps, size, size)
    assert torch.equal(found["boxes"], expected["boxes"])


def test_a_cpu_predicts_in_portions():
    detector = tiny_detector()
    images = [random_image(320, 384, seed) for seed in range(4)]  # three of them fit CPU_IMAGE_PIXELS
    sampler = BoxSampler(steps=1, num_boxes=150)  # twice so many boxes fit CPU_BOXES
    sizes = []
    for module in (detector.backbone, detector.head):
        module.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[-1])))
    together = detector.predict(images, seeds=range(4), sampler=sampler)
    assert sizes == [3, 1, 2, 2]
    alone = [detector.predict([image], seeds=[seed], sampler=sampler)[0] for seed, image in enumerate(images)]
    assert_same_detections(together, alone)


def test_images_are_encoded_once_for_several_predictions():
    detector = tiny_detector(min_size=64)
    encoded = detector.encode(IMAGES)
    for sampler in (BoxSampler(), BoxSampler(3, 15), BoxSampler(2, mode="fresh_boxes", ensemble=False)):
        anew = detector.predict(IMAGES, seeds=[5, 6, 7], sampler=sampler)
        reused = detector.predict(IMAGES, seeds=[5, 6, 7], sampler=sampler, encoded=encoded)
        for one, other in zip(anew, reused, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_predictions_are_in_pixels_of_the_given_image():
    detector = tiny_detector(min_size=32, max_size=40)
    image = random_image(64, 96)
    assert detector.resize(image).shape == (3, 27, 40)
    small = DiffusionDet.predict(tiny_detector(), [detector.resize(image)])[0]
    scaled = small["boxes"] * torch.tensor([96 / 40, 64 / 27] * 2)
    torch.testing.assert_close(detector.predict([image])[0]["boxes"], scaled)
    assert (scaled <= torch.tensor([96.0, 64, 96, 64]) + 1e-3).all()


def test_training_noise_starts_at_the_objects_and_ends_far_from_them():
    detector = tiny_detector(num_boxes=20)
    padded = PaddedTargets.collate(TARGETS, image_sizes(IMAGES))
    clean = detector._noisy_boxes(padded, torch.zeros(3, dtype=torch.int64), torch.Generator().manual_seed(0))
    torch.testing.assert_close(clean[2, :5], TARGETS[2]["boxes"], atol=3.0, rtol=0)
    assert (clean[1, 0] - torch.tensor([0.0, 0.0, 50.0, 70.0])).abs().max() < 3  # no object: the whole image
    noisy = detector._noisy_boxes(padded, torch.full((3,), 999), torch.Generator().manual_seed(0))
    assert (noisy[2, :5] - TARGETS[2]["boxes"]).abs().mean() > 10


def test_loss_is_a_function_of_the_generator():
    detector = tiny_detector().train()
    values = [detector.loss(IMAGES, TARGETS, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert set(values[0]) == {"classification", "l1", "giou"}
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert values[0]["l1"] != values[2]["l1"]


def drawn_by_hand(detector: DiffusionDet, draws: int) -> dict[str, torch.Tensor]:
    """The loss of images that are each there so many times, from the public parts and the draws in their order."""
    images, targets, generator = IMAGES * draws, TARGETS * draws, torch.Generator().manual_seed(8)
    padded = PaddedTargets.collate(targets, image_sizes(images))
    t = torch.randint(1000, (len(images),), generator=generator)
    output = detector(images, detector._noisy_boxes(padded, t, generator), t)
    return detector.criterion(output, padded, detector.class_frequencies, generator)


@pytest.mark.parametrize("draws", [1, 3])
def test_several_noise_draws_are_the_loss_of_copies_of_the_images_which_the_backbone_sees_once(draws):
    detector, seen = tiny_detector(noise_draws=draws), []
    expected = drawn_by_hand(detector, draws)
    detector.backbone.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    found = detector.loss(IMAGES, TARGETS, torch.Generator().manual_seed(8))
    assert seen == [3]
    for name, value in found.items():
        if draws == 1:
            assert torch.equal(value, expected[name])
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


def test_noise_draws_are_one_unless_asked_for_and_at_least_one():
    assert tiny_detector().noise_draws == 1
    with pytest.raises(ValueError, match="noise_draws is 0"):
        tiny_detector(noise_draws=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"signal_scale": 0.0}, "must be above 0, not"),
        ({"num_boxes": 0}, "must be above 0, not 0"),
        ({"strides": (8, 4)}, r"strides \[8, 4\] are no pyramid's"),
        ({"strides": (4, 16)}, r"strides \[4, 16\] are no pyramid's"),
        ({"strides": ()}, r"strides \[\] are no pyramid's"),
        ({"head": partial(DynamicHead, stages=0)}, "stages is 0"),
        ({"head": partial(DynamicHead, width=30)}, "width is 30, but it must be a multiple of num_heads, which is 8"),
    ],
)
def test_what_no_detector_can_have_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        DiffusionDet(["a"], **{"backbone": "regnetx_002", "strides": (4, 8)} | changes)


def test_more_objects_than_boxes_train_with_one_warning():
    detector = tiny_detector(num_boxes=4).train()
    crowd = [random_target(6, 64, 96)]
    with pytest.warns(UserWarning, match="6 objects, more than num_boxes=4"):
        detector.loss(IMAGES[:1], crowd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.loss(IMAGES[:1], crowd)


def test_every_parameter_learns():
    detector = tiny_detector().train()
    sum(detector.loss(IMAGES, TARGETS).values()).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []


def test_one_image_can_be_learned():
    detector = tiny_detector(1, matcher="hungarian").train()
    optimizer = torch.optim.AdamW(detector.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        loss = sum(detector.loss(IMAGES[:1] * 2, TARGETS[:1] * 2, generator).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_bfloat16_leaves_boxes_in_float32():
    detector = tiny_detector().train()
    with torch.autocast("cpu", torch.bfloat16):
        boxes = detector(IMAGES, torch.stack([TARGETS[0]["boxes"]] * 3), torch.zeros(3)).boxes
        losses = detector.loss(IMAGES, TARGETS)
    assert boxes.dtype == torch.float32
    assert all(torch.isfinite(value) and value.dtype == torch.float32 for value in losses.values())


@pytest.mark.parametrize("build", [tiny_detector, lambda: FCOS(CLASSES, "test_resnet", width=64, min_size=None)])
def test_a_saved_detector_predicts_the_same(build, tmp_path):
    detector = build().eval()
    detector.save(tmp_path / "model.safetensors")
    loaded = Detector.load(tmp_path / "model.safetensors")
    assert type(loaded) is type(detector)
    assert loaded.classes == CLASSES
    strides = [[parameter.stride() for parameter in model.parameters()] for model in (loaded, detector)]
    assert strides[0] == strides[1]
    expected = detector.predict(IMAGES)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(loaded.predict(IMAGES), expected, strict=True) for k in b)
    assert_same_detections(Detector.load(tmp_path / "model.safetensors", dtype=torch.float64).predict(IMAGES), expected)


def test_weights_in_bfloat16_predict(tmp_path):
    tiny_detector().save(tmp_path / "model.safetensors")
    (found,) = Detector.load(tmp_path / "model.safetensors", dtype=torch.bfloat16).predict(IMAGES[:1])
    assert len(found["boxes"])
    assert found["boxes"].dtype == torch.float32


def test_fcos_learns_and_predicts_batches_as_single_images():
    torch.manual_seed(0)
    detector = FCOS(CLASSES, "test_resnet", width=64, min_size=48).train()
    losses = detector.loss(IMAGES, TARGETS)
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    detector.eval()
    assert_same_detections(detector.predict(IMAGES), [detector.predict([image])[0] for image in IMAGES])


@pytest.mark.parametrize("training", [True, False])
def test_fcos_predicts_at_the_size_it_was_trained_at(training):
    detector = FCOS(CLASSES, "test_resnet", width=64, min_size=None).train(training)
    seen = detector.model.transform(IMAGES)[0]
    assert seen.image_sizes == [tuple(image.shape[1:]) for image in IMAGES]  # torchvision's own would resize to 800


def test_fcos_names_the_widths_it_can_take():
    with pytest.raises(ValueError, match="width of 64 or more"):
        FCOS(CLASSES, "test_resnet", width=48)


def test_unknown_backbone_and_strides_are_named():
    with pytest.raises(ValueError, match=r"no model 'resnet51'.*resnet50"):
        tiny_detector(backbone="resnet51")
    with pytest.raises(ValueError, match=r"not at \[3\]"):
        tiny_detector(strides=(3, 8))
