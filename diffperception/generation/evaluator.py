"""How close generated images are to real ones, from their features: FID, KID, precision and recall.

All functions take two matrices of features, one row an image, (N, D) and (M, D), and compute in float64. They raise
ValueError where the matrices do not go together or hold too few rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 512  # rows of a matrix of distances that are held at once


@dataclass(frozen=True)
class ImageScores:
    """What `compare` found; lower is better for the distances, higher (up to 1) for precision and recall."""

    fid: float
    kid: float
    kid_std: float
    precision: float
    recall: float


def compare(
    real: Tensor,
    fake: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    k: int = 3,
    generator: torch.Generator | None = None,
) -> ImageScores:
    """All scores of `fake` (M, D) against `real` (N, D); the arguments are those of the functions below."""
    kid, kid_std = kernel_distance(real, fake, subsets, subset_size, generator)
    precision, recall = precision_recall(real, fake, k)
    return ImageScores(frechet_distance(real, fake), kid, kid_std, precision, recall)


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """The Frechet distance between the Gaussians of the two sets' means and covariances (FID, arXiv 1706.08500).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)). With A = R^T R and B = S^T S, the eigenvalues of A B are the squares of
    the singular values of R S^T, so that neither a product of covariances nor its root is ever formed: covariances
    without full rank, as of fewer images than features, lose no digits.

    It is biased upwards, the more so the fewer images there are: compare figures of equal numbers of images only.
    """
    real, fake = _pair(real, fake, least=2)
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    r, s = _covariance_factor(real), _covariance_factor(fake)
    distance = shift + r.square().sum() + s.square().sum() - 2 * torch.linalg.svdvals(r @ s.T).sum()
    return distance.clamp(min=0).item()


def kernel_distance(
    real: Tensor,
    fake: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """The squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (KID, arXiv 1801.01401).

    Unbiased: its mean is zero for equal distributions, however few the images are, and it may fall below.

    Args:
        subsets: how often it is measured.
        subset_size: rows drawn, without replacement, from either set each time.
        generator: of these draws, on the CPU; torch's global one by default.

    Returns: mean and standard deviation over the subsets.
    """
    real, fake = _pair(real, fake, least=max(2, subset_size))
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"KID needs 1 subset of 2 rows at least: subsets is {subsets}, subset_size {subset_size}")

    def draw(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:subset_size].to(rows.device)]

    values = torch.stack([_squared_discrepancy(draw(real), draw(fake)) for _ in range(subsets)])
    return values.mean().item(), values.std(correction=0).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Which share of `fake` lies among `real`, and which share of `real` among `fake` (arXiv 1904.06991).

    A row lies among the others if it is, for any one of them, no farther away than that one's k-th nearest neighbour in
    its own set. Precision tells how real the samples are, recall how much of the real variety they have.
    """
    real, fake = _pair(real, fake, least=k + 1)
    centre = real.mean(0)  # distances are taken from products, which lose digits far from the origin
    real, fake = real - centre, fake - centre
    return _share_within(fake, real, k), _share_within(real, fake, k)


def _pair(real: Tensor, fake: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features are (N, D) and (M, D) of one D, not {tuple(real.shape)} and {tuple(fake.shape)}")
    if min(len(real), len(fake)) < least:
        raise ValueError(f"this needs {least} images of either kind, not {len(real)} real ones and {len(fake)} samples")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("some features are not finite: take another feature network")
    return real.double(), fake.double()


def _covariance_factor(rows: Tensor) -> Tensor:
    """R (min(N, D), D) with R^T R the unbiased covariance of the rows (N, D)."""
    centred = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R


def _squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of the squared discrepancy of two sets of m rows."""
    pairs = len(x) * (len(x) - 1)
    k_x, k_y = _kernel(x, x), _kernel(y, y)
    return (k_x.sum() - k_x.trace() + k_y.sum() - k_y.trace()) / pairs - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _share_within(points: Tensor, support: Tensor, k: int) -> float:
    """The share of `points` inside the balls around `support` that reach to the k-th nearest other of `support`."""
    # The nearest is the point itself.
    radii = torch.cat([torch.cdist(rows, support).kthvalue(k + 1).values for rows in support.split(CHUNK)])
    inside = torch.cat([(torch.cdist(rows, support) <= radii).any(1) for rows in points.split(CHUNK)])
    return inside.double().mean().item()
