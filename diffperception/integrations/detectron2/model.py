"""Our detectors as models of detectron2."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2 import modeling
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor, nn

from diffperception.detection import BoxSampler, Detector, DiffusionDet, DynamicHead
from diffperception.diffusion.noise import name_seed, sample_seed
from diffperception.integrations.detectron2.backbones import Detectron2Backbone, build_diffusion_unet_backbone, is_bgr
from diffperception.models import Backbone, TimmBackbone

WIDTH = 256  # of the head where neither the options nor a pyramid say another

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class NoiseToBox(nn.Module):
    """A detector of ours as a model of detectron2: dicts of its DatasetMapper in, losses or Instances out.

    Predictions of an image are those of `detector.predict` with the seed that `evaluate` uses, a function of the
    image's id; without an id the seed is `seed` itself. The detector's own `min_size` and `max_size` still hold, which
    changes nothing where the mapper has resized images to them.

    Args:
        detector: ours or a user's; a DiffusionDet, or the file of one by `DiffusionDet.load`.
        input_format: the order of the colours of the images that come in, BGR or RGB.
        seed: of the noise.
        score_threshold: detections with a lower score are left out.
        thing_classes: names in the order in which the data set numbers its classes; by default the detector's.

    Raises:
        ValueError: there is no such format, or the data set has other classes than the detector.
    """

    @configurable
    def __init__(
        self,
        *,
        detector: Detector,
        input_format: str = "BGR",
        seed: int = 0,
        score_threshold: float = 0.0,
        thing_classes: Sequence[str] | None = None,
    ):
        super().__init__()
        self.detector = detector
        self.is_bgr = is_bgr(input_format)
        self.seed = seed
        self.score_threshold = score_threshold
        names = detector.classes if thing_classes is None else list(thing_classes)
        if set(names) != set(detector.classes):
            raise ValueError(
                f"the detector's classes are {', '.join(detector.classes)}, but the data set's {', '.join(names)}: take"
                " a detector of these classes, or the data set that it was trained for"
            )
        self.labels = [detector.classes.index(name) for name in names]  # the detector's, of detectron2's numbers
        self.register_load_state_dict_pre_hook(_refuse_our_files)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments that a yacs configuration describes, after `add_config`.

        Raises:
            ValueError: it names no data set and no number of classes, or what a constructor refuses.
        """
        options, names = cfg.MODEL.NOISE_TO_BOX, _thing_classes(cfg)
        arguments = {
            "input_format": cfg.INPUT.FORMAT,
            "seed": options.SEED,
            "score_threshold": options.SCORE_THRESH_TEST,
        }
        if options.FILE:
            return {"detector": _loaded(options.FILE, cfg.INPUT.MIN_SIZE_TEST), "thing_classes": names, **arguments}
        return {"detector": _detector(cfg, _class_names(options.NUM_CLASSES, names)), **arguments}

    @property
    def device(self) -> torch.device:
        return self.detector.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Weighted terms of the loss in training, else `instances` of each image, best first.

        Args:
            batched_inputs: per image `image` (3, H, W), 0..255, in the input format; in training `instances` with
                gt_boxes and gt_classes; in prediction, where there are, `height`, `width` of the result and `image_id`.
        """
        images = [self._image(each["image"]) for each in batched_inputs]
        if self.training:
            losses = self.detector.loss(images, [self._target(each) for each in batched_inputs])
            return {f"loss_{name}": value for name, value in losses.items()}
        found = self.detector.predict(images, [self._seed(each.get("image_id")) for each in batched_inputs])
        return [{"instances": self._instances(*pair)} for pair in zip(batched_inputs, found, strict=True)]

    def _image(self, pixels: Tensor) -> Tensor:
        """As our detectors want it: RGB, 0..1."""
        if pixels.ndim != 3 or len(pixels) != 3:
            raise ValueError(
                f"an image is {tuple(pixels.shape)}, but our detectors see (3, H, W): read it as INPUT.FORMAT says,"
                " with its channels first"
            )
        pixels = pixels.to(self.device, torch.float32) * (1 / 255)
        return pixels.flip(0) if self.is_bgr else pixels

    def _target(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        name = given.get("file_name", "an image")
        if "instances" not in given:
            raise ValueError(f"{name} has no `instances` to learn: let its data set say annotations=[] if it is empty")
        objects = given["instances"]
        numbers = objects.gt_classes.cpu()
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self.labels):
            raise ValueError(
                f"{name} has an object of class {int(numbers.max())}, but the detector has {len(self.labels)} classes,"
                " from 0 on: set MODEL.NOISE_TO_BOX.NUM_CLASSES, or the detector's classes"
            )
        target = {"boxes": objects.gt_boxes.tensor, "labels": torch.tensor(self.labels)[numbers]}
        if self.detector.gives_masks and objects.has("gt_masks"):
            masks = objects.gt_masks
            target["masks"] = (
                masks if isinstance(masks, BitMasks) else BitMasks.from_polygon_masks(masks, *objects.image_size)
            ).tensor
        return target

    def _seed(self, image_id: Any) -> int:
        """Of an image's noise, as in our evaluation; texts, as of Pascal VOC's images, count as names."""
        if image_id is None:
            return self.seed
        return name_seed(self.seed, image_id) if isinstance(image_id, str) else sample_seed(self.seed, int(image_id))

    def _instances(self, given: Mapping[str, Any], found: dict[str, Tensor]) -> Instances:
        size = tuple(given["image"].shape[-2:])
        found = {name: value[found["scores"] >= self.score_threshold] for name, value in found.items()}
        numbers = torch.tensor(self.labels, device=found["labels"].device).argsort()
        fields = {"pred_boxes": Boxes(found.pop("boxes")), "pred_classes": numbers[found.pop("labels")], **found}
        height, width = given.get("height", size[0]), given.get("width", size[1])
        instances = detector_postprocess(Instances(size, **fields), height, width)
        if instances.has("masks"):
            masks = instances.masks[:, None].float()
            instances.pred_masks = F.interpolate(masks, (height, width), mode="bilinear")[:, 0] >= 0.5
            instances.remove("masks")
        return instances


def _refuse_our_files(model: nn.Module, weights: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """ValueError if the weights have the names of a model file of ours: detectron2 would take none, and only warn."""
    known = {f"{prefix}{name}" for name in model.state_dict()}
    ours = {f"{prefix}{name}" for name in model.detector.state_dict()}  # type: ignore[union-attr]
    if not weights.keys() & known and weights.keys() & ours:
        raise ValueError(
            "these weights are of a model file of diffperception, which does not name them as detectron2 does: name it"
            " in MODEL.NOISE_TO_BOX.FILE, or in a LazyConfig's DiffusionDet.load, and leave MODEL.WEIGHTS empty"
        )


def _thing_classes(cfg: CfgNode) -> list[str] | None:
    """Names of the classes of the first data set that has some; None if no data set says them."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if MetadataCatalog.get(name).get("thing_classes") is None and name in DatasetCatalog:
            try:
                DatasetCatalog.get(name)  # those registered as COCO files learn their names when they are read
            except OSError:
                logger.warning("The data set %s cannot be read, and so the names of its classes are not known.", name)
        if (names := MetadataCatalog.get(name).get("thing_classes")) is not None:
            return list(names)
    return None


def _loaded(file: str, mapped_size: int) -> Detector:
    """The detector of a file, with a warning where the mapper of tests makes images of another size than it knows."""
    detector = Detector.load(file)
    if mapped_size not in (0, detector.min_size):
        logger.warning(
            "INPUT.MIN_SIZE_TEST is %d, but min_size of %s is %s: with 0 the detector resizes images as it learned to.",
            mapped_size,
            file,
            detector.min_size,
        )
    return detector


def _class_names(number: int, names: list[str] | None) -> list[str]:
    """Those of the data set, or so many numbers."""
    if number < 0:
        raise ValueError(
            f"MODEL.NOISE_TO_BOX.NUM_CLASSES is {number}: give a number of classes, or 0 for the data set's"
        )
    if not number and names is None:
        raise ValueError(
            "MODEL.NOISE_TO_BOX.NUM_CLASSES is 0, and DATASETS names no data set whose metadata has thing_classes: give"
            " the number of classes"
        )
    if names is not None and number in (0, len(names)):
        return names
    if names is not None:
        logger.warning(
            "MODEL.NOISE_TO_BOX.NUM_CLASSES is %d, but the data set has %d classes: the detector's are numbers.",
            number,
            len(names),
        )
    return [str(label) for label in range(number)]


def _detector(cfg: CfgNode, classes: list[str]) -> DiffusionDet:
    """The detector that a yacs configuration describes."""
    options, body = cfg.MODEL.NOISE_TO_BOX, _body(cfg)
    width = options.WIDTH or (body.channels[0] if body.is_pyramid else WIDTH)
    return DiffusionDet(
        classes,
        body,
        partial(DynamicHead, stages=options.STAGES, width=width),
        sampler=BoxSampler(options.STEPS, options.NUM_BOXES_TEST or None, nms_threshold=options.NMS_THRESH_TEST),
        strides=body.strides,
        fpn_norm=options.FPN_NORM,
        num_boxes=options.NUM_BOXES,
        signal_scale=options.SIGNAL_SCALE,
        # As the mapper resizes images for tests: it changes nothing here, and the detector's own file knows it.
        min_size=cfg.INPUT.MIN_SIZE_TEST or None,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
    )


def _body(cfg: CfgNode) -> Backbone:
    """The backbone of a detector that a yacs configuration describes."""
    options, unet = cfg.MODEL.NOISE_TO_BOX, cfg.MODEL.DIFFUSION_UNET
    if options.TIMM:
        return TimmBackbone(options.TIMM, options.STRIDES, options.PRETRAINED, options.FREEZE_NORM)
    builder = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)
    if builder is build_diffusion_unet_backbone:
        return build_diffusion_unet_backbone(cfg, None).net
    pixels = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT
    # Options that name the file of a UNet do not hold its weights: no model file could be made of them.
    source = modeling.build_backbone(cfg) if unet.FILE else _described(cfg)
    return Detectron2Backbone(source, options.IN_FEATURES, *pixels)


def _described(cfg: CfgNode) -> dict[str, Any]:
    """What builders of backbones read."""
    own = cfg.clone()
    model = {name: value for name, value in own.MODEL.items() if name != "WEIGHTS"}
    return {"MODEL": model, "INPUT": {"FORMAT": own.INPUT.FORMAT}}
