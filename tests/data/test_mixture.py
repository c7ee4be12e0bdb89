from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batch_sizes import Batches
from trainer.data.mixture import LONGEST_CYCLE, Mixture, cycle, deal

WEIGHTS = st.lists(
    st.one_of(st.integers(0, 40), st.sampled_from([0.1, 0.25, 0.7, 1.5])), min_size=1, max_size=7
).filter(any)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(weights=WEIGHTS)
def test_every_start_of_a_run_holds_each_source_by_its_share_within_one(weights: list[float]) -> None:
    row, total = deal(cycle(weights)), sum(Fraction(str(weight)) for weight in weights)
    for source, weight in enumerate(weights):
        had = np.cumsum(row == source)
        share = Fraction(str(weight)) / total
        assert all(abs(int(had[k - 1]) - k * share) < 1 for k in range(1, len(row) + 1))
        assert had[-1] == len(row) * share  # a whole cycle is exact


@settings(max_examples=200, deadline=None)
@given(
    stretches=st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)), min_size=1
    ),
    seeks=st.lists(st.integers(0, 400), max_size=5),
)
def test_each_source_is_numbered_without_a_gap_across_changes_of_weight(
    stretches: list[tuple[int, int, int, int]], seeks: list[int]
) -> None:
    schedule, start = [], 0
    for length, *weights in stretches:
        schedule.append((start, weights))
        start += length
    mixture, counters = Mixture(schedule), [0, 0, 0]
    positions = np.arange(start + 50)
    sources, numbers = mixture.at(positions)
    for position, (source, number) in enumerate(zip(sources.tolist(), numbers.tolist(), strict=True)):
        assert mixture.counts_before(position) == counters
        assert number == counters[source]
        assert next(w for s, w in reversed(schedule) if s <= position)[source] > 0
        counters[source] += 1
    for seek in seeks:  # any place, without what lies before it
        if seek < len(positions):
            source, number = mixture.at(positions[seek : seek + 1])
            assert (source[0], number[0]) == (sources[seek], numbers[seek])


def test_shares_that_need_too_long_a_cycle_are_rounded_and_far_positions_cost_nothing() -> None:
    counts = cycle([1 / 3, 2 / 3, 1e-3])
    assert sum(counts) == LONGEST_CYCLE
    assert counts[:2] == [5456, 10912]
    (source,), (number,) = Mixture([(0, [3, 1])]).at(np.array([10**15]))
    assert (source, number) == (0, 3 * 10**15 // 4)


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 2]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights are >= 0"):
        Mixture([(0, weights)])
    with pytest.raises(ValueError, match="begin at 0"):
        Mixture([(5, [1])])


@settings(max_examples=200, deadline=None)
@given(ramp=st.dictionaries(st.integers(1, 50), st.integers(1, 20), max_size=5), last=st.integers(1, 20))
def test_a_ramp_is_what_its_definition_says(ramp: dict[int, int], last: int) -> None:
    batches, taken = Batches(last, ramp), 0
    for done in range(60):
        size = next((ramp[until] for until in sorted(ramp) if done < until), last)
        assert (batches.position(done), batches.size(done)) == (taken, size)
        taken += size
