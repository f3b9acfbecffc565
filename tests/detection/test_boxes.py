import math

import pytest
import torch
from torchvision.ops import generalized_box_iou

from diffperception.detection.boxes import apply_deltas, clamp_min_size, decode_boxes, encode_boxes, paired_giou
from tests.detection.scenes import random_boxes

SIZES = torch.tensor([[200.0, 100.0, 200.0, 100.0], [64.0, 96.0, 64.0, 96.0]])


def test_the_whole_image_is_the_known_point_of_diffusion_space():
    whole = torch.stack([torch.zeros(2, 2), SIZES[:, 2:]], 1).reshape(2, 1, 4)
    expected = torch.tensor([0.0, 0.0, 2.0, 2.0]).expand(2, 1, 4)
    assert torch.equal(encode_boxes(whole, SIZES, scale=2.0), expected)


def test_decoding_inverts_encoding():
    boxes = torch.stack([random_boxes(20, *size[:2].tolist()) for size in SIZES])
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, SIZES, 2.0), SIZES, 2.0), boxes)


def test_decoding_clamps_to_the_signal_scale():
    z = torch.tensor([[[9.0, -9.0, 9.0, 9.0]]])
    assert decode_boxes(z, SIZES[:1], 2.0).tolist() == [[[100.0, -50.0, 300.0, 50.0]]]


def test_boxes_without_area_get_some_and_others_stay():
    boxes = torch.tensor([[5.0, 5.0, 5.0, 9.0], [1.0, 2.0, 30.0, 40.0]])
    widened = clamp_min_size(boxes)
    assert widened.tolist() == [[4.5, 5.0, 5.5, 9.0], [1.0, 2.0, 30.0, 40.0]]


def test_no_deltas_change_nothing():
    boxes = random_boxes(10, 100, 100)
    torch.testing.assert_close(apply_deltas(torch.zeros(10, 4), boxes), boxes)


def test_deltas_move_in_half_widths_and_scale_by_the_exponential():
    refined = apply_deltas(torch.tensor([1.0, -2.0, 0.0, math.log(2)]), torch.tensor([0.0, 0.0, 10.0, 20.0]))
    torch.testing.assert_close(refined, torch.tensor([5.0, -30.0, 15.0, 10.0]))


def test_growth_is_bounded():
    refined = apply_deltas(torch.tensor([0.0, 0.0, 1e9, 0.0]), torch.tensor([0.0, 0.0, 16.0, 16.0]))
    assert refined[2] - refined[0] == pytest.approx(100_000, rel=1e-5)


def test_giou_agrees_with_torchvision():
    a, b = random_boxes(7, 50, 50), random_boxes(9, 50, 50)
    torch.testing.assert_close(paired_giou(a[:, None], b[None])[1], generalized_box_iou(a, b))
