"""DiffusionDet with the federated loss."""

import torch

from diffperception.detection import DiffusionDet

from .scenes import CLASSES, random_image, random_target, tiny_detector

MANY = [f"class {k}" for k in range(30)]
IMAGES = [random_image(64, 96, seed) for seed in (0, 1)]
TARGETS = [random_target(3, 64, 96, seed) for seed in (0, 1)]  # labels 0..2


def class_gradient(detector: DiffusionDet, seed: int = 0, targets: list[dict] = TARGETS) -> torch.Tensor:
    """(K, d) what the class loss asks of the last layer, one row a class."""
    detector.zero_grad()
    detector.loss(IMAGES, targets, torch.Generator().manual_seed(seed))["classification"].backward()
    return torch.stack([stage.class_logits.weight.grad for stage in detector.head.stages]).abs().sum((0, 2))


def test_only_the_classes_drawn_and_those_present_are_learnt():
    learnt = class_gradient(tiny_detector(classes=MANY, federated_classes=10)) > 0
    present = torch.cat([target["labels"] for target in TARGETS]).unique()
    assert learnt[present].all()
    assert learnt.sum() == 10
    assert (class_gradient(tiny_detector(classes=MANY)) > 0).all()


def test_the_frequencies_that_training_knows_decide_and_the_generator_draws():
    detector = tiny_detector(classes=MANY, federated_classes=10)
    detector.class_frequencies.zero_()[20:27] = 5.0
    learnt = class_gradient(detector)
    assert learnt[20:27].count_nonzero() == min(7, 10 - len(torch.cat([t["labels"] for t in TARGETS]).unique()))
    assert torch.equal(class_gradient(detector, seed=0), learnt)
    detector.class_frequencies.fill_(1.0)
    drawn = [class_gradient(detector, seed).nonzero()[:, 0].tolist() for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_classes_that_only_crowds_have_are_not_present():
    """Crowds are not learnt: to count their classes would teach that they are absent."""
    detector = tiny_detector(classes=MANY, federated_classes=1)
    targets = [target | {"iscrowd": (target["labels"] == 2).long()} for target in TARGETS]
    assert any(target["iscrowd"].any() for target in targets)
    learnt = class_gradient(detector, targets=targets) > 0
    present = torch.cat([target["labels"][target["iscrowd"] == 0] for target in targets]).unique()
    assert learnt.nonzero()[:, 0].tolist() == present.tolist()


def test_as_many_as_there_are_is_the_ordinary_loss():
    losses = [
        tiny_detector(federated_classes=count).loss(IMAGES, TARGETS, torch.Generator().manual_seed(0))
        for count in (None, len(CLASSES), 50)
    ]
    assert losses[0] == losses[1] == losses[2]


def test_an_image_without_objects_learns_from_drawn_classes():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    detector = tiny_detector(classes=MANY, federated_classes=10)
    assert detector.loss(IMAGES[:1], [empty], torch.Generator().manual_seed(0))["classification"] > 0


def test_the_setting_is_saved_and_the_frequencies_are_not(tmp_path):
    tiny_detector(federated_classes=2).save(tmp_path / "model.safetensors")
    loaded = DiffusionDet.load(tmp_path / "model.safetensors")
    assert isinstance(loaded, DiffusionDet)
    assert loaded.criterion.federated_classes == 2
    assert "class_frequencies" not in loaded.state_dict()
