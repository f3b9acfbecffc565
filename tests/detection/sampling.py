"""Prediction against a naive sampler, which shares the network alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffperception.detection import BoxSampler, DiffusionDet
from diffperception.detection.targets import image_sizes
from tests.parity import naive


def check_sampling(detector: DiffusionDet, images: list[Tensor], sampler: BoxSampler) -> None:
    """Images predicted together are as the naive sampler has each; the detector must not resize them."""
    seeds = list(range(5, 5 + len(images)))
    sizes = image_sizes(images)
    for image, size, seed, ours in zip(images, sizes, seeds, detector.predict(images, seeds, sampler), strict=True):
        theirs = naive.detect(
            denoiser(detector, image),
            size,
            seed,
            sampler.num_boxes,
            sampler.steps,
            sampler.eta,
            sampler.renewal_threshold,
            sampler.ensemble,
            sampler.nms_threshold,
        )
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=1e-2, rtol=0)


def denoiser(detector: DiffusionDet, image: Tensor) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """The last stage for one image."""
    pyramid = detector.encode([image]).pyramid

    @torch.no_grad()
    def denoise(boxes: Tensor, t: int) -> tuple[Tensor, Tensor]:
        output = detector.head(pyramid, boxes[None], torch.tensor([t]))
        return output.logits[-1, 0], output.boxes[-1, 0]

    return denoise


def middle_score(detector: DiffusionDet, image: Tensor, count: int) -> float:
    """What half of an even number of boxes surpass at the first step, so that renewal takes the others."""
    first = detector.sample(detector.encode([image]), [5], BoxSampler(1, count))[0]
    return float(first.output.logits.sigmoid().amax(-1).quantile(0.5))
