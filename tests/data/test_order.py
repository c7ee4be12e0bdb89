from __future__ import annotations

from collections import Counter
from itertools import permutations
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import Order, default_block, permute, permute_many, unpermute
from trainer.randomness import key

small = st.integers(1, 90)


@given(n=st.integers(1, 400), k=st.integers(0, 2**63 - 1))
def test_permute_is_a_permutation_and_unpermute_its_inverse(n: int, k: int) -> None:
    image = [permute(i, n, k) for i in range(n)]
    assert sorted(image) == list(range(n))
    assert [unpermute(j, n, k) for j in image] == list(range(n))


@given(n=st.integers(1, 2**70), data=st.data())
def test_permute_of_large_ranges_can_be_undone(n: int, data: st.DataObject) -> None:
    i, k = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, 2**63 - 1))
    assert 0 <= permute(i, n, k) < n
    assert unpermute(permute(i, n, k), n, k) == i


def test_permute_is_frozen() -> None:
    """A stored run depends on these values: if they must change, so must the name ORDER."""
    assert [permute(i, 10, 7) for i in range(10)] == [7, 4, 1, 3, 8, 0, 9, 6, 2, 5]
    assert [permute(i, 10**12, 2**62 + 1) for i in (0, 1, 10**12 - 1)] == [
        38977205197,
        440872465855,
        76986239609,
    ]


def test_permutations_are_even_for_small_ranges() -> None:
    for n in (2, 3, 4):
        draws = 200 * factorial(n)
        counts = Counter(tuple(permute(i, n, key(n, draw)) for i in range(n)) for draw in range(draws))
        assert set(counts) == set(permutations(range(n)))
        chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
        assert chi_square < 3 * factorial(n) + 8  # mean n! - 1; far beyond its 0.999 quantile


def test_neighbours_do_not_stay_together() -> None:
    kept = sum(
        permute(i + 1, 64, key(draw)) - permute(i, 64, key(draw)) in (1, -1) for draw in range(300) for i in range(63)
    )
    assert 500 < kept < 700  # by chance 2 of 64, so 300 * 63 / 32 = 591


@settings(max_examples=150, deadline=None)
@given(n=small, lanes=small, window=st.integers(1, 6), block=st.integers(1, 20), seed=st.integers(0, 99))
def test_every_epoch_is_a_permutation(n: int, lanes: int, window: int, block: int, seed: int) -> None:
    order = Order(n, lanes, window, block, seed)
    assert order.lanes == min(n, lanes)
    sizes = [order.lane_size(lane) for lane in range(order.lanes)]
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1
    for epoch in (0, 1, 7):
        dealt = [order.sample(epoch, lane, i) for lane, size in enumerate(sizes) for i in range(size)]
        assert sorted(dealt) == list(range(n))


@settings(max_examples=150, deadline=None)
@given(n=small, lanes=small, window=st.integers(1, 6), block=st.integers(1, 20))
def test_first_positions_are_each_sample_once_and_so_are_the_next(n: int, lanes: int, window: int, block: int) -> None:
    order = Order(n, lanes, window, block, seed=3)
    for epoch in (0, 1, 2):
        places = [order.at(position) for position in range(epoch * n, (epoch + 1) * n)]
        assert {place[0] for place in places} == {epoch}
        assert sorted(order.sample(*place) for place in places) == list(range(n))
        for lane in range(order.lanes):  # each lane is read in its own order, without a gap
            assert [i for _, lane_, i in places if lane_ == lane] == list(range(order.lane_size(lane)))


def test_blocks_stay_together_and_windows_mix_them() -> None:
    """By construction from the definition: a window of a lane holds exactly `window` whole blocks."""
    order = Order(samples=4 * 6 * 5, lanes=4, window=3, block=5, seed=1)
    for lane in range(4):
        for start in (0, 15):
            window = [order.sample(2, lane, index) for index in range(start, start + 15)]
            blocks = {v // 5 for v in window}
            assert sorted(window) == sorted(block * 5 + i for block in blocks for i in range(5))
            assert len(blocks) == 3
            assert [v // 5 for v in window] != sorted(v // 5 for v in window)


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = Order(500, 8, 4, 3, seed)
        return [order.sample(*order.at(number * 500 + i)) for i in range(500)]

    orders = [epoch(0, 0), epoch(0, 1), epoch(0, 2), epoch(1, 0)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert epoch(0, 1) == orders[1]
    one_block = Order(20, 1, 1, 20, seed=0)
    assert len({tuple(one_block.sample(epoch, 0, i) for i in range(20)) for epoch in range(50)}) == 50


def test_huge_order_takes_no_tables() -> None:
    order = Order(10**13 + 7, 4096, 16, 1000, seed=5)
    places = [order.at(p) for p in (0, 10**13, 10**13 + 6, 3 * 10**14)]
    assert all(0 <= order.sample(*place) < 10**13 + 7 for place in places)


def test_short_block_lands_anywhere() -> None:
    """With one lane and windows of one block, the row is seen block by block."""
    seen = set()
    for epoch in range(60):
        order = Order(samples=11, lanes=1, window=1, block=11, seed=0)
        assert sorted(order.sample(epoch, 0, i) for i in range(11)) == list(range(11))
        order = Order(samples=11, lanes=11, window=1, block=4, seed=0)
        row = [order.sample(epoch, lane, 0) for lane in range(11)]
        assert row.index(9) == row.index(8) + 1 == row.index(10) - 1
        seen.add(row.index(8))
    assert seen == {0, 4, 8}


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="samples=0"):
        Order(0, 1, 1, 1, 0)
    with pytest.raises(IndexError, match="lane 0 has 3 samples"):
        Order(6, 2, 1, 1, 0).sample(0, 0, 3)


@pytest.mark.parametrize(
    ("samples", "total_bytes", "lanes", "expected"),
    [
        (10**6, 10**6 * 2**20, 48, 4),  # 1 MiB each: 4 of them
        (10**6, 10**6 * 2**24, 48, 1),  # larger than a block
        (10**6, 10**9, 48, 4194),
        (900, 5 * 10**6, 48, 4),  # 4 blocks a lane, not 4 MiB
        (10, 1000, 48, 1),
        (10, 0, 1, 2),  # empty samples
        (1, 5, 1, 1),
    ],
)
def test_default_block(samples: int, total_bytes: int, lanes: int, expected: int) -> None:
    assert default_block(samples, total_bytes, lanes) == expected


@given(n=st.integers(1, 2**62), k=st.integers(0, 2**63 - 1), data=st.data())
def test_permute_many_is_permute(n: int, k: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, n - 1), max_size=20))
    expected = [permute(i, n, k) for i in numbers]
    assert permute_many(np.array(numbers, dtype=np.int64), n, k).tolist() == expected


@settings(max_examples=150, deadline=None)
@given(n=small, lanes=small, window=st.integers(1, 6), block=st.integers(1, 20), epoch=st.integers(0, 3))
def test_windows_are_the_samples_one_by_one(n: int, lanes: int, window: int, block: int, epoch: int) -> None:
    order = Order(n, lanes, window, block, seed=5)
    for lane in range(order.lanes):
        size, length = order.lane_size(lane), window * block
        windows = [order.window_samples(epoch, lane, number) for number in range(-(-size // length))]
        assert np.concatenate(windows).tolist() == [order.sample(epoch, lane, i) for i in range(size)]
        with pytest.raises(IndexError):
            order.window_samples(epoch, lane, len(windows))


def test_windows_of_a_set_of_a_trillion_samples() -> None:
    order = Order(10**12, lanes=4096, window=8, block=64, seed=1)
    epoch, lane, index = order.at(10**9)
    window = order.window_samples(epoch, lane, index // 512)
    assert window[index % 512] == order.sample(epoch, lane, index)
    assert len(window) == 512
