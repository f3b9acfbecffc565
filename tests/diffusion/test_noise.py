"""Noise that is spread evenly: standard normal in every axis, and without the gaps of independent draws."""

import torch

from diffperception.diffusion import SampleNoise, spread_noise


def test_every_axis_is_standard_normal_with_as_many_points_in_every_part() -> None:
    points = spread_noise([3], 256, 4)[0]
    for axis in points.T:
        shares = torch.special.ndtr(axis.double())
        # of a Sobol net of 2^8 points every one of 256 equal parts has one; of independent draws 94 would have none
        assert (shares * 256).long().sort().values.tolist() == list(range(256))


def test_the_plane_has_fewer_holes() -> None:
    def holes(points: torch.Tensor) -> int:
        """Of 16 x 16 parts of equal probability, those without a point."""
        part = (torch.special.ndtr(points[:, :2].double()) * 16).long()
        return 256 - len(part.unique(dim=0))

    seeds = range(5)
    spread = sum(holes(points) for points in spread_noise(list(seeds), 256, 4))
    assert spread < 0.5 * sum(holes(points) for points in SampleNoise(list(seeds))(torch.empty(5, 256, 4)))


def test_it_is_a_function_of_the_seed_of_each_sample() -> None:
    both = spread_noise([1, 2**62], 40, 4)
    assert torch.equal(both[1:], spread_noise([2**62], 40, 4))
    assert not torch.equal(both[0], both[1])
    assert both.isfinite().all()
