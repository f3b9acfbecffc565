"""mmsegmentation: our features under its decode heads, our ensemble as one of them, its data sets in our training.

Importing this registers the classes below, and the feature extractors, in ``mmseg.registry.MODELS``.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffperception.data.masks import IGNORE_INDEX
from diffperception.integrations import require_installed
from diffperception.models import DiffusionModel, UNetBackbone, any_size
from diffperception.models.base import tensors_of, weights_digest
from diffperception.segmentation import (
    DiffusionFeatures,
    FeatureExtractor,
    FeatureMaps,
    PixelEnsemble,
    PixelSegmenter,
    RGBFeatures,
    TimmFeatures,
)
from diffperception.segmentation.maps import covered
from diffperception.visualization.draw import class_color

FORK = "pip install onedl-mmcv==2.3.6 onedl-mmengine==0.10.12 onedl-mmsegmentation==1.4.2"
for module in ("mmengine", "mmcv", "mmseg"):
    require_installed(module, "diffperception.integrations.mmseg", FORK)
try:
    from mmengine.model import BaseModule
    from mmengine.registry import init_default_scope
    from mmseg.models import BaseSegmentor, EncoderDecoder
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.registry import DATASETS, MODELS
except ModuleNotFoundError as error:
    if error.name == "mmcv._ext":
        raise ImportError(
            "this mmsegmentation needs mmcv with its compiled operators, which mmcv-lite does not have: install an mmcv"
            f" that was built for your torch, or the fork that needs none, in a fresh environment: `{FORK}`"
        ) from error
    raise

PIXELS = "pixels in -1..1, RGB: give data_preprocessor mean=[127.5] * 3, std=[127.5] * 3 and bgr_to_rgb=True"
LARGEST = 1.5  # of pixels; what an interpolation makes of them may be a little over 1
FROZEN = "frozen"  # the name in a checkpoint of what stands for the weights that it leaves out

for extractor in (DiffusionFeatures, TimmFeatures, RGBFeatures):
    MODELS.register_module(module=extractor)


def require_signed(images: Tensor) -> None:
    """ValueError for images (B, 3, H, W) that were normalised otherwise than to -1..1, where their range shows it."""
    low, high = (float(extreme) for extreme in images.aminmax())
    if max(-low, high) > LARGEST:
        raise ValueError(f"the images reach from {low:.3g} to {high:.3g}, but the backbone takes {PIXELS}")


@MODELS.register_module()
class FrozenBackbone(BaseModule):
    """The maps of a feature extractor, whose weights are not trained, for any decode head.

    Images that are larger than the extractor's window are read window by window. Maps come in the extractor's order.

    Args:
        features: the extractor, or its configuration, such as ``dict(type="TimmFeatures", name="resnet50")``.
        save_frozen: whether checkpoints hold its weights; else they hold a number of them, and a model that is built
            with other weights refuses such a checkpoint.
    """

    def __init__(
        self,
        features: FeatureExtractor | Mapping[str, Any],
        save_frozen: bool = True,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        built = features if isinstance(features, FeatureExtractor) else MODELS.build(features)
        self.features: FeatureExtractor = built.eval().requires_grad_(False)
        self.save_frozen = save_frozen
        if save_frozen:
            self.features.keep_weights()  # those of diffusers' folders, too
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_fill_in)

    @property
    def channels(self) -> list[int]:
        """Of each map: what heads call `in_channels`."""
        return [info.channels for info in self.features.info]

    @property
    def strides(self) -> list[int]:
        return self.features.strides

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """As every module's, but the extractor stays in evaluation mode."""
        super().train(mode)
        self.features.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W), RGB, -1..1 -> a (B, C, ceil(H / stride), ceil(W / stride)) a map; ValueError out of range."""
        require_signed(images)
        images = (images + 1) / 2
        side = self.features.window
        if side is None or max(images.shape[2:]) <= side:
            return tuple(any_size(self.features.encode, images, self.features.multiple, self.strides, "replicate"))
        maps = zip(*(self.features.maps(image).cropped().maps for image in images), strict=True)
        return tuple(torch.stack(rows) for rows in maps)


def _leave_out(module: FrozenBackbone, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the number of the frozen weights into a state dict in place of the weights."""
    if not module.save_frozen:
        for name in [name for name in state if name.startswith(f"{prefix}features.")]:
            del state[name]
        state[prefix + FROZEN] = _number(module.features)


def _fill_in(module: FrozenBackbone, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Complete a state dict without frozen weights by the module's own; ValueError if it was made with others."""
    number = state.pop(prefix + FROZEN, None)
    if number is None:
        return
    if not torch.equal(number.cpu(), _number(module.features)):
        raise ValueError(
            "the checkpoint was trained on other frozen weights than those that its configuration names now, and does"
            " not hold them: name the file that it was trained with"
        )
    state |= {f"{prefix}features.{name}": value for name, value in tensors_of(module.features).items()}


def _number(features: FeatureExtractor) -> Tensor:
    """(8,) bytes that tell these weights from others."""
    return torch.tensor(list(bytes.fromhex(weights_digest(tensors_of(features)))), dtype=torch.uint8)


@MODELS.register_module()
class DiffusionBackbone(FrozenBackbone):
    """What a frozen diffusion model sees in an image, for any decode head (arXiv 2112.03126).

    Maps come time by time, and for each in the order of the blocks.

    Args:
        generator: the file of a generator or a UNet, a folder of diffusers, or such a model.
        blocks: indices among the generator's `block_info`; of a network of diffusers also names of modules.
        timesteps: times of its schedule.
        window: images that are larger are read in windows of this side; None for what the generator was trained on.
        label: the class to tell a generator with classes; None for nothing, if it has learned that.
        prompt, attention: what to tell a network that attends to words, and whether maps say how much each place
            attends to each word; see :class:`DiffusionFeatures`.
        seed: of the noise, which is the same for all images.
        save_frozen: as for :class:`FrozenBackbone`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a folder of diffusers is named, which is not installed.
        ValueError: it holds another model, or a block, a time, the label or the prompt does not suit it.
    """

    def __init__(
        self,
        generator: str | Path | DiffusionModel,
        blocks: Sequence[int | str],
        timesteps: Sequence[float] = (50,),
        window: int | None = None,
        label: int | None = None,
        prompt: str | Path | None = None,
        attention: bool = False,
        seed: int = 0,
        save_frozen: bool = True,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        features = DiffusionFeatures(generator, blocks, timesteps, window, seed, label, prompt, attention)
        super().__init__(features, save_frozen, init_cfg)


@MODELS.register_module()
class DiffusionPyramid(BaseModule):
    """A diffusion UNet to be fine-tuned under a decode head: a normalised map per stride, finest first.

    What no map depends on is frozen, so that every trainable parameter has a gradient.

    Args:
        generator: as for :class:`DiffusionBackbone`, as are its label and prompt.
        blocks: one per stride, each stride twice the next.
        timestep: of its schedule: the noise level that images are brought to.

    Raises:
        FileNotFoundError, ImportError, ValueError: as for :class:`DiffusionBackbone`, or strides that are no pyramid's.
    """

    def __init__(
        self,
        generator: str | Path | DiffusionModel,
        blocks: Sequence[int | str],
        timestep: float = 50,
        label: int | None = None,
        prompt: str | Path | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.body = UNetBackbone(generator, blocks, timestep, frozen=False, label=label, prompt=prompt)

    @property
    def channels(self) -> list[int]:
        """Of each map: what heads call `in_channels`."""
        return self.body.channels

    @property
    def strides(self) -> list[int]:
        return self.body.strides

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W), RGB, -1..1 -> a (B, C, ceil(H / stride), ceil(W / stride)) a map; ValueError out of range."""
        require_signed(images)
        return tuple(any_size(self.body, images, self.body.multiple, self.strides, "replicate"))


@MODELS.register_module()
class DiffusionSegmentor(EncoderDecoder):
    """mmseg's EncoderDecoder, whose heads are told the backbone's channels.

    A head's ``in_channels`` (and ``strides``, if it takes them) may be left out; ``in_index="all"`` means all maps.
    Behind a neck, whose maps are its own, both must be said.

    Raises:
        ValueError: ``in_channels`` or ``in_index`` of a head, or of a neck, does not fit the backbone, or
            ``data_preprocessor`` normalises to something else than -1..1.
    """

    def __init__(self, backbone: Mapping[str, Any], decode_head: Mapping[str, Any], **options: Any) -> None:
        super().__init__(backbone, decode_head, **options)
        mean, std = (getattr(self.data_preprocessor, name, None) for name in ("mean", "std"))
        if mean is not None and std is not None and not bool(((mean == 127.5) & (std == 127.5)).all()):
            raise ValueError(
                f"data_preprocessor has mean {mean.flatten().tolist()} and std {std.flatten().tolist()}, but the"
                f" backbone takes {PIXELS}"
            )

    def _init_decode_head(self, decode_head: Mapping[str, Any]) -> None:
        super()._init_decode_head(self._told(decode_head, "decode_head"))

    def _init_auxiliary_head(self, auxiliary_head: Any) -> None:
        if isinstance(auxiliary_head, list | tuple):
            auxiliary_head = [self._told(head, "auxiliary_head") for head in auxiliary_head]
        elif auxiliary_head is not None:
            auxiliary_head = self._told(auxiliary_head, "auxiliary_head")
        super()._init_auxiliary_head(auxiliary_head)

    def _told(self, head: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A head's configuration with what the backbone knows of the maps that it takes."""
        head = dict(head)
        if not hasattr(self.backbone, "channels"):
            return head
        if self.with_neck:
            return self._beyond_the_neck(head, name)
        kind = MODELS.get(head["type"]) if isinstance(head["type"], str) else head["type"]
        takes_strides = kind is not None and "strides" in inspect.signature(kind).parameters
        channels, strides = self.backbone.channels, self.backbone.strides
        index = head.get("in_index", "all" if takes_strides else -1)
        index = list(range(len(channels))) if index == "all" else index
        chosen = [index] if isinstance(index, int) else list(index)
        if any(i not in range(-len(channels), len(channels)) for i in chosen):
            raise ValueError(f"{name}.in_index is {index}, but the backbone gives {len(channels)} maps")
        known = {"in_channels": channels, **({"strides": strides} if takes_strides else {})}
        for key, values in known.items():
            found = [values[i] for i in chosen]
            wanted = found[0] if isinstance(index, int) else found
            if head.get(key) is not None and head[key] != wanted:
                raise ValueError(
                    f"{name}.{key} is {head[key]}, but the backbone gives {wanted}: set that, or leave it out"
                )
            head[key] = wanted
        return head | {"in_index": index}

    def _beyond_the_neck(self, head: dict[str, Any], name: str) -> dict[str, Any]:
        """A head's configuration as it is; ValueError if it, or the neck, lacks what must be said."""
        channels, taken = self.backbone.channels, getattr(self.neck, "in_channels", None)
        if taken is not None and taken != channels:
            raise ValueError(f"neck.in_channels is {taken}, but the backbone gives {channels}: set that")
        if "in_channels" not in head or head.get("in_index") == "all":
            raise ValueError(f"{name} takes what the neck gives: say in its in_channels and in_index what that is")
        return head


@MODELS.register_module()
class PixelEnsembleHead(BaseDecodeHead):
    """An ensemble of pixel classifiers as a decode head (arXiv 2112.03126): upsampled features never are in memory.

    Every member learns from pixels of its own, drawn anew at every step among those that are labelled; the loss is the
    sum of their cross entropies. Its logits are the logarithm of the members' mean probability.

    Args:
        in_channels: of the maps.
        strides: of the maps, in pixels.
        num_classes: K, 2 to 255.
        members: classifiers.
        pixels: that each learns from at every step, 2 or more.
        in_index: which of the backbone's maps are taken; None for all.
        ignore_index: label of the pixels that nothing is learned from.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        members: int = 10,
        pixels: int = 64,
        in_index: Sequence[int] | None = None,
        ignore_index: int = IGNORE_INDEX,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            list(in_channels),
            channels=1,
            num_classes=num_classes,
            out_channels=num_classes,
            dropout_ratio=0,
            in_index=list(range(len(in_channels)) if in_index is None else in_index),
            input_transform="multiple_select",
            ignore_index=ignore_index,
            loss_decode={"type": "CrossEntropyLoss", "avg_non_ignore": True},
            init_cfg=init_cfg,
        )
        del self.conv_seg, self.loss_decode  # what other heads end with
        if len(strides) != len(in_channels):
            raise ValueError(f"there are strides of {len(strides)} maps and channels of {len(in_channels)}")
        if pixels < 2:
            raise ValueError(f"pixels must be at least 2, which batch norm needs, not {pixels}")
        self.strides, self.pixels = list(strides), pixels
        self.ensemble = PixelEnsemble(sum(in_channels), num_classes, members)

    def loss(self, inputs: Sequence[Tensor], batch_data_samples: Sequence[Any], train_cfg: Any) -> dict[str, Tensor]:
        """The members' cross entropy; 0 where no pixel of the batch is labelled."""
        labels = self._stack_batch_gt(batch_data_samples)[:, 0].long()
        known = (labels != self.ignore_index).nonzero()
        if not len(known):
            nothing = torch.stack([parameter.sum() for parameter in self.ensemble.parameters()]).sum()
            return {"loss_ce": 0 * nothing}  # a gradient for every parameter, which DDP waits for
        drawn = torch.randint(len(known), (self.ensemble.members * self.pixels,), device=known.device)
        image, row, column = known[drawn].unbind(1)
        y = labels[image, row, column]
        if bool(((y < 0) | (y >= self.num_classes)).any()):
            raise ValueError(
                f"the masks have label {int(y.max())}, but the head has {self.num_classes} classes, 0 to"
                f" {self.num_classes - 1}, and ignores {self.ignore_index}: set num_classes, or the data set's"
                " reduce_zero_label"
            )
        x = self._features(inputs, image, torch.stack([row, column], 1), tuple(labels.shape[1:]))
        mlps = self.ensemble.mlps
        logits = mlps(mlps.linears[0](x.unflatten(0, (self.ensemble.members, self.pixels))))
        y = y.view(logits.shape[:2])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        accuracy = 100 * (logits.argmax(-1) == y).float().mean()
        return {"loss_ce": loss * self.ensemble.members, "acc_seg": accuracy}

    def _features(self, inputs: Sequence[Tensor], image: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, D) features of pixels (N, 2) of images (N,) of one size."""
        maps = self._transform_inputs(inputs)
        x = maps[0].new_empty(len(image), self.ensemble.channels)
        for index in range(len(maps[0])):
            own = image == index
            x[own] = FeatureMaps([m[index] for m in maps], self.strides, size).at_points(points[own])
        return x

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """(B, K, H, W) log mean probabilities, H and W the pixels that all maps cover: at least the images'."""
        maps = self._transform_inputs(inputs)
        return self._log_mean(maps, covered(maps, self.strides))

    def predict(self, inputs: Sequence[Tensor], batch_img_metas: list[dict[str, Any]], test_cfg: Any) -> Tensor:
        """(B, K, H, W) log mean probabilities of images (H, W)."""
        meta = batch_img_metas[0]
        is_window = isinstance(meta["img_shape"], torch.Size)  # so mmseg's slide inference says it
        height, width = (meta["img_shape"] if is_window else meta.get("pad_shape", meta["img_shape"]))[:2]
        return self._log_mean(self._transform_inputs(inputs), (height, width))

    def _log_mean(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        means = []
        for image in zip(*maps, strict=True):
            found = self.ensemble.segment(FeatureMaps(list(image), self.strides, size), probabilities=True)
            assert found.probabilities is not None
            means.append(found.probabilities.float())
        return torch.stack(means).clamp(min=torch.finfo(torch.float32).tiny).log()


@MODELS.register_module()
class FittedSegmentor(BaseSegmentor):
    """A trained :class:`PixelSegmenter` in mmseg, for its test loop, metrics, `inference_model` and visualizers.

    Its "logits" are the members' shares of votes, so that labels are those of `diffperception predict`.

    Args:
        segmenter: the file, or the model.
    """

    align_corners = False  # mmseg asks for it when it resizes what is found

    def __init__(
        self,
        segmenter: str | Path | PixelSegmenter,
        data_preprocessor: Mapping[str, Any] | nn.Module | None = None,
        train_cfg: Any = None,
        test_cfg: Any = None,
        init_cfg: Mapping[str, Any] | None = None,
        pretrained: None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.segmenter = segmenter if isinstance(segmenter, PixelSegmenter) else PixelSegmenter.load(segmenter)
        self.segmenter.eval().requires_grad_(False)
        classes = self.segmenter.classes
        self.dataset_meta = {"classes": classes, "palette": [class_color(label) for label in range(len(classes))]}

    def train(self, mode: bool = True) -> "FittedSegmentor":
        """It stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def encode_decode(self, inputs: Tensor, batch_data_samples: Any = None) -> Tensor:
        """(B, K, H, W) shares of votes of images (B, 3, H, W), RGB, -1..1."""
        require_signed(inputs)
        votes = [self.segmenter.segment((image + 1) / 2).votes for image in inputs]
        shares = torch.stack(votes).float() / self.segmenter.classifier.members
        return F.interpolate(shares, tuple(inputs.shape[2:]), mode="bilinear")  # as Segmentation.resized

    def predict(self, inputs: Tensor, data_samples: Any = None) -> Any:
        return self.postprocess_result(self.encode_decode(inputs), data_samples)

    def _forward(self, inputs: Tensor, data_samples: Any = None) -> Tensor:
        return self.encode_decode(inputs)

    def extract_feat(self, inputs: Tensor) -> list[list[Tensor]]:
        """The maps of each image."""
        require_signed(inputs)
        return [self.segmenter.features.maps((image + 1) / 2).maps for image in inputs]

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Tensor]:
        raise ValueError("a FittedSegmentor is trained already: train PixelEnsembleHead, or fit a segmenter anew")


class LabelledDataset(Dataset[tuple[Tensor, Tensor]]):
    """A data set of mmseg as images and masks that our training takes: see :func:`labelled`.

    Sample i, drawn anew by the pipeline whenever it is asked for, is an image, RGB, uint8 (3, H, W), or float32 in 0..1
    where the pipeline gives floats, and its mask, int64 (H, W), 0..K-1 or 255.
    """

    def __init__(self, dataset: Any, channel_order: Literal["bgr", "rgb"]) -> None:
        if not (classes := dataset.metainfo.get("classes")):
            raise ValueError("the data set does not name its classes: give it metainfo=dict(classes=[...])")
        self.dataset, self.channel_order, self.classes = dataset, channel_order, list(classes)

    @property
    def names(self) -> list[str]:
        """Paths of the images."""
        return [str(self.dataset.get_data_info(index)["img_path"]) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in range(len(self)):
            raise IndexError(index)
        drawn = self.dataset[index]
        image, sample = drawn.get("inputs"), drawn.get("data_samples")
        if not isinstance(image, Tensor) or "gt_sem_seg" not in (sample or {}):
            raise ValueError(
                "the data set's pipeline gives no image with a mask: it needs LoadAnnotations and PackSegInputs"
            )
        name = sample.get("img_path", f"sample {index}")
        mask = sample.gt_sem_seg.data[0].long()
        if image.shape[1:] != mask.shape:
            raise ValueError(
                f"the pipeline gives {name} the size {tuple(image.shape[1:])} and its mask {tuple(mask.shape)}: put"
                " LoadAnnotations before Resize, as pipelines for training have it"
            )
        return self._rgb(image, name), mask.masked_fill(mask == _ignored(self.dataset), IGNORE_INDEX)

    def _rgb(self, image: Tensor, name: str) -> Tensor:
        image = image.flip(0) if self.channel_order == "bgr" else image
        if image.dtype == torch.uint8:
            return image
        if float(image.min()) < 0 or float(image.max()) > 255:
            raise ValueError(f"the pipeline gives {name} pixels outside of 0 to 255: leave Normalize out of it")
        return image.float() / 255


def _ignored(dataset: Any) -> int:
    """The label that a data set ignores, or the first of those that it joins or repeats."""
    while not hasattr(dataset, "ignore_index"):
        within = [*getattr(dataset, "datasets", []), getattr(dataset, "dataset", None)]
        if within[0] is None:
            return IGNORE_INDEX
        dataset = within[0]
    return int(dataset.ignore_index)


def labelled(dataset: Mapping[str, Any] | Any, channel_order: Literal["bgr", "rgb"] = "bgr") -> LabelledDataset:
    """A data set of mmseg, or its configuration, as our training takes it: images and masks of one sequence.

    ``reduce_zero_label``, classes that are left out, crops and flips are what the data set and its pipeline say.

    Args:
        dataset: with a pipeline that ends in PackSegInputs; such as ``cfg.train_dataloader.dataset``.
        channel_order: of what the pipeline gives; LoadImageFromFile gives BGR by default.

    Raises:
        ValueError: it does not name its classes; when a sample is drawn: there is no mask, it is of another size than
            its image, or the image is normalised already.
    """
    if isinstance(dataset, Mapping):
        init_default_scope("mmseg")
        dataset = DATASETS.build(dataset)
    return LabelledDataset(dataset, channel_order)
