"""The ensemble of pixel classifiers as a decode head of mmsegmentation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor

from diffperception.data.masks import IGNORE_INDEX
from diffperception.segmentation import FeatureMaps, PixelEnsemble
from diffperception.segmentation.maps import covered


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
            reached = [*self.ensemble.parameters(), *self._transform_inputs(inputs)]
            return {"loss_ce": 0 * sum(tensor.sum() for tensor in reached)}  # DDP waits for every parameter's gradient
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
