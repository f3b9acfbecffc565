"""Inside detectron2: our detectors as its models, its backbones under ours, our UNet under its detectors.

Importing it registers the meta-architecture `NoiseToBox` and the backbones `build_diffusion_unet_backbone` and
`build_diffusion_unet_fpn_backbone`; `add_config` adds their options. LazyConfig needs no registration.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from diffperception.detection import BoxSampler, Detector, DiffusionDet, DynamicHead
from diffperception.diffusion.noise import name_seed, sample_seed
from diffperception.files import written_beside
from diffperception.integrations import require_installed
from diffperception.models import Backbone, DiffusionModel, FeatureInfo, TimmBackbone, UNet, UNetBackbone, any_size

require_installed(
    "detectron2",
    "diffperception.integrations.detectron2",
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'",
)

from detectron2 import modeling  # noqa: E402 (what is absent is said in one sentence first)
from detectron2.config import CfgNode, configurable, get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.engine import DefaultTrainer, HookBase, hooks  # noqa: E402
from detectron2.evaluation import COCOEvaluator  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, detector_postprocess  # noqa: E402
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool  # noqa: E402
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping  # noqa: E402
from detectron2.structures import BitMasks, Boxes, Instances  # noqa: E402
from detectron2.utils import comm  # noqa: E402

PIXEL_MEAN = (103.53, 116.28, 123.675)  # detectron2's defaults, of pixels 0..255 in the order BGR
PIXEL_STD = (1.0, 1.0, 1.0)
WIDTH = 256  # of the head where neither the options nor a pyramid say another
FULL_MODEL = "full_model"  # the CLIP_TYPE of DETR's descendants for clipping the whole gradient
AVERAGED_WEIGHTS = "model_ema.pth"

logger = logging.getLogger(__name__)


def add_config(cfg: CfgNode) -> None:
    """Add the options of `NoiseToBox`, of the diffusion UNet as a backbone and of `NoiseToBoxTrainer`.

    Images are resized by detectron2 (INPUT.MIN_SIZE_TEST); of TEST.DETECTIONS_PER_IMAGE nothing is read.
    """
    cfg.MODEL.NOISE_TO_BOX = CfgNode(
        {
            "FILE": "",  # a detector that diffperception wrote; then only SEED and SCORE_THRESH_TEST are read
            "NUM_CLASSES": 0,  # 0: those of the data set
            "TIMM": "",  # a timm model as the backbone, such as resnet50; else it is the one of MODEL.BACKBONE
            "PRETRAINED": False,  # start from timm's weights, which needs the network once
            "STRIDES": [4, 8, 16, 32],  # of the timm model's maps
            "FREEZE_NORM": False,  # the timm model's batch norm keeps its statistics
            "IN_FEATURES": [],  # maps of MODEL.BACKBONE by name, finest first; empty: all but those of a top block
            "FPN_NORM": False,  # batch norm in the FPN, where one is built: helps training from scratch
            "NUM_BOXES": 300,  # in training, and in prediction unless NUM_BOXES_TEST says another number
            "STAGES": 6,  # of the head
            "WIDTH": 0,  # of the head; 0: that of the backbone's pyramid, or 256
            "SIGNAL_SCALE": 2.0,  # size of the signal beside the unit noise
            "NUM_BOXES_TEST": 0,  # 0: as in training
            "STEPS": 1,  # from noise to boxes
            "NMS_THRESH_TEST": 0.5,
            "SCORE_THRESH_TEST": 0.0,  # boxes below it are left out: 0 for AP, about 0.5 for pictures
            "SEED": 0,  # of the noise, together with the image's id
        }
    )
    cfg.MODEL.DIFFUSION_UNET = CfgNode(
        {
            "FILE": "",  # of a generator or a UNet
            "BLOCKS": [],  # decoder blocks to read: one per stride, each stride twice the next
            "TIMESTEP": 50,  # the noise level that images are brought to
            "FROZEN": True,
            "LABEL": None,  # the class that a UNet with classes is told
        }
    )
    cfg.MODEL_EMA = CfgNode({"ENABLED": False, "DECAY": 0.999})
    cfg.SOLVER.OPTIMIZER = "ADAMW"  # or SGD


@META_ARCH_REGISTRY.register()
class NoiseToBox(nn.Module):
    """A detector of ours as a model of detectron2: dicts of its DatasetMapper in, losses or Instances out.

    Predictions of an image are those of `detector.predict` with the seed that `evaluate` uses, a function of the
    image's id; without an id the seed is `seed` itself. The detector's own `min_size` still holds: leave it None where
    the mapper resizes images.

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
        self.is_bgr = _is_bgr(input_format)
        self.seed = seed
        self.score_threshold = score_threshold
        names = detector.classes if thing_classes is None else list(thing_classes)
        if set(names) != set(detector.classes):
            raise ValueError(
                f"the detector's classes are {', '.join(detector.classes)}, but the data set's {', '.join(names)}: take"
                " a detector of these classes, or the data set that it was trained for"
            )
        self.labels = [detector.classes.index(name) for name in names]  # the detector's, of detectron2's numbers

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
            return {"detector": Detector.load(options.FILE), "thing_classes": names, **arguments}
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


class Detectron2Backbone(Backbone):
    """A backbone of detectron2 under our detectors; images are padded as it wants them (to squares, for ViTDet).

    Where it is a pyramid of one width already, a head of that width needs no other FPN.

    Args:
        backbone: a backbone that is built; or the yacs options that describe one, `{"MODEL": ..., "INPUT": ...}`, which
            our model files can keep.
        features: names of its maps, finest first; by default all but those that a top block adds (p6).
        pixel_mean, pixel_std: what images are normalised with, of pixels 0..255 in the order of `input_format`.
        input_format: the order of the colours that its weights know, BGR or RGB.

    Raises:
        ValueError: there are no such maps, or their strides are no pyramid's; or another format than BGR and RGB.
    """

    def __init__(
        self,
        backbone: nn.Module | Mapping[str, Any],
        features: Sequence[str] | None = None,
        pixel_mean: Sequence[float] = PIXEL_MEAN,
        pixel_std: Sequence[float] = PIXEL_STD,
        input_format: str = "BGR",
    ):
        super().__init__()
        self.backbone = _built(backbone) if isinstance(backbone, Mapping) else backbone
        self.is_described = isinstance(backbone, Mapping)
        shapes = self.backbone.output_shape()  # type: ignore[operator]
        self.features = list(features) if features else _own_maps(self.backbone)
        unknown = [name for name in self.features if name not in shapes]
        if unknown:
            raise ValueError(f"the backbone has no maps {', '.join(unknown)}; it has {', '.join(shapes)}")
        self.info = [FeatureInfo(name, shapes[name].channels, int(shapes[name].stride)) for name in self.features]
        if self.strides != [self.strides[0] * 2**level for level in range(len(self.info))]:
            raise ValueError(
                f"the maps {', '.join(self.features)} have strides {self.strides}, but a pyramid needs one per stride,"
                " each twice the one before: name others in features"
            )
        self.is_pyramid = len(self.info) > 1 and len(set(self.channels)) == 1
        wanted = getattr(self.backbone, "padding_constraints", {})  # newer than release 0.6
        # The Swin there names a property that it has no number for: then there is none.
        divisors = (
            getattr(self.backbone, "size_divisibility", 0),
            wanted.get("size_divisibility", 0),
            self.strides[-1],
        )
        self.multiple = math.lcm(*(int(number) for number in divisors if number > 1))
        self.square = int(wanted.get("square_size", 0))
        self.is_bgr = _is_bgr(input_format)
        self.mean, self.std = _rgb(pixel_mean, self.is_bgr), _rgb(pixel_std, self.is_bgr)

    @property
    def arguments(self) -> dict[str, Any]:  # type: ignore[override]
        if not self.is_described:
            raise ValueError(
                f"the {type(self.backbone).__name__} that detectron2 built cannot be described in our model file: keep"
                " detectron2's checkpoint, or have it built from yacs options (MODEL.BACKBONE), which a file can keep"
            )
        return self.__dict__["arguments"]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W), RGB, normalised -> one (B, channels[l], H / strides[l], W / strides[l]) per level."""
        multiple = self.multiple
        if self.square:
            side = max(self.square, *images.shape[-2:])
            multiple *= -(-side // multiple)
        return any_size(self._read, images.flip(1) if self.is_bgr else images, multiple, self.strides)

    def _read(self, images: Tensor) -> list[Tensor]:
        maps = self.backbone(images)
        return [maps[name] for name in self.features]


class DiffusionUNetBackbone(modeling.Backbone):
    """The activations of a diffusion UNet as a backbone of detectron2; its maps are s1, s2, ..., by their strides.

    Images of any size are padded as the UNet needs it, and brought to the generator's -1..1 whatever they were
    normalised with. A frozen UNet stays as it is, while the norms of its maps learn.

    Args:
        unet, blocks, timestep, frozen, label: as of a `UNetBackbone`.
        pixel_mean, pixel_std: what images were normalised with, of pixels 0..255 in the order of `input_format`.
        input_format: the order of their colours, BGR or RGB.

    Raises:
        FileNotFoundError, ValueError: as a `UNetBackbone`; or another format.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        unet: str | Path | DiffusionModel | UNet,
        blocks: Sequence[int],
        timestep: float = 50,
        frozen: bool = True,
        label: int | None = None,
        pixel_mean: Sequence[float] = (127.5, 127.5, 127.5),
        pixel_std: Sequence[float] = (127.5, 127.5, 127.5),
        input_format: str = "RGB",
    ):
        super().__init__()
        self.net = UNetBackbone(unet, blocks, timestep, frozen, label)
        names = [f"s{stride}" for stride in self.net.strides]
        self._out_features = names
        self._out_feature_channels = dict(zip(names, self.net.channels, strict=True))
        self._out_feature_strides = dict(zip(names, self.net.strides, strict=True))
        self.is_bgr = _is_bgr(input_format)
        given = [_rgb(values, self.is_bgr) for values in (pixel_mean, pixel_std)]
        theirs_mean, theirs_std, mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (*given, self.net.mean, self.net.std)
        )
        self.register_buffer("scale", theirs_std / std, persistent=False)
        self.register_buffer("shift", (theirs_mean - mean) / std, persistent=False)

    @property
    def size_divisibility(self) -> int:
        return self.net.multiple

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W), normalised -> (B, channels, ceil(H / stride), ceil(W / stride)) by name."""
        images = (images.flip(1) if self.is_bgr else images) * self.scale + self.shift
        # detectron2's FPN asks for multiples of its own coarsest map, not of what is below it.
        maps = any_size(self.net, images, self.net.multiple, self.net.strides)
        return dict(zip(self._out_features, maps, strict=True))


@BACKBONE_REGISTRY.register()
def build_diffusion_unet_backbone(cfg: CfgNode, input_shape: Any) -> DiffusionUNetBackbone:
    """The UNet of MODEL.DIFFUSION_UNET; ValueError if that names no file."""
    options = cfg.MODEL.DIFFUSION_UNET
    if not options.FILE:
        raise ValueError("MODEL.DIFFUSION_UNET.FILE names no file: give that of a generator or a UNet")
    settings = options.FILE, options.BLOCKS, options.TIMESTEP, options.FROZEN, options.LABEL
    return DiffusionUNetBackbone(*settings, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT)


@BACKBONE_REGISTRY.register()
def build_diffusion_unet_fpn_backbone(cfg: CfgNode, input_shape: Any) -> FPN:
    """An FPN over the UNet: p0, p1, ... for strides 1, 2, ..., and a coarser level by pooling."""
    body, options = build_diffusion_unet_backbone(cfg, input_shape), cfg.MODEL.FPN
    pool = LastLevelMaxPool()
    pool.in_feature = f"p{int(math.log2(body.net.strides[-1]))}"
    return FPN(body, body._out_features, options.OUT_CHANNELS, options.NORM, pool, options.FUSE_TYPE)


def global_clip(optimizer_class: type[Optimizer], norm: float) -> type[Optimizer]:
    """An optimiser that first scales the whole gradient down to this norm.

    For LazyConfig: `optimizer = L(L(global_clip)(optimizer_class=torch.optim.AdamW, norm=1.0))(params=..., lr=...)`.
    """

    class Clipped(optimizer_class):  # type: ignore[valid-type,misc]
        # A fused optimiser would have mixed precision's scale taken off the gradient within its step: after clipping.
        _step_supports_amp_scaling = property(lambda self: False, lambda self, value: None)

        def step(self, closure: Callable[[], float] | None = None) -> Any:
            nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], norm)
            return super().step(closure)

    Clipped.__name__ = Clipped.__qualname__ = f"Clipped{optimizer_class.__name__}"
    return Clipped


class EmaHook(HookBase):
    """Keeps an exponential moving average of the weights, which evaluations during training see.

    Its place among the hooks does not matter. Checkpoints of training hold the averages, and a resumed training goes on
    with them; `model_ema.pth`, written when training ends, has them as MODEL.WEIGHTS takes them. The decay of update n
    is min(decay, (1 + n) / (10 + n)), so that a short run does not average its first steps in.

    Args:
        model: that is trained.
        decay: of the average.
        output_dir: where model_ema.pth goes; None writes none.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, output_dir: str | Path | None = None):
        if not 0 <= decay <= 1:
            raise ValueError(f"the decay of the average is {decay}: it must be from 0 to 1")
        self.model: nn.Module = getattr(model, "module", model)  # not its wrapper for several processes
        self.decay = decay
        self.output_dir = output_dir
        self.averages: dict[str, Tensor] = {}
        self.updates = 0
        self.is_due = False

    def before_train(self) -> None:
        for hook in self.trainer._hooks:
            if isinstance(hook, hooks.EvalHook):
                hook._func = self._averaging(hook._func)

    def before_step(self) -> None:
        self.is_due = True

    def after_step(self) -> None:
        self._update()

    def after_train(self) -> None:
        if self.output_dir is None or not self.updates or not comm.is_main_process():
            return
        with written_beside(Path(self.output_dir, AVERAGED_WEIGHTS)) as beside, beside.open("wb") as file:
            torch.save({"model": self.model.state_dict() | self.averages}, file)

    def state_dict(self) -> dict[str, Any]:
        self._update()  # by hooks that are before this one
        return {"averages": self.averages, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self._weights()
        if state["averages"].keys() - own.keys():
            raise ValueError("the checkpoint's averaged weights are of another model: begin a new training")
        self.averages = {name: value.to(own[name], copy=True) for name, value in state["averages"].items()}
        self.updates = state["updates"]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has the averaged weights, if there are some."""
        self._update()
        weights = self._weights() if self.updates else {}
        kept = {name: value.clone() for name, value in weights.items()}
        for name, value in weights.items():
            value.copy_(self.averages[name])
        try:
            yield
        finally:
            for name, value in weights.items():
                value.copy_(kept[name])

    def _averaging(self, evaluate: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate_averaged() -> Any:
            with self.averaged():
                return evaluate()

        return evaluate_averaged

    def _weights(self) -> dict[str, Tensor]:
        """What learns, and statistics."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        state = self.model.state_dict()
        return {name: value for name, value in state.items() if value.is_floating_point() and name not in frozen}

    def _update(self) -> None:
        """Once a step, after it, whichever hook asks first."""
        if not self.is_due:
            return
        self.is_due = False
        weights = self._weights()
        if self.updates:
            weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_([self.averages[name] for name in weights], list(weights.values()), weight)
        else:
            self.averages = {name: value.clone() for name, value in weights.items()}
        self.updates += 1


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """SOLVER.OPTIMIZER, ADAMW or SGD, with the options that detectron2's SGD has.

    SOLVER.CLIP_GRADIENTS.CLIP_TYPE may be `full_model` too, which clips the whole gradient to the norm CLIP_VALUE.

    Raises:
        ValueError: it is another optimiser.
    """
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    momentum = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    known: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
        "ADAMW": (torch.optim.AdamW, {}),
        "SGD": (torch.optim.SGD, momentum),
    }
    if solver.OPTIMIZER not in known:
        raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER}: it is one of {', '.join(known)}")
    kind, options = known[solver.OPTIMIZER]
    whole = clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL
    kind = global_clip(kind, clip.CLIP_VALUE) if whole else maybe_add_gradient_clipping(cfg, kind)
    parameters = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    return kind(parameters, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **options)  # type: ignore[call-arg]


class NoiseToBoxTrainer(DefaultTrainer):
    """DefaultTrainer with `build_optimizer`, an `EmaHook` if MODEL_EMA.ENABLED, and a COCOEvaluator."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        # The fast implementation needs detectron2 compiled.
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR, "inference")), use_fast_impl=False)

    def build_hooks(self) -> list[HookBase]:
        ema = self.cfg.MODEL_EMA
        own = [EmaHook(self.model, ema.DECAY, self.cfg.OUTPUT_DIR)] if ema.ENABLED else []
        return [*super().build_hooks(), *own]


def _is_bgr(input_format: str) -> bool:
    if input_format not in ("BGR", "RGB"):
        raise ValueError(f"the input format is {input_format!r}, but our detectors see colours: give BGR or RGB")
    return input_format == "BGR"


def _rgb(values: Sequence[float], is_bgr: bool) -> tuple[float, float, float]:
    """Three numbers of pixels 0..255 as ours: of 0..1, in the order RGB."""
    if len(values) != 3:
        raise ValueError(f"pixel mean and std are of {len(values)} channels, but our detectors see three colours")
    first, second, third = (float(value) / 255 for value in (reversed(values) if is_bgr else values))
    return first, second, third


def _own_maps(backbone: nn.Module) -> list[str]:
    """Names of the maps of a backbone, finest first, without those that a top block adds to a pyramid."""
    shapes = backbone.output_shape()  # type: ignore[operator]
    names = sorted(shapes, key=lambda name: shapes[name].stride)
    return names[: len(names) - getattr(getattr(backbone, "top_block", None), "num_levels", 0)]


def _built(described: Mapping[str, Any]) -> nn.Module:
    """The backbone that yacs options describe."""
    cfg = get_cfg()
    add_config(cfg)
    cfg.set_new_allowed(True)  # options of other projects, whose builders read them
    cfg.merge_from_other_cfg(CfgNode({name: dict(part) for name, part in described.items()}))
    return modeling.build_backbone(cfg)


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


def _class_names(number: int, names: list[str] | None) -> list[str]:
    """Those of the data set, or so many numbers."""
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
        min_size=None,
        max_size=None,
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
