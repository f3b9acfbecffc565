from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from diffperception.data import SeededSamples, StepBatchSampler, collate
from diffperception.data.batches import images_per_class, repeat_factors


class Noise(Dataset):
    """Sample i is (i, a random number)."""

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, float(torch.rand(()))


def load(sampler: StepBatchSampler, workers: int) -> list:
    return list(DataLoader(SeededSamples(Noise()), batch_sampler=sampler, num_workers=workers, collate_fn=list))


def indices(sampler: StepBatchSampler) -> list[int]:
    return [index for batch in sampler for index, _ in batch]


def test_resuming_at_any_step_continues_the_same_batches():
    whole = list(StepBatchSampler(10, batch_size=4, total_steps=9, seed=3))
    for start in range(10):
        rest = StepBatchSampler(10, batch_size=4, total_steps=9, seed=3, start_step=start)
        assert len(rest) == 9 - start
        assert list(rest) == whole[start:]


def test_splitting_over_processes_changes_nothing_but_who_sees_what():
    alone = StepBatchSampler(23, batch_size=6, total_steps=12)
    ranks = [StepBatchSampler(23, batch_size=2, total_steps=12, rank=rank, world_size=3) for rank in range(3)]
    for step, batch in enumerate(alone):
        assert [sample for rank in ranks for sample in rank.batch(step)] == batch


def test_an_epoch_sees_every_sample_once_and_the_next_in_another_order():
    seen = indices(StepBatchSampler(12, batch_size=4, total_steps=6, seed=1))
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]
    assert seen != indices(StepBatchSampler(12, batch_size=4, total_steps=6, seed=2))


def test_seeds_of_samples_differ_from_step_to_step():
    seeds = [seed for batch in StepBatchSampler(5, batch_size=5, total_steps=200) for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_weights_are_met_on_average_and_rounded_within_an_epoch():
    weights = [1.0, 2.5, 0.0, 1.2, 1.3]  # sum 6: epochs of 6
    sampler = StepBatchSampler(weights, batch_size=6, total_steps=600)
    epochs = [Counter(index for index, _ in batch) for batch in sampler]
    counts = np.array([[epoch[k] for k in range(5)] for epoch in epochs])
    assert (counts >= np.floor(weights)).all()
    assert (counts <= np.ceil(weights)).all()
    np.testing.assert_allclose(counts.mean(axis=0), weights, atol=0.1)


def test_batch_larger_than_the_data_set_is_filled_with_the_next_epochs():
    (batch,) = StepBatchSampler(3, batch_size=7, total_steps=1)
    assert sorted(Counter(index for index, _ in batch).values()) == [2, 2, 3]


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StepBatchSampler(0, batch_size=2, total_steps=1)
    with pytest.raises(ValueError, match="positive"):
        StepBatchSampler([0.0, 0.0], batch_size=2, total_steps=1)


def test_random_draws_depend_neither_on_workers_nor_on_what_was_drawn_before():
    expected = load(StepBatchSampler(8, batch_size=3, total_steps=4), workers=0)
    torch.rand(17)
    assert load(StepBatchSampler(8, batch_size=3, total_steps=4), workers=2) == expected
    assert load(StepBatchSampler(8, batch_size=3, total_steps=4, start_step=2), workers=1) == expected[2:]
    assert len({draw for batch in expected for _, draw in batch}) == 12


def test_a_seeded_sample_leaves_the_callers_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    SeededSamples(Noise())[0, 123]
    assert torch.equal(torch.rand(3), expected)


def test_collate_keeps_images_of_different_sizes():
    samples = [(torch.zeros(3, 4, 5), {"image_id": 1}), (torch.ones(3, 6, 2), {"image_id": 2})]
    images, targets = collate(samples)
    assert [image.shape for image in images] == [(3, 4, 5), (3, 6, 2)]
    assert targets == [{"image_id": 1}, {"image_id": 2}]


def test_repeat_factors_by_hand():
    # Of 8 images class 0 is in 4, class 1 in 2 and class 2 in 1, though twice in that one; class 3 is in none.
    labels = [np.array(of_image, dtype=np.int64) for of_image in ([0], [0, 1], [1], [0, 2, 2], [0], [], [], [])]
    assert images_per_class(labels, 4).tolist() == [4, 2, 1, 0]
    # sqrt(0.5 / (4/8)) = 1, sqrt(0.5 / (2/8)) = sqrt 2, sqrt(0.5 / (1/8)) = 2; the largest in an image counts.
    expected = [1, 2**0.5, 2**0.5, 2, 1, 1, 1, 1]
    np.testing.assert_allclose(repeat_factors(labels, 4, threshold=0.5), expected)
    np.testing.assert_array_equal(repeat_factors(labels, 4, threshold=0.125), np.ones(8))


def test_images_are_repeated_as_their_factors_say():
    factors = repeat_factors([np.array([k]) for k in (0, 0, 0, 0, 0, 0, 0, 1)], 2, threshold=0.5)  # 7 times 1, once 2
    seen = Counter(indices(StepBatchSampler(factors, batch_size=9, total_steps=20)))
    assert seen == {**dict.fromkeys(range(7), 20), 7: 40}
