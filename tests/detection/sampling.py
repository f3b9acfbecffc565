"""Prediction against a naive sampler, which shares the network alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffperception.detection import DiffusionDet, SamplerOptions
from diffperception.detection.detector import image_sizes
from tests.parity import naive


def check_sampling(detector: DiffusionDet, images: list[Tensor], options: SamplerOptions) -> None:
    """Images predicted together are as the naive sampler has each; the detector must not resize them."""
    seeds = list(range(5, 5 + len(images)))
    sizes = image_sizes(images, torch.device("cpu"))
    for image, size, seed, ours in zip(
        images, sizes, seeds, detector.predict(images, seeds, options=options), strict=True
    ):
        theirs = naive.detect(
            denoiser(detector, image),
            size,
            seed,
            options.num_boxes,
            options.steps,
            options.eta,
            options.renewal_threshold,
            options.ensemble,
            options.nms_threshold,
        )
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=1e-2, rtol=0)


def denoiser(detector: DiffusionDet, image: Tensor) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """The last stage for one image."""
    pyramid = detector.encode([image]).pyramid

    @torch.no_grad()
    def denoise(boxes: Tensor, t: int) -> tuple[Tensor, Tensor]:
        logits, refined = detector.head(pyramid, boxes[None], torch.tensor([t]))
        return logits[-1, 0], refined[-1, 0]

    return denoise


def middle_score(detector: DiffusionDet, image: Tensor, count: int) -> float:
    """What half of an even number of boxes surpass at the first step, so that renewal takes the others."""
    first = detector._sample([image], [5], SamplerOptions(1, count))[0]
    return float(first.logits.sigmoid().amax(-1).quantile(0.5))
