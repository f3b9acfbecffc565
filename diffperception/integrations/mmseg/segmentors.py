"""Segmentors of mmsegmentation: one that fits its heads to our backbones, and ours, trained by us, as one."""

import inspect
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.models import BaseSegmentor, EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor, nn

from diffperception.integrations.mmseg.backbones import (
    DiffusionPyramid,
    FrozenBackbone,
    require_normalisation,
    require_signed,
)
from diffperception.segmentation import PixelSegmenter
from diffperception.visualization.draw import class_color

OURS = (FrozenBackbone, DiffusionPyramid)


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
        if isinstance(self.backbone, OURS):
            require_normalisation(self.data_preprocessor)

    def _init_decode_head(self, decode_head: Mapping[str, Any]) -> None:
        told = self._told(decode_head, "decode_head")
        with _named(told, "decode_head"):
            super()._init_decode_head(told)

    def _init_auxiliary_head(self, auxiliary_head: Any) -> None:
        if isinstance(auxiliary_head, list | tuple):
            told: Any = [self._told(head, "auxiliary_head") for head in auxiliary_head]
        else:
            told = self._told(auxiliary_head, "auxiliary_head") if auxiliary_head else None
        with _named(told, "auxiliary_head"):
            super()._init_auxiliary_head(told)

    def _told(self, head: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A head's configuration with what the backbone knows of the maps that it takes."""
        if not isinstance(head, Mapping):
            raise ValueError(f"{name} is a {type(head).__name__}, but must be the configuration of one head")
        head = dict(head)
        if not isinstance(self.backbone, OURS):
            return head
        if self.with_neck:
            return self._beyond_the_neck(head, name)
        kind = MODELS.get(head["type"]) if isinstance(head.get("type"), str) else head.get("type")
        takes_strides = kind is not None and "strides" in inspect.signature(kind).parameters
        channels, strides = self.backbone.channels, self.backbone.strides
        index = head.get("in_index")
        if index is None:
            index = "all" if takes_strides else -1
        index = list(range(len(channels))) if index == "all" else index
        chosen = [index] if isinstance(index, int) else list(index)
        if any(i not in range(-len(channels), len(channels)) for i in chosen):
            raise ValueError(f"{name}.in_index is {index}, but the backbone gives {len(channels)} maps")
        index = chosen if takes_strides else index
        known = {"in_channels": channels, **({"strides": strides} if takes_strides else {})}
        for key, values in known.items():
            found = [values[i] for i in chosen]
            wanted = found[0] if isinstance(index, int) else found
            given = head.get(key)
            if given is not None and (list(given) if isinstance(given, tuple) else given) != wanted:
                raise ValueError(f"{name}.{key} is {given}, but the backbone gives {wanted}: set that, or leave it out")
            head[key] = wanted
        return head | {"in_index": index}

    def _beyond_the_neck(self, head: dict[str, Any], name: str) -> dict[str, Any]:
        """A head's configuration as it is; ValueError if it, or the neck, lacks what must be said."""
        channels, taken = self.backbone.channels, getattr(self.neck, "in_channels", None)
        if isinstance(taken, list | tuple) and list(taken) != channels:
            raise ValueError(f"neck.in_channels is {taken}, but the backbone gives {channels}: set that")
        if "in_channels" not in head or head.get("in_index") == "all":
            raise ValueError(f"{name} takes what the neck gives: say in its in_channels and in_index what that is")
        return head


@contextmanager
def _named(head: Any, name: str) -> Iterator[None]:
    """ValueError with a sentence for the bare assertions by which heads of mmseg refuse one map, or several."""
    try:
        yield
    except AssertionError as error:
        check = traceback.extract_tb(error.__traceback__)[-1].line
        indices = [one.get("in_index") for one in (head if isinstance(head, list) else [head])]
        raise ValueError(
            f"{name} fails its check `{check}` with in_index {indices[0] if len(indices) == 1 else indices}: heads of"
            ' several maps take in_index="all" or a list, FCNHead and its like with input_transform="resize_concat";'
            " others take one number"
        ) from error


@MODELS.register_module()
class FittedSegmentor(BaseSegmentor):
    """A trained :class:`PixelSegmenter` in mmseg, for its test loop, metrics, `inference_model` and visualizers.

    Its "logits" are the members' shares of votes, so that labels are those of `diffperception predict`.

    Args:
        segmenter: the file, or the model.
        train_cfg, test_cfg, pretrained: are not read; mmseg's `init_model` and configurations set them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds another model, or ``data_preprocessor`` normalises to something else than -1..1.
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
        require_normalisation(self.data_preprocessor)
        self.segmenter = segmenter if isinstance(segmenter, PixelSegmenter) else PixelSegmenter.load(segmenter)
        self.segmenter.eval().requires_grad_(False)
        classes = self.segmenter.classes
        self.out_channels = len(classes)  # what SegTTAModel asks for
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
