"""detectron2's programs with our detectors in them, and ours with detectron2's parts."""

import json
import pickle
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2 import modeling
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor, DefaultTrainer, SimpleTrainer, hooks
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, ResNet, detector_postprocess
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler, LinearParamScheduler

from diffperception.data import CocoDetection
from diffperception.data.shapes import CLASSES as SHAPES
from diffperception.data.shapes import ShapesSettings
from diffperception.data.shapes_dataset import write_shapes
from diffperception.detection import BoxSampler, Detector, DiffusionDet, DynamicHead, SetCriterion, SetWeights
from diffperception.detection.inference import evaluate_detector
from diffperception.diffusion.noise import sample_seed
from diffperception.integrations.detectron2 import (
    Detectron2Backbone,
    DiffusionUNetBackbone,
    EmaHook,
    NoiseToBox,
    NoiseToBoxTrainer,
    add_config,
    build_optimizer,
    global_clip,
)
from diffperception.models import DiffusionModel, UNet, UNetBackbone
from diffperception.training import train
from tests.helpers.devices import Device

CONFIGS = Path(__file__).parents[2] / "configs" / "detectron2"
CATEGORIES = {7: "square", 3: "disc", 12: "ring"}  # by id, not in their order
IMAGES = 6
KINDS = ("annotations", "images")


def write_pictures(folder: Path) -> Path:
    """Pictures of several sizes with a few objects, one of them a crowd, and one without any; returns the COCO file."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(IMAGES):
        width, height = 60 + 4 * number, 50
        pixels = random.integers(0, 60, (height, width, 3), dtype=np.uint8)
        images.append({"id": 40 + 3 * number, "file_name": f"{number}.png", "width": width, "height": height})
        for k in range(3 if number else 0):
            x, y = (int(v) for v in random.integers(0, 30, 2))
            w, h = (int(v) for v in random.integers(10, 20, 2))
            pixels[y : y + h, x : x + w, k] = 220
            crowd = int((number, k) == (1, 2))
            shape = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": crowd, "id": len(annotations) + 1}
            if crowd:
                shape["segmentation"] = {"size": [height, width], "counts": [height * width]}
            else:
                shape["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append({"image_id": images[-1]["id"], "category_id": [7, 3, 12][k], **shape})
        Image.fromarray(pixels).save(folder / f"{number}.png")
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder / "annotations.json"


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def name(annotations: Path) -> Any:
    """The pictures, registered in detectron2's catalogues."""
    register_coco_instances("pictures", {}, str(annotations), str(annotations.parent))
    yield "pictures"
    DatasetCatalog.remove("pictures")
    MetadataCatalog.remove("pictures")


def options(name: str, output: Path, *more: Any) -> Any:
    """The yacs configuration of a small detector on detectron2's ResNet-18 with FPN."""
    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "NoiseToBox", "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.RESNETS.NORM", "BN"),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 32),
            *("MODEL.PIXEL_STD", [57.375, 57.12, 58.395]),
            *("MODEL.NOISE_TO_BOX.NUM_BOXES", 10, "MODEL.NOISE_TO_BOX.STAGES", 2),
            *("DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0),
            *("INPUT.MIN_SIZE_TRAIN", (48, 64), "INPUT.MIN_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2),
            *("SOLVER.BASE_LR", 1e-3, "SOLVER.STEPS", (), "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2),
            *("OUTPUT_DIR", str(output), "SEED", 1),
            *more,
        ]
    )
    output.mkdir(parents=True, exist_ok=True)
    return cfg


def lazy(data: str, model: Any, output: Path) -> Any:
    """The shared part of our LazyConfig files on the pictures, with a model."""
    cfg = LazyConfig.load(str(CONFIGS / "training.py"))
    cfg.model = model
    changes = {
        "dataloader.train.dataset.names": data,
        "dataloader.test.dataset.names": data,
        "dataloader.train.dataset.filter_empty": "False",
        "dataloader.train.total_batch_size": 2,
        "dataloader.train.num_workers": 0,
        "dataloader.test.num_workers": 0,
        "train.output_dir": str(output),
        "train.device": "cpu",
        "train.eval_period": 2,
        "train.checkpointer.period": 2,
    }
    cfg = LazyConfig.apply_overrides(cfg, [f"{key}={value}" for key, value in changes.items()])
    cfg.dataloader.train.mapper.augmentations = []
    cfg.dataloader.test.mapper.augmentations = []
    return cfg


def small_detector(**changes: Any) -> Any:
    """A detector described for LazyConfig, on a timm model."""
    arguments = {
        "classes": ["disc", "square", "ring"],
        "backbone": "regnetx_002",
        "freeze_norm": True,
        "strides": [4, 8],
        "head": partial(DynamicHead, stages=2, width=32, ffn_width=32, dynamic_width=8),
        "num_boxes": 10,
        "min_size": None,
    }
    return L(DiffusionDet)(**arguments | changes)


def inputs(*sizes: tuple[int, int], objects: int = 2) -> list[dict[str, Any]]:
    """What a mapper gives of images of these heights and widths."""
    random = torch.Generator().manual_seed(0)
    given = []
    for number, (height, width) in enumerate(sizes):
        instances = Instances((height, width))
        corner = torch.rand(objects, 2, generator=random) * 20
        instances.gt_boxes = Boxes(torch.cat([corner, corner + 15], dim=1))
        instances.gt_classes = torch.arange(objects) % 2
        image = torch.randint(0, 256, (3, height, width), generator=random, dtype=torch.uint8)
        given.append({"image": image, "instances": instances, "image_id": 5 + number, "height": height, "width": width})
    return given


def assert_same(found: Instances, expected: Instances, tolerance: float = 0.0) -> None:
    assert found.image_size == expected.image_size
    assert len(found) == len(expected) > 0
    boxes = found.pred_boxes.tensor, expected.pred_boxes.tensor
    torch.testing.assert_close(*boxes, atol=100 * tolerance, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=tolerance, rtol=0)
    assert torch.equal(found.pred_classes, expected.pred_classes)


class KnowingDetector(Detector):
    """A user's detector: it knows what is in images by their width, and finds it where the noise says, roughly."""

    def __init__(self, known: dict[int, dict[str, Tensor]], classes: Sequence[str]):
        super().__init__(classes)
        self.known = known

    def loss(self, images: list[Tensor], targets: list[dict], generator: Any = None) -> dict[str, Tensor]:
        return {"area": torch.stack([target["masks"].sum() for target in targets])}

    def predict(self, images: list[Tensor], seeds: Any = None, sampler: Any = None) -> list[dict[str, Tensor]]:
        return [self.find(image, seed) for image, seed in zip(images, seeds, strict=True)]

    def find(self, image: Tensor, seed: int) -> dict[str, Tensor]:
        noise, known = torch.Generator().manual_seed(seed), self.known[image.shape[-1]]
        boxes = known["boxes"].repeat(3, 1)
        moved = boxes + 2 * torch.randn(boxes.shape, generator=noise)
        scores = torch.rand(len(boxes), generator=noise)
        found = {"boxes": moved.clamp(min=0), "scores": scores, "labels": known["labels"].repeat(3)}
        if self.gives_masks:
            steps = torch.randint(-1, 2, (len(boxes), 2), generator=noise).tolist()
            masks = found["masks"] = known["masks"].repeat(3, 1, 1)
            for row, step in enumerate(steps):
                masks[row] = masks[row].roll(step, (0, 1))
        return found


class MaskingDetector(KnowingDetector):
    """It knows the masks, too."""

    gives_masks = True


class SameSeeds(nn.Module):
    """A detectron2 model whose images have no ids."""

    def __init__(self, model: NoiseToBox):
        super().__init__()
        self.model = model

    def forward(self, given: list[dict[str, Any]]) -> Any:
        return self.model([{key: value for key, value in each.items() if key != "image_id"} for each in given])


def average_precision(model: nn.Module, data: str, kind: str = "bbox") -> float:
    """By detectron2's loader and evaluator."""
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")
    loader = build_detection_test_loader(
        dataset=get_detection_dataset_dicts(data, filter_empty=False), mapper=mapper, num_workers=0
    )
    return inference_on_dataset(model, loader, COCOEvaluator(data, use_fast_impl=False))[kind]["AP"] / 100


def test_cocoevaluator_gives_the_ap_of_evaluate_as_seeds_go_by_image(name: str, annotations: Path) -> None:
    dataset = CocoDetection(annotations, annotations.parent)
    targets = [dataset[i] for i in range(IMAGES)]
    known = {image.shape[-1]: {key: target[key] for key in ("boxes", "labels")} for image, target in targets}
    detector = KnowingDetector(known, dataset.classes)
    expected = evaluate_detector(detector, dataset, batch_size=4).metrics["AP"]
    assert 0.1 < expected < 0.9
    model = NoiseToBox(detector=detector)
    assert average_precision(model, name) == pytest.approx(expected, abs=1e-4)
    assert abs(average_precision(SameSeeds(model), name) - expected) > 1e-3
    # A detector that numbers its classes otherwise: by their names.
    turned = {width: target | {"labels": 2 - target["labels"]} for width, target in known.items()}
    detector = KnowingDetector(turned, dataset.classes[::-1])
    assert evaluate_detector(detector, dataset).metrics["AP"] == pytest.approx(expected, abs=1e-6)
    model = NoiseToBox(detector=detector, thing_classes=MetadataCatalog.get(name).thing_classes)
    assert average_precision(model, name) == pytest.approx(expected, abs=1e-4)


def test_masks_come_in_and_go_out(name: str, annotations: Path) -> None:
    dataset = CocoDetection(annotations, annotations.parent, masks=True)
    targets = [dataset[i] for i in range(1, IMAGES)]
    known = {image.shape[-1]: target for image, target in targets}
    known[60] = dataset[0][1]  # nothing
    detector = MaskingDetector(known, dataset.classes)
    metrics = evaluate_detector(detector, dataset).metrics
    model = NoiseToBox(detector=detector)
    assert 0.1 < metrics["mask_AP"] < 0.9
    assert average_precision(model, name, "segm") == pytest.approx(metrics["mask_AP"], abs=1e-4)

    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR", use_instance_mask=True)
    given = [mapper(each) for each in get_detection_dataset_dicts(name)]
    area = torch.stack([target["masks"][~target["iscrowd"].bool()].sum() for _, target in targets])
    assert torch.equal(model.train()(given)["loss_area"], area)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_detections_of_a_file_are_those_of_evaluate(
    name: str, annotations: Path, tmp_path: Path, image_format: str
) -> None:
    """All the boxes and scores of a real detector, through detectron2's mapper, evaluator and results file."""
    torch.manual_seed(0)
    file = tmp_path / "detector.safetensors"
    instantiate(small_detector(sampler=L(BoxSampler)(steps=2))).save(file)
    expected = evaluate_detector(file, CocoDetection(annotations, annotations.parent)).detections
    cfg = options(
        name, tmp_path, "MODEL.NOISE_TO_BOX.FILE", str(file), "INPUT.FORMAT", image_format, "INPUT.MIN_SIZE_TEST", 0
    )
    DefaultTrainer.test(
        cfg, modeling.build_model(cfg), COCOEvaluator(name, output_dir=str(tmp_path), use_fast_impl=False)
    )
    found = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(expected, found, strict=True):
        assert (ours["image_id"], ours["category_id"]) == (theirs["image_id"], theirs["category_id"])
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-3)
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6)


def test_the_first_loss_is_the_detectors_own(name: str, tmp_path: Path) -> None:
    model = modeling.build_model(options(name, tmp_path))
    assert model.detector.classes == ["disc", "square", "ring"]  # those of the data set
    given = inputs((64, 80), (50, 66))
    torch.manual_seed(3)
    losses = model(given)
    torch.manual_seed(3)
    images = [each["image"].flip(0).float() * (1 / 255) for each in given]
    targets = [{"boxes": each["instances"].gt_boxes.tensor, "labels": each["instances"].gt_classes} for each in given]
    expected = model.detector.loss(images, targets)
    assert losses == {f"loss_{term}": value for term, value in expected.items()}


def test_instances_are_the_postprocessed_predictions(name: str, tmp_path: Path) -> None:
    model = modeling.build_model(options(name, tmp_path)).eval()
    given = inputs((64, 80), (50, 66))
    given[0] |= {"height": 96, "width": 100}
    images = [each["image"].flip(0).float() * (1 / 255) for each in given]
    predicted = model.detector.predict(images, [sample_seed(0, 5), sample_seed(0, 6)])
    for each, detections, found in zip(given, predicted, model(given), strict=True):
        boxes, scores, labels = (detections[key] for key in ("boxes", "scores", "labels"))
        size = tuple(each["image"].shape[1:])
        raw = Instances(size, pred_boxes=Boxes(boxes.clone()), scores=scores, pred_classes=labels)
        assert_same(found["instances"], detector_postprocess(raw, each["height"], each["width"]))


@pytest.mark.parametrize("size", [(48, 64), (37, 500), (500, 37), (64, 64), (101, 33)])
def test_images_that_the_mapper_resized_are_not_resized_again(name: str, tmp_path: Path, size: tuple[int, int]) -> None:
    cfg = options(name, tmp_path, "INPUT.MAX_SIZE_TEST", 200)
    detector = modeling.build_model(cfg).detector
    assert (detector.min_size, detector.max_size) == (64, 200)
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    resized = T.ResizeShortestEdge([64, 64], 200).get_transform(pixels).apply_image(pixels)
    image = torch.from_numpy(resized.copy()).permute(2, 0, 1) / 255
    assert torch.equal(detector.resize(image), image)


def test_defaulttrainer_trains_stops_goes_on_and_evaluates(name: str, tmp_path: Path) -> None:
    small = ("MODEL.NOISE_TO_BOX.TIMM", "regnetx_002", "MODEL.NOISE_TO_BOX.WIDTH", 32, "SOLVER.MAX_ITER", 2)
    cfg = options(name, tmp_path, *small, "MODEL_EMA.ENABLED", True, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    clip = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"]
    cfg.merge_from_list(clip)
    first = NoiseToBoxTrainer(cfg)
    first.resume_or_load(resume=True)
    before = first.model.state_dict()["detector.backbone.fpn.layer_blocks.0.0.weight"].clone()
    first.train()
    after = first.model.state_dict()
    assert not torch.equal(after["detector.backbone.fpn.layer_blocks.0.0.weight"], before)

    cfg.merge_from_list(["SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 3])
    second = NoiseToBoxTrainer(cfg)
    second.resume_or_load(resume=True)
    assert second.start_iter == 2
    assert all(torch.equal(value, after[key]) for key, value in second.model.state_dict().items())
    second.train()
    assert second.iter == 3
    assert "AP" in second._last_eval_results["bbox"]
    averages = torch.load(tmp_path / "model_ema.pth")["model"]
    assert averages.keys() == after.keys()

    cfg.merge_from_list(["MODEL.WEIGHTS", str(tmp_path / "model_ema.pth")])
    predictor = DefaultPredictor(cfg)
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    found = predictor(image)["instances"]
    assert found.image_size == (50, 70)
    resized = predictor.aug.get_transform(image).apply_image(image)
    rgb = torch.from_numpy(resized[..., ::-1].copy()).permute(2, 0, 1).float() / 255
    detections = second.model.detector
    detections.load_state_dict(predictor.model.detector.state_dict())
    expected = detections.eval().predict([rgb])[0]
    torch.testing.assert_close(found.scores, expected["scores"][: len(found)])


def do_train(cfg: Any, resume: bool) -> Any:
    """The essence of detectron2's tools/lazyconfig_train_net.py."""
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    trainer = SimpleTrainer(model, instantiate(cfg.dataloader.train), instantiate(cfg.optimizer))
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)

    def evaluate() -> Any:
        return inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))

    trainer.register_hooks(
        [
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            EmaHook(model, 0.997, cfg.train.output_dir),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)
    return trainer


def test_lazyconfig_trains_stops_goes_on_and_gives_our_file(name: str, tmp_path: Path) -> None:
    cfg = lazy(name, L(NoiseToBox)(detector=small_detector(), input_format="BGR"), tmp_path)
    cfg.train.max_iter = 2
    assert do_train(cfg, resume=False).iter == 2
    cfg.train.max_iter = 3
    trainer = do_train(cfg, resume=True)
    assert (trainer.start_iter, trainer.iter) == (2, 3)
    assert (tmp_path / "coco_instances_results.json").exists()

    file = tmp_path / "detector.safetensors"
    trainer.model.detector.save(file)  # its arguments came as lists of a configuration library
    given = inputs((48, 64))
    loaded = instantiate(L(NoiseToBox)(detector=L(DiffusionDet.load)(path=str(file))))
    assert_same(loaded.eval()(given)[0]["instances"], trainer.model.eval()(given)[0]["instances"])


class Distance(nn.Module):
    """The squared distance of two weights to what comes in; in evaluation the weights themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(3))
        self.second = nn.Parameter(torch.zeros(3))
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, target: Tensor) -> Any:
        if not self.training:
            return self.first.detach().clone()
        return {"loss": ((self.first - target) ** 2).sum() + ((self.second - target) ** 2).sum()}


def train_distance(folder: Path, steps: int, place: int, model: Distance, seen: list[Tensor]) -> EmaHook:
    """Train for some steps, from a checkpoint if there is one, evaluating after each step."""
    folder.mkdir(exist_ok=True)
    trainer = SimpleTrainer(model, [torch.ones(3)] * 9, torch.optim.SGD(model.parameters(), 0.1))
    checkpointer = DetectionCheckpointer(model, str(folder), trainer=trainer)
    ema = EmaHook(model, 0.5, folder)

    def evaluate() -> dict[str, float]:
        model.eval()
        seen.append(model(torch.ones(3)))
        model.train()
        return {}

    others = [hooks.PeriodicCheckpointer(checkpointer, 2), hooks.EvalHook(1, evaluate)]
    trainer.register_hooks([*others[:place], ema, *others[place:]])
    checkpointer.resume_or_load("", resume=True)
    trainer.train(trainer.iter + 1 if checkpointer.has_checkpoint() else 0, steps)
    return ema


@pytest.mark.parametrize("place", [0, 1, 2])  # among the hooks
def test_evaluations_see_averages_that_go_on_after_a_stop(tmp_path: Path, place: int) -> None:
    model, seen = Distance(), []
    train_distance(tmp_path / "whole", 4, place, model, seen)
    weights = [1 - 0.8 ** (step + 1) for step in range(4)]  # w += 0.2 (1 - w)
    expected = [weights[0]]
    for n, weight in enumerate(weights[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected.append(decay * expected[-1] + (1 - decay) * weight)
    torch.testing.assert_close(torch.stack(seen)[:, 0], torch.tensor(expected))
    assert model.first[0].item() == pytest.approx(weights[-1])  # itself it was left as it is
    written = torch.load(tmp_path / "whole" / "model_ema.pth")["model"]
    assert written["first"][0].item() == pytest.approx(expected[-1])
    assert torch.equal(written["fixed"], torch.ones(2))

    train_distance(tmp_path / "halves", 2, place, Distance(), [])
    resumed: list[Tensor] = []
    ema = train_distance(tmp_path / "halves", 4, place, Distance(), resumed)
    assert torch.equal(torch.stack(resumed), torch.stack(seen[2:]))
    checkpoint = torch.load(tmp_path / "halves" / "model_0000003.pth")
    assert checkpoint["model"]["first"][0].item() == pytest.approx(weights[-1])
    assert torch.equal(checkpoint["trainer"]["hooks"]["EmaHook"]["averages"]["first"], seen[-1])
    assert ema.updates == 4
    assert set(ema.averages) == {"first", "second"}


def moved(model: Distance) -> float:
    """How far all weights are from zero."""
    return torch.cat([model.first, model.second]).detach().norm().item()


def clipped_step(optimizer: torch.optim.Optimizer, model: Distance) -> float:
    """How far one step moves all weights from zero."""
    optimizer.zero_grad()
    model(torch.ones(3))["loss"].backward()
    optimizer.step()
    return moved(model)


def test_the_whole_gradient_is_clipped_in_both_kinds_of_configuration(name: str, tmp_path: Path) -> None:
    model = Distance()
    free = clipped_step(torch.optim.SGD(model.parameters(), 0.1), model)
    assert free == pytest.approx(0.2 * 6**0.5)

    described = L(L(global_clip)(optimizer_class=torch.optim.SGD, norm=2.0))(params=None, lr=0.1)
    described.params = list((model := Distance()).parameters())
    assert clipped_step(instantiate(described), model) == pytest.approx(0.2)

    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model")
    sgd = ("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.1, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 2.0)
    cfg = options(name, tmp_path, *clip, *sgd, "SOLVER.WEIGHT_DECAY", 0.0)
    model = Distance()
    assert clipped_step(build_optimizer(cfg, model), model) == pytest.approx(0.2)
    cfg.merge_from_list(["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 100.0])
    model = Distance()
    assert clipped_step(build_optimizer(cfg, model), model) == pytest.approx(free)
    with pytest.raises(ValueError, match="one of ADAMW, SGD"):
        build_optimizer(options(name, tmp_path, "SOLVER.OPTIMIZER", "LION"), model)
    cfg.merge_from_list(["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "whole"])
    with pytest.raises(ValueError, match="CLIP_TYPE is whole: it is one of full_model, value, norm"):
        build_optimizer(cfg, model)


def test_clipping_comes_after_mixed_precisions_scale_is_taken_off() -> None:
    """A fused optimiser of torch takes it off itself, within its step."""
    model = Distance()
    optimizer = global_clip(torch.optim.SGD, 2.0)(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.ones(3))["loss"]).backward()
    scaler.step(optimizer)
    assert moved(model) == pytest.approx(0.2)


def resnet() -> ResNet:
    stages = ResNet.make_default_stages(18, norm="FrozenBN")
    return ResNet(BasicStem(3, 64, "FrozenBN"), stages, out_features=["res2", "res3", "res4", "res5"])


def pyramid(width: int = 32) -> FPN:
    return FPN(resnet(), ["res2", "res3", "res4", "res5"], width, top_block=LastLevelMaxPool())


def detector_on(backbone: nn.Module, **changes: Any) -> DiffusionDet:
    body = Detectron2Backbone(backbone, **changes)
    head = partial(DynamicHead, stages=2, width=32, ffn_width=32, dynamic_width=8)
    return DiffusionDet(["a", "b"], body, head, strides=body.strides, num_boxes=10, min_size=None, max_size=None)


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def assert_learns(detector: DiffusionDet) -> None:
    """Every parameter has a gradient, in bfloat16 too, and predictions are as large as the images."""
    model = NoiseToBox(detector=detector)
    given = inputs((96, 120), (110, 100))
    sum(model(given).values()).backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(given)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert [each["instances"].image_size for each in model.eval()(given)] == [(96, 120), (110, 100)]


def test_a_resnet_of_detectron2_learns_under_our_head_and_pyramid() -> None:
    detector = detector_on(resnet())
    assert_learns(detector)
    assert detector.strides == [4, 8, 16, 32]
    assert parameters_of(detector.backbone) > parameters_of(detector.backbone.backbone)


def test_a_pyramid_of_detectron2_learns_without_a_second_one() -> None:
    detector = detector_on(pyramid())
    assert_learns(detector)
    assert detector.backbone.features == ["p2", "p3", "p4", "p5"]  # not the top block's
    assert parameters_of(detector) == parameters_of(pyramid()) + parameters_of(detector.head)
    assert parameters_of(detector_on(pyramid(64))) > parameters_of(pyramid(64)) + parameters_of(detector.head)


def test_a_backbone_sees_what_detectron2_would_show_it() -> None:
    """Its order of colours, its mean and std, its padding: the maps are those that detectron2 computes itself."""
    torch.manual_seed(0)
    body, mean, std = pyramid().eval(), [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
    detector = detector_on(body, pixel_mean=mean, pixel_std=std, input_format="BGR").eval()
    bgr = inputs((50, 70))[0]["image"].float()
    shape = [torch.tensor(values).view(3, 1, 1) for values in (mean, std)]
    expected = body(torch.nn.functional.pad((bgr - shape[0]) / shape[1], (0, 26, 0, 14))[None])
    found = detector.maps([bgr.flip(0) / 255])
    for ours, key in zip(found, ("p2", "p3", "p4", "p5"), strict=True):
        torch.testing.assert_close(ours, expected[key], atol=1e-4, rtol=1e-4)


class Squares(modeling.Backbone):
    """A backbone that takes squares of one size alone, as ViTDet with its relative positions."""

    padding_constraints = {"size_divisiblity": 16, "square_size": 64}  # noqa: RUF012 (as ViTDet spells it)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, 16)
        self._out_features = ["last"]
        self._out_feature_channels, self._out_feature_strides = {"last": 8}, {"last": 16}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        assert images.shape[-1] == images.shape[-2]
        assert images.shape[-1] % 64 == 0 or images.shape[-1] > 64
        return {"last": self.patches(images)}


@pytest.mark.parametrize(("size", "cells"), [((48, 64), (3, 4)), ((64, 64), (4, 4)), ((96, 32), (6, 2))])
def test_images_are_padded_to_squares_where_a_backbone_wants_them(
    size: tuple[int, int], cells: tuple[int, int]
) -> None:
    backbone = Detectron2Backbone(Squares())
    assert (backbone.multiple, backbone.square) == (16, 64)
    (found,) = backbone(torch.rand(1, 3, *size))
    assert found.shape == (1, 8, *cells)


def test_maps_that_are_no_pyramid_are_refused() -> None:
    with pytest.raises(ValueError, match="has no maps res9; it has res2, res3"):
        Detectron2Backbone(resnet(), ["res9"])
    with pytest.raises(ValueError, match=r"strides \[4, 16\].*name others in features"):
        Detectron2Backbone(resnet(), ["res2", "res4"])
    with pytest.raises(ValueError, match="give BGR or RGB"):
        Detectron2Backbone(resnet(), input_format="L")


@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up."])
def test_a_zoos_backbone_reaches_every_tensor(tmp_path: Path, prefix: str) -> None:
    """A .pkl as detectron2's converters write them, loaded by its heuristics."""
    zoo = {key: torch.rand_like(value) for key, value in resnet().state_dict().items()}
    content = {"model": {prefix + key: value.numpy() for key, value in zoo.items()}, "__author__": "a converter"}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps({**content, "matching_heuristics": True}))
    model = NoiseToBox(detector=detector_on(pyramid()))
    DetectionCheckpointer(model).load(str(tmp_path / "R-18.pkl"))
    found = model.detector.backbone.backbone.bottom_up.state_dict()
    assert found.keys() == zoo.keys()
    assert all(torch.equal(value, zoo[key]) for key, value in found.items())


@pytest.mark.parametrize("kind", ["pyramid", "bare", "timm"])
def test_a_detector_of_a_yacs_configuration_is_kept_in_our_file(name: str, tmp_path: Path, kind: str) -> None:
    more: dict[str, tuple[Any, ...]] = {
        "pyramid": (),
        "bare": ("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.NOISE_TO_BOX.WIDTH", 32),
        "timm": ("MODEL.NOISE_TO_BOX.TIMM", "regnetx_002", "MODEL.NOISE_TO_BOX.WIDTH", 32),
    }
    cfg = options(name, tmp_path, *more[kind], "MODEL.NOISE_TO_BOX.STEPS", 2)
    model = modeling.build_model(cfg).eval()
    assert model.detector.head.width == 32
    model.detector.save(tmp_path / "detector.safetensors")
    cfg.merge_from_list(["MODEL.RESNETS.DEPTH", 34])  # the file holds what was built
    loaded = NoiseToBox(detector=Detector.load(tmp_path / "detector.safetensors"))
    given = inputs((50, 70), (64, 64))
    for found, expected in zip(loaded.eval()(given), model(given), strict=True):
        assert_same(found["instances"], expected["instances"])


def test_a_backbone_that_no_file_can_describe_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep detectron2's checkpoint"):
        detector_on(pyramid()).save(tmp_path / "detector.safetensors")
    assert not list(tmp_path.iterdir())


def test_empty_images_crowded_ones_and_those_without_objects_to_learn(name: str, tmp_path: Path) -> None:
    model = modeling.build_model(options(name, tmp_path, "MODEL.NOISE_TO_BOX.NUM_BOXES", 3))
    with EventStorage(), pytest.warns(UserWarning, match="5 objects, more than num_boxes=3"):
        losses = model([*inputs((48, 64), objects=0), *inputs((48, 64), objects=5)])
    assert all(value.isfinite() for value in losses.values())
    losses = model(inputs((48, 64), objects=0))
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()  # without objects too each parameter has a gradient, as several processes need it
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    given = inputs((48, 64))
    del given[0]["instances"]
    with pytest.raises(ValueError, match="annotations="):
        model(given)
    assert len(model.eval()(given)) == 1  # prediction needs none
    wrong = inputs((48, 64))
    wrong[0]["instances"].gt_classes += 7
    with pytest.raises(ValueError, match="class 8, but the detector has 3 classes"):
        model.train()(wrong)


@pytest.mark.parametrize("shape", [(1, 48, 64), (48, 64), (4, 48, 64), (48, 64, 3)])
def test_images_are_of_three_channels(shape: tuple[int, ...]) -> None:
    """Others would be spread over the colours, or turned upside down with them."""
    model = NoiseToBox(detector=instantiate(small_detector())).eval()
    with pytest.raises(ValueError, match=r"our detectors see \(3, H, W\)"):
        model([{"image": torch.zeros(shape, dtype=torch.uint8)}])


def test_our_files_are_not_taken_for_checkpoints_of_detectron2(tmp_path: Path) -> None:
    """Their names are others, and so detectron2 would take none of their weights."""
    model = NoiseToBox(detector=instantiate(small_detector()))
    model.detector.save(tmp_path / "detector.safetensors")
    checkpointer = DetectionCheckpointer(NoiseToBox(detector=instantiate(small_detector())), str(tmp_path))
    with pytest.raises(ValueError, match=r"name it in MODEL.NOISE_TO_BOX.FILE"):
        checkpointer.load(str(tmp_path / "detector.safetensors"))
    DetectionCheckpointer(model, str(tmp_path)).save("theirs")
    checkpointer.load(str(tmp_path / "theirs.pth"))
    found = checkpointer.model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


def test_the_order_of_colours_does_not_change_detections(name: str, tmp_path: Path) -> None:
    """Of a timm model; and of detectron2's, where the weights know the other order."""
    torch.manual_seed(0)
    given = inputs((50, 70))
    turned = [each | {"image": each["image"].flip(0)} for each in given]
    detector = instantiate(small_detector()).eval()
    models = [NoiseToBox(detector=detector, input_format=order).eval() for order in ("BGR", "RGB")]
    assert_same(models[0](given)[0]["instances"], models[1](turned)[0]["instances"])

    mean, std = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
    pixels = (
        ("MODEL.PIXEL_MEAN", mean, "MODEL.PIXEL_STD", std),
        ("MODEL.PIXEL_MEAN", mean[::-1], "MODEL.PIXEL_STD", std[::-1]),
    )
    bgr = modeling.build_model(options(name, tmp_path, *pixels[0], "INPUT.FORMAT", "BGR")).eval()
    rgb = modeling.build_model(options(name, tmp_path, *pixels[1], "INPUT.FORMAT", "RGB")).eval()
    state = bgr.state_dict()
    stem = "detector.backbone.backbone.bottom_up.stem.conv1.weight"
    rgb.load_state_dict(state | {stem: state[stem].flip(1)})
    assert_same(rgb(turned)[0]["instances"], bgr(given)[0]["instances"], tolerance=1e-4)
    with pytest.raises(ValueError, match="give BGR or RGB"):
        modeling.build_model(options(name, tmp_path, "INPUT.FORMAT", "L"))


def test_low_scores_are_left_out_where_that_is_asked_for() -> None:
    detector = instantiate(small_detector()).eval()
    given = inputs((48, 64))
    scores = NoiseToBox(detector=detector).eval()(given)[0]["instances"].scores
    middle = scores.median().item()
    left = NoiseToBox(detector=detector, score_threshold=middle).eval()(given)[0]["instances"].scores
    assert torch.equal(left, scores[scores >= middle])
    assert 0 < len(left) < len(scores)


def test_classes_come_from_the_data_set_unless_the_options_number_them(name: str, tmp_path: Path) -> None:
    def classes(*more: Any) -> list[str]:
        return modeling.build_model(options(name, tmp_path, *more)).detector.classes

    number = "MODEL.NOISE_TO_BOX.NUM_CLASSES"
    assert classes(number, 3) == ["disc", "square", "ring"]
    assert classes(number, 4) == ["0", "1", "2", "3"]
    assert classes(number, 2, "DATASETS.TRAIN", (), "DATASETS.TEST", ()) == ["0", "1"]
    with pytest.raises(ValueError, match="NUM_CLASSES is -1"):
        classes(number, -1)
    with pytest.raises(ValueError, match="give the number of classes"):
        classes("DATASETS.TRAIN", (), "DATASETS.TEST", ())
    instantiate(small_detector(classes=["cat", "dog"])).save(tmp_path / "detector.safetensors")
    with pytest.raises(ValueError, match="classes are cat, dog, but the data set's disc, square, ring"):
        classes("MODEL.NOISE_TO_BOX.FILE", str(tmp_path / "detector.safetensors"))


def generator(folder: Path) -> Path:
    """The file of a generator with the blocks and labels of configs/generation/shapes.yaml, but narrow."""
    torch.manual_seed(0)
    network = UNet(channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1, attention=(), num_head_channels=16)
    model = DiffusionModel(SHAPES, network, image_size=64, null_class=True)
    model.save(folder / "generator.safetensors")
    return folder / "generator.safetensors"


def test_faster_rcnn_learns_on_a_generator_that_stays_as_it_is(tmp_path: Path) -> None:
    cfg = LazyConfig.load(str(CONFIGS / "faster_rcnn_unet.py"))
    cfg.model.backbone.bottom_up.unet = str(generator(tmp_path))
    cfg.model.backbone.out_channels = 32
    cfg.model.proposal_generator.head.in_channels = 32
    cfg.model.roi_heads.box_head.input_shape = ShapeSpec(channels=32, height=7, width=7)
    cfg.model.roi_heads.box_head.fc_dims = [16]
    cfg.model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=16)
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with EventStorage():
        losses = model(inputs((50, 63), (71, 66)))  # no multiples of anything
    sum(losses.values()).backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    unet = {key for key in before if key.startswith("backbone.bottom_up.net.reader.")}
    norms = {key for key in before if key.startswith("backbone.bottom_up.net.norms.")}
    assert len(unet) > 20
    assert not unet & changed
    assert len(norms) == 6
    assert norms <= changed
    assert model.eval()(inputs((50, 63)))[0]["instances"].image_size == (50, 63)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_a_generator_sees_its_own_range_whatever_images_were_normalised_with(tmp_path: Path, order: str) -> None:
    file, mean, std = generator(tmp_path), [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
    body = DiffusionUNetBackbone(file, [4, 2, 0], 50, True, 6, None, mean, std, order).eval()
    rgb = inputs((48, 64))[0]["image"].float()
    expected = UNetBackbone(file, [4, 2, 0], 50, True, 6).eval()((rgb / 127.5 - 1)[None])
    theirs = rgb if order == "RGB" else rgb.flip(0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    found = body(((theirs - mean) / std)[None])
    assert list(found) == ["s2", "s4", "s8"]
    for ours, map_ in zip(expected, found.values(), strict=True):
        torch.testing.assert_close(ours, map_, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("builder", ["build_diffusion_unet_backbone", "build_diffusion_unet_fpn_backbone"])
def test_a_generator_is_a_backbone_of_yacs_configurations(name: str, tmp_path: Path, builder: str) -> None:
    unet = ("MODEL.DIFFUSION_UNET.FILE", str(generator(tmp_path)), "MODEL.DIFFUSION_UNET.BLOCKS", [4, 2, 0])
    more = ("MODEL.DIFFUSION_UNET.LABEL", 6, "MODEL.NOISE_TO_BOX.WIDTH", 32)
    cfg = options(name, tmp_path, "MODEL.BACKBONE.NAME", builder, *unet, *more)
    model = modeling.build_model(cfg)
    assert model.detector.strides == [2, 4, 8]
    sum(model(inputs((50, 63))).values()).backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    found = model.eval()(inputs((50, 63)))[0]["instances"]
    file = tmp_path / "detector.safetensors"
    if "fpn" in builder:
        with pytest.raises(ValueError, match="keep detectron2's checkpoint"):
            model.detector.save(file)
        return
    model.detector.save(file)  # a backbone of our own, which files can describe
    assert_same(NoiseToBox(detector=Detector.load(file)).eval()(inputs((50, 63)))[0]["instances"], found)


@pytest.mark.parametrize(("own", "mapped", "warned"), [(None, 64, 1), (64, 64, 0), (96, 0, 0)])
def test_images_of_another_size_than_a_file_knows_are_warned_of(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, own: int | None, mapped: int, warned: int
) -> None:
    file = tmp_path / "detector.safetensors"
    instantiate(small_detector(min_size=own)).save(file)
    with caplog.at_level("WARNING"):
        modeling.build_model(
            options(name, tmp_path, "MODEL.NOISE_TO_BOX.FILE", str(file), "INPUT.MIN_SIZE_TEST", mapped)
        )
    assert caplog.text.count("with 0 the detector resizes images as it learned to") == warned


def test_times_of_flow_matching_are_fractions(name: str, tmp_path: Path) -> None:
    network = UNet(channels=32, channel_mult=(1, 1), num_res_blocks=1, attention=(), num_head_channels=16)
    flow = DiffusionModel(None, network, schedule="flow", prediction="flow", image_size=64)
    flow.save(tmp_path / "flow.safetensors")
    unet = ("MODEL.DIFFUSION_UNET.FILE", str(tmp_path / "flow.safetensors"), "MODEL.DIFFUSION_UNET.BLOCKS", [2, 0])
    more = ("MODEL.BACKBONE.NAME", "build_diffusion_unet_backbone", "MODEL.NOISE_TO_BOX.WIDTH", 32)
    cfg = options(name, tmp_path, *unet, *more, "MODEL.DIFFUSION_UNET.TIMESTEP", 0.25)
    assert modeling.build_model(cfg).detector.backbone.backbone.reader.timesteps == [0.25]


def test_a_generator_that_is_not_named_is_asked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FILE names no file"):
        modeling.build_model(options(name, tmp_path, "MODEL.BACKBONE.NAME", "build_diffusion_unet_backbone"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("noise_to_box*.py")), ids=lambda path: path.name)
def test_our_lazyconfigs_describe_detectors_that_learn(path: Path, tmp_path: Path) -> None:
    cfg = LazyConfig.load(str(path))
    assert {"model", "dataloader", "optimizer", "lr_multiplier", "train"} <= cfg.keys()
    cfg = LazyConfig.apply_overrides(cfg, ["dataloader.train.mapper.image_format=RGB"])
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    saved = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert instantiate(saved.optimizer._target_).__name__ == "ClippedAdamW"
    detector = cfg.model.detector
    detector.head = partial(DynamicHead, stages=1, width=256, ffn_width=32, dynamic_width=8)
    detector.num_boxes = 5
    if "timm" in path.name:
        detector.backbone, detector.pretrained = "resnet18", False
    elif "unet" in path.name:
        detector.backbone.unet = str(generator(tmp_path))
    else:
        detector.backbone.backbone.bottom_up.stages.depth = 18
        detector.backbone.backbone.bottom_up.stages.pop("stride_in_1x1")
    model = instantiate(cfg.model)
    assert not model.is_bgr
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    sum(model(inputs((48, 64))).values()).backward()
    optimizer.step()
    assert 0 < instantiate(cfg.lr_multiplier)(0.0) < instantiate(cfg.lr_multiplier)(0.5)


def test_our_yacs_configuration_is_accepted() -> None:
    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "noise_to_box_R_50_FPN.yaml"))
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE) == ("NoiseToBox", "full_model")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.NOISE_TO_BOX.STAGES", 1, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8])
    model = modeling.build_model(cfg)
    assert model.detector.classes[:2] == ["person", "bicycle"]
    assert len(model.detector.classes) == 80
    assert type(build_optimizer(cfg, model)).__name__ == "ClippedAdamW"


def newer_backbones() -> dict[str, Any]:
    """Those that detectron2 has had since release 0.6, each with the FPN parameters that our detector adds to it."""
    norm = partial(nn.LayerNorm, eps=1e-6)
    vit = partial(modeling.ViT, img_size=128, patch_size=16, embed_dim=64, depth=2, num_heads=2, drop_path_rate=0.0)
    vit = partial(vit, window_size=4, mlp_ratio=2, norm_layer=norm, window_block_indexes=[0], use_rel_pos=True)
    simple = partial(modeling.SimpleFeaturePyramid, in_feature="last_feat", out_channels=32, norm="LN", square_pad=128)
    simple = partial(simple, scale_factors=(4.0, 2.0, 1.0, 0.5), top_block=LastLevelMaxPool())
    swin = partial(modeling.SwinTransformer, embed_dim=24, depths=[2, 2, 2, 2], num_heads=[2, 2, 2, 2], window_size=4)
    swin = partial(swin, out_indices=(0, 1, 2, 3))
    scales = ("scale2", "scale3", "scale4", "scale5")
    mvit = partial(modeling.MViT, embed_dim=24, depth=6, num_heads=1, last_block_indexes=(0, 2, 3, 5), norm_layer=norm)
    mvit = partial(mvit, residual_pooling=True, drop_path_rate=0.0, out_features=scales)
    return {
        "ResNet": resnet,
        "ResNet with FPN": pyramid,
        "ViTDet": lambda: simple(vit(out_feature="last_feat")),
        "ViT": lambda: vit(out_feature="last_feat"),
        "Swin": swin,
        "Swin with FPN": lambda: FPN(swin(), ["p0", "p1", "p2", "p3"], 32),
        "MViT with FPN": lambda: FPN(mvit(), scales, 32),
    }


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(modeling, "ViT"), reason="this detectron2 is release 0.6: it has neither ViT nor Swin")
@pytest.mark.parametrize(
    "kind", ["ResNet", "ResNet with FPN", "ViTDet", "ViT", "Swin", "Swin with FPN", "MViT with FPN"]
)
def test_newer_backbones_learn_under_our_head(kind: str) -> None:
    torch.manual_seed(0)
    backbone = newer_backbones()[kind]()
    detector = detector_on(backbone)
    assert_learns(detector)
    alone = parameters_of(backbone) + parameters_of(detector.head)
    has_pyramid = "FPN" in kind or kind == "ViTDet"
    assert (parameters_of(detector) == alone) == has_pyramid


def test_the_pages_program_runs(annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on the page for people to change its folder; here it takes two steps."""
    page = (CONFIGS.parents[1] / "docs" / "integrations.md").read_text(encoding="utf-8")
    program = page.split("\n## detectron2\n")[1].split("```python\n")[1].split("```")[0]
    for before, after in {'DATA = "data/shapes"': f"DATA = {str(tmp_path)!r}", "STEPS = 300": "STEPS = 2"}.items():
        assert program.count(before) == 1
        program = program.replace(before, after)
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(annotations.parent)
        (tmp_path / "annotations" / f"instances_{part}.json").symlink_to(annotations)
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(program, "integrations.md", "exec"), {"__name__": "__main__"})
    finally:
        for part in ("train", "val"):
            DatasetCatalog.remove(f"my_{part}")
            MetadataCatalog.remove(f"my_{part}")
    assert Image.open("output/found.png").size[0] >= 60
    assert Detector.load("output/detector.safetensors").classes == ["disc", "square", "ring"]


def test_tensors_stay_on_the_models_device(device: Device) -> None:
    """What detectron2's mapper gives is on the CPU."""
    model = device.move(NoiseToBox(detector=detector_on(pyramid()), thing_classes=["b", "a"]))
    given = inputs((48, 64), (64, 64))
    ema = EmaHook(model, 0.9)
    ema.before_step()
    sum(model(given).values()).backward()
    ema.after_step()
    with ema.averaged():
        found = model.eval()(given)[0]["instances"]
    assert found.pred_boxes.tensor.device == found.pred_classes.device == device.device


def test_a_file_with_a_backbone_of_detectron2_needs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modeling.build_model(options(name, tmp_path)).detector.save(tmp_path / "detector.safetensors")
    for module in [module for module in sys.modules if module.startswith("diffperception.integrations.detectron2")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "detectron2", None)  # as if it were not installed
    with pytest.raises(ValueError, match="needs detectron2, which is not installed: `pip install"):
        Detector.load(tmp_path / "detector.safetensors")


def write_large_shapes(folder: Path) -> dict[str, tuple[str, str]]:
    """Large shapes, all of one class: localisation is learned in minutes. Returns annotations and images by part."""
    write_shapes(folder, ShapesSettings(train=1000, val=200, min_side=64, max_side=64, max_objects=2, min_size=30), 1)
    files = {part: folder / "annotations" / f"instances_{part}.json" for part in ("train", "val")}
    for file in files.values():
        content = json.loads(file.read_text())
        content["categories"] = [{"id": 1, "name": "shape"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 1
        file.write_text(json.dumps(content))
    return {part: (str(file), str(folder / part)) for part, file in files.items()}


def learned_by_us(data: dict[str, tuple[str, str]], folder: Path, iterations: int) -> float:
    """AP of what our trainer makes of the shapes."""
    config = {
        "base": str(CONFIGS.parent / "detection" / "shapes.yaml"),
        "model": {"init_args": {"num_boxes": 20}},
        "data": {
            **{f"{part}_{kind}": value for part in data for kind, value in zip(KINDS, data[part], strict=True)},
            "batch_size": 16,
        },
        "optimizer": {"lr": 4e-3, "warmup_steps": 50},
        "trainer": {"max_steps": iterations, "precision": "32-true", "logger": "csv", "accelerator": "cpu"},
        "evaluation": {"every": iterations, "num_images": None, "num_pictures": 0},
        "output": str(folder),
    }
    (folder.parent / "ours.yaml").write_text(yaml.safe_dump(config))
    return train(folder.parent / "ours.yaml").metrics["AP"]


def learned_by_detectron2(folder: Path, iterations: int) -> float:
    """AP of what detectron2's loop makes of the same detector, data, optimiser and schedule."""
    head = partial(DynamicHead, stages=3, width=64, pool_size=5, pool_samples=1, dynamic_width=32, ffn_width=256)
    detector = small_detector(
        classes=["shape"],
        strides=[4, 8, 16],
        freeze_norm=False,
        fpn_norm=True,
        head=partial(head, num_heads=4, box_layers=1),
        criterion=L(SetCriterion)(weights=L(SetWeights)(classification=12.0)),
        sampler=L(BoxSampler)(steps=4),
        num_boxes=20,
    )
    cfg = lazy("shapes_train", L(NoiseToBox)(detector=detector), folder)
    cfg.dataloader.train.mapper.augmentations = [
        L(T.RandomFlip)(horizontal=True),
        L(T.RandomFlip)(horizontal=False, vertical=True),
    ]
    cfg.dataloader.train.total_batch_size = 16
    cfg.dataloader.test.dataset.names = "shapes_val"
    cfg.train.max_iter = iterations
    cfg.train.eval_period = 0
    cfg.train.checkpointer.period = iterations
    cfg.optimizer.lr, cfg.optimizer.weight_decay = 4e-3, 0.05
    cfg.optimizer.params.weight_decay_bias = 0.0
    warmup = 50 / iterations
    cfg.lr_multiplier = L(CompositeParamScheduler)(
        schedulers=[LinearParamScheduler(0.01, 1.0), CosineParamScheduler(1.0, 0.0)],
        lengths=[warmup, 1 - warmup],
        interval_scaling=["rescaled", "rescaled"],  # as ours: all of the cosine comes after the warm-up
    )
    folder.mkdir()
    seed_all_rng(0)
    trained = do_train(cfg, resume=False).model
    trained.load_state_dict(torch.load(folder / "model_ema.pth")["model"])
    return average_precision(trained.eval(), "shapes_val")


@pytest.mark.slow
def test_detectron2_trains_as_well_as_our_trainer(tmp_path: Path) -> None:
    """From scratch, in 300 iterations; the two draw other batches."""
    data = write_large_shapes(tmp_path / "shapes")
    for part, files in data.items():
        register_coco_instances(f"shapes_{part}", {}, *files)
    ours = learned_by_us(data, tmp_path / "ours", iterations=300)
    theirs = learned_by_detectron2(tmp_path / "theirs", iterations=300)
    print(f"AP after 300 iterations: ours {ours:.4f}, detectron2's {theirs:.4f}")
    assert min(ours, theirs) > 0.2  # untrained ones have none
    assert theirs == pytest.approx(ours, abs=0.03)


@pytest.mark.slow
def test_a_network_of_diffusers_is_a_backbone_too(tmp_path: Path) -> None:
    """Stable Diffusion's layout, its modules by name: under our head, and under detectron2's FPN."""
    pytest.importorskip("diffusers")
    from tests.integrations.diffusers_folders import write_pipeline

    folder, blocks = str(write_pipeline(tmp_path / "sd", "sd")), ["up_blocks.1", "mid_block"]
    under_fpn = FPN(DiffusionUNetBackbone(folder, blocks), ["s4", "s8"], 8)
    assert [m.shape[-2:] for m in under_fpn(torch.rand(1, 3, 48, 72)).values()] == [(12, 18), (6, 9)]

    described = L(NoiseToBox)(
        detector=small_detector(backbone=L(UNetBackbone)(unet=folder, blocks=blocks), freeze_norm=False, strides=[4, 8])
    )
    model, given = instantiate(described), inputs((50, 70))
    sum(model(given).values()).backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    DetectionCheckpointer(model, str(tmp_path)).save("checkpoint")
    again = instantiate(described)
    DetectionCheckpointer(again).load(str(tmp_path / "checkpoint.pth"))
    assert_same(again.eval()(given)[0]["instances"], model.eval()(given)[0]["instances"])
