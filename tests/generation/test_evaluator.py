"""Scores of generated images against known answers, plain loops and torchmetrics."""

import pytest
import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from diffperception.generation.evaluator import (
    DISTANCE_ROWS,
    frechet_distance,
    kernel_distance,
    precision_recall,
)


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(rows: int, mean: Tensor, root: Tensor, seed: int) -> Tensor:
    """Rows whose sample mean is `mean` and whose sample covariance is root @ root.T, both exactly."""
    white = normal(rows, len(mean), seed)
    white = white - white.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(white.T.cov()), white.T, upper=False).T
    return white @ root.T + mean


def test_frechet_distance_of_gaussians_with_one_basis() -> None:
    """There it is |mu - nu|^2 + sum (s - t)^2 of the deviations s and t along the shared axes."""
    basis = torch.linalg.qr(normal(4, 4)).Q
    s, t = torch.tensor([1.0, 2, 3, 0.5]).double(), torch.tensor([2.0, 2, 0.1, 0]).double()
    mean = torch.tensor([3.0, -1, 0, 2]).double()
    a, b = gaussian(40, 0 * mean, basis * s, 1), gaussian(70, mean, basis * t, 2)
    expected = mean.square().sum() + (s - t).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_of_gaussians_in_two_dimensions() -> None:
    """tr (A B)^(1/2) of 2 x 2 matrices is (tr A B + 2 (det A B)^(1/2))^(1/2), whatever their axes."""
    roots = torch.tensor([[2.0, 0], [1, 1]]).double(), torch.tensor([[1.0, -0.5], [0.3, 2]]).double()
    a, b = (root @ root.T for root in roots)
    expected = (a + b).trace() - 2 * ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    rows = [gaussian(30, torch.zeros(2).double(), root, seed) for seed, root in enumerate(roots)]
    assert frechet_distance(*rows) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_agrees_with_torchmetrics() -> None:
    class Rows(torch.nn.Module):
        """An image is its own row of features."""

        num_features = 8

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    real, fake = normal(60, 8), 0.3 + normal(50, 8, seed=1) @ normal(8, 8, seed=2)
    metric = FrechetInceptionDistance(Rows(), normalize=True, input_img_size=(1, 8, 1)).set_dtype(torch.float64)
    metric.update(real.view(-1, 1, 8, 1), real=True)
    metric.update(fake.view(-1, 1, 8, 1), real=False)
    assert frechet_distance(real, fake) == pytest.approx(metric.compute().item(), rel=1e-6)


def test_frechet_distance_with_fewer_images_than_features() -> None:
    """Covariances without full rank: nothing between a set and itself, and no root to lose between orthogonal sets."""
    a, b = normal(10, 64), normal(7, 64, seed=1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    a[:, 32:], b[:, :32] = 0, 0
    apart = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    assert frechet_distance(a, b) == pytest.approx(apart.item())


def test_kernel_distance_is_the_double_sum() -> None:
    """With subsets that are whole sets: Binkowski et al., equation 4."""
    x, y = normal(6, 5), 0.5 + normal(6, 5, seed=1)

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 5 + 1) ** 3

    expected = 0.0
    for i in range(6):
        for j in range(6):
            expected += (k(x[i], x[j]) + k(y[i], y[j])) / 30 if i != j else 0
            expected -= 2 * k(x[i], y[j]) / 36
    mean, deviation = kernel_distance(x, y, subsets=3, subset_size=6)
    assert mean == pytest.approx(expected)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased() -> None:
    """Many independent pairs of few images of one distribution: zero on average, and below as often as not."""
    values = torch.tensor([kernel_distance(normal(8, 3, i), normal(8, 3, 1000 + i), 1, 8)[0] for i in range(400)])
    assert abs(values.mean()) < 3 * values.std() / 400**0.5
    assert 0.3 < (values < 0).double().mean() < 0.8
    shifted = torch.tensor([kernel_distance(normal(8, 3, i), 1 + normal(8, 3, 1000 + i), 1, 8)[0] for i in range(400)])
    assert shifted.mean() > values.mean() + 10 * shifted.std() / 400**0.5


def test_kernel_distance_follows_its_generator() -> None:
    x, y = normal(30, 4), normal(20, 4, seed=1)
    one, same, other = (kernel_distance(x, y, 5, 10, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert one == same
    assert one != other
    assert one[1] > 0


def test_precision_and_recall_of_the_same_set_and_of_distant_ones() -> None:
    rows = normal(50, 6)
    assert precision_recall(rows, rows) == (1, 1)
    assert precision_recall(rows, rows + 100) == (0, 0)


def test_samples_of_one_mode_are_precise_and_lack_the_other() -> None:
    """Real images in two distant clusters, three to one; the samples are those of the larger, hardly changed."""
    larger, smaller = normal(300, 5), 100 + normal(100, 5, seed=1)
    samples = larger + 1e-6 * normal(300, 5, seed=2)
    assert precision_recall(torch.cat([larger, smaller]), samples) == (1, 0.75)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_the_loops_of_the_paper(k: int) -> None:
    """Kynkaanniemi et al., equations 1 and 2; more rows than are held at once, and far from the origin."""
    real, fake = 50 + normal(DISTANCE_ROWS + 30, 3), 50.4 + normal(90, 3, seed=1)

    def share_within(points: Tensor, support: Tensor) -> float:
        radii = [(support - row).norm(dim=1).sort().values[k] for row in support]
        inside = [
            any(distance <= r for distance, r in zip((support - p).norm(dim=1), radii, strict=True)) for p in points
        ]
        return sum(inside) / len(inside)

    assert precision_recall(real, fake, k) == pytest.approx((share_within(fake, real), share_within(real, fake)))


def test_scores_worsen_the_right_way() -> None:
    """More shift is farther by every distance."""
    real = normal(200, 4)
    near, far = (shift + 0.5 * normal(200, 4, seed=1) for shift in (0.1, 1.5))
    assert frechet_distance(real, near) < frechet_distance(real, far)
    assert kernel_distance(real, near, 20, 100)[0] < kernel_distance(real, far, 20, 100)[0]
    precision, recall = precision_recall(real, near)
    assert precision > precision_recall(real, far)[0]
    assert precision > recall  # half as wide as the real ones


@pytest.mark.parametrize(
    ("real", "fake", "part"),
    [
        (normal(9, 3), normal(9, 4), "of one D"),
        (normal(9, 3), normal(3, 3), "9 real ones and 3 samples"),
        (normal(9, 3), normal(9, 3) / 0, "not finite"),
    ],
)
def test_features_that_do_not_go_together(real: Tensor, fake: Tensor, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        precision_recall(real, fake)


def test_subsets_larger_than_the_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="10 images"):
        kernel_distance(normal(9, 3), normal(20, 3), subset_size=10)
    with pytest.raises(ValueError, match="subset of 2"):
        kernel_distance(normal(9, 3), normal(20, 3), subset_size=1)


def test_the_deviation_is_that_of_the_subsets() -> None:
    real, fake = normal(30, 4), normal(30, 4, seed=1)
    each = torch.Generator().manual_seed(0)
    values = torch.tensor([kernel_distance(real, fake, 1, 8, each)[0] for _ in range(6)])
    mean, deviation = kernel_distance(real, fake, 6, 8, torch.Generator().manual_seed(0))
    assert mean == pytest.approx(values.mean().item(), rel=1e-5)
    assert deviation == pytest.approx(values.std(correction=0).item(), rel=1e-5)


def test_a_row_at_the_very_reach_of_another_lies_within() -> None:
    real, fake = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[4.0], [6]])
    assert precision_recall(real, fake, k=1) == (0.5, 0.5)  # 4 reaches to 2, and 6 to 4
