"""Scores by which images that are foreign to a generator can be told from those of its kind, and how well they do it.

The higher a score, the more foreign the image. All are functions of what is measured of each image, a row of it, and of
the rows of reference images of the generator's kind that it has not learned from.
"""

from dataclasses import dataclass

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

LEAST_REFERENCES = 8  # images in each half of the reference, for deviations to mean something


@dataclass(frozen=True)
class Measured:
    """What is measured of N images."""

    bits: Tensor  # (N,) bits per dimension
    coded: Tensor  # (N,) bits per dimension of a code without loss that knows nothing of their kind
    losses: Tensor  # (N, K) mean squared errors of the noise at K times

    def of(self, rows: Tensor) -> "Measured":
        """Of some of the images."""
        return Measured(self.bits[rows], self.coded[rows], self.losses[rows])


def foreignness(images: Measured, reference: Measured) -> dict[str, Tensor]:
    """Scores (N,) of images.

    ``likelihood`` is the bits per dimension themselves. They are known to fail: smooth images of any kind may have more
    likelihood than those that a generator learned from (arXiv 1810.09136). ``complexity`` takes from them the bits of
    a general code, so that what is left is what the generator does not know (arXiv 1909.11480). ``typicality`` is how
    far the bits are, either way, from the reference's mean, in its deviations (a test of typicality, arXiv 1906.02994,
    of single images). ``profile`` is the squared Mahalanobis distance of the logarithms of the losses from the
    reference's.
    """
    mean, deviation = reference.bits.mean(), reference.bits.std()
    return {
        "likelihood": images.bits,
        "complexity": images.bits - images.coded,
        "typicality": (images.bits - mean).abs() / deviation,
        "profile": _mahalanobis(images.losses.log(), reference.losses.log()),
    }


def _mahalanobis(rows: Tensor, reference: Tensor) -> Tensor:
    """Squared distances (N,) of rows from the mean of reference rows, by their covariance.

    It is shrunk to its diagonal as far as the rows are few for their columns, K of them: K / (K + rows).
    """
    covariance = reference.T.cov().reshape(reference.shape[1], -1)
    share = reference.shape[1] / (reference.shape[1] + len(reference))
    covariance = torch.lerp(covariance, covariance.diagonal().diag(), share)
    centred = rows - reference.mean(0)
    return (centred * torch.linalg.solve(covariance, centred.T).T).sum(1)


def cross_foreignness(
    images: Measured, reference: Measured, first_half: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores of images and of the reference's, each of which is scored by the half of the reference that lacks it.

    Those of the images are the means of both halves' scores.

    Args:
        first_half: (M,) bool, which of the M reference images are the first half.
    """
    of_halves = [(half, foreignness(images, reference.of(~half))) for half in (first_half, ~first_half)]
    own = {name: torch.zeros_like(reference.bits) for name in of_halves[0][1]}
    for half, _ in of_halves:
        for name, scores in foreignness(reference.of(half), reference.of(~half)).items():
            own[name][half] = scores
    mean = {name: torch.stack([scores[name] for _, scores in of_halves]).mean(0) for name in own}
    return mean, own


def auroc(foreign: Tensor, own: Tensor) -> float:
    """The probability that a foreign image has a higher score than an own one, equal ones counting half."""
    return float(mannwhitneyu(foreign.numpy(), own.numpy()).statistic) / (len(foreign) * len(own))
