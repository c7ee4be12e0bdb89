"""The order of a run, over sources in memory: who comes when, whatever reads it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.numbered_examples import Units
from trainer.data import ledger
from trainer.data.batch_sizes import Batches
from trainer.data.mixture import Mixture
from trainer.data.order import Order, default_block
from trainer.data.stream import ExampleId, OrderedSource, RankStream, StepData, Stream
from trainer.errors import DataError
from trainer.randomness import key

SEED = 9


def shares(sources: list[Units], dp_size: int, **options: Any) -> list[RankStream]:
    lanes, window, block = (options.pop(name, default) for name, default in (("lanes", 7), ("window", 3), ("block", 2)))
    made: dict[str, Any] = {
        "parts": [OrderedSource(source, lanes, window, SEED, block) for source in sources],
        "mixture": Mixture([(0, [1] * len(sources))]),
        "batches": Batches(12),
        "micro_batch": None,
        "seed": SEED,
        "ledger": True,
        **options,
    }
    return [RankStream(**made, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]


def merged(parts: list[StepData]) -> tuple[int, list[Any], list[list[int]]]:
    """(position behind the step, ledger line, [name, unit, drawn, draw] of every sequence in global order)."""
    (row,) = ledger.rows((part.step, part.entries) for part in parts)
    assert len({(part.step, part.end_position) for part in parts}) == 1
    numbers = [number for part in parts for number, _ in part.entries]
    sequences = [
        [*batch["unit"][i].tolist(), int(batch["drawn"][i]), int(batch["draws"][i])]
        for part in parts
        for batch in part.micro_batches
        for i in range(len(batch["draws"]))
    ]
    assert len(numbers) == len(sequences)
    in_order = [sequence for _, sequence in sorted(zip(numbers, sequences, strict=True))]
    return parts[0].end_position, row["samples"], in_order


def expected(sources: list[Units], share: RankStream, positions: int) -> list[list[Any]]:
    """The ledger's entries of the first `positions`, by the definitions alone, one at a time."""
    counters, orders = [0] * len(sources), [part.walk.order for part in share.parts]
    which = share.mixture.at(np.arange(positions))[0].tolist()
    entries = []
    for source in which:
        order = orders[source]
        entries.append(sources[source].entry(order.sample(*order.at(counters[source]))))
        counters[source] += 1
    return entries


LIVES = st.lists(
    st.tuples(
        st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([0, 1, 2]), st.sampled_from([None, 1])
    ),
    min_size=1,
    max_size=4,
)


CASES = given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    lanes=st.integers(1, 50),
    window=st.integers(1, 6),
    block=st.integers(1, 9),
    batch=st.sampled_from([12, 24]),
    ramp=st.sampled_from([{}, {2: 12}, {1: 24, 4: 12}]),
    lives=LIVES,
    threads=st.integers(0, 25),
)


@settings(max_examples=150, deadline=None)
@CASES
def test_any_cut_into_lives_and_ranks_is_the_same_run(**case: Any) -> None:
    check_run(**case)


@pytest.mark.slow
@settings(max_examples=6000, deadline=None)
@CASES
def test_thousands_of_cuts_into_lives_and_ranks(**case: Any) -> None:
    check_run(**case)


def check_run(
    sizes: list[int], weights: list[int], lanes: int, window: int, block: int, batch: int, ramp: dict[int, int],
    lives: list[tuple[int, int, int, int | None]], threads: int,
) -> None:  # fmt: skip
    """Random data, order, batch, ramp, mixture; random kills and resizes: the order is the definition's, every
    source's epochs are exact, and a draw is a function of its number."""
    sources = [Units(size, name) for size, name in zip(sizes, "abc", strict=False)]
    options: dict[str, Any] = {"lanes": lanes, "window": window, "block": block, "batches": Batches(batch, ramp)}
    options["mixture"] = Mixture([(0, weights[: len(sizes)])])
    done, seen, sequences = 0, [], []
    for steps, dp_size, workers, micro_batch in lives:
        ranks = [
            Stream(share, workers=workers if threads == 0 else 0)
            for share in shares(sources, dp_size, micro_batch=micro_batch, **options)
        ]
        for rank in ranks:
            rank.seek(done)
        for _ in range(steps):
            taken, entries, rows = merged([next(rank) for rank in ranks])
            seen += entries
            sequences += rows
            assert taken == len(seen)
        for rank in ranks:
            rank.close()
        done += steps
    assert seen == expected(sources, shares(sources, 1, **options)[0], len(seen))
    assert sequences == [
        [ord(name), unit, key(SEED, "draw", k) % 1000, key(SEED, "draw", k)] for k, (name, unit) in enumerate(seen)
    ]
    for source in sources:
        own = [unit for name, unit in seen if name == source.name]
        for start in range(0, len(own), source.n):
            epoch = own[start : start + source.n]
            assert len(set(epoch)) == len(epoch)
        assert all(
            sorted(own[at : at + source.n]) == list(range(source.n))
            for at in range(0, len(own) - source.n + 1, source.n)
        )


def test_epochs_come_in_other_orders() -> None:
    stream = Stream(shares([Units(36)], 1)[0], workers=0)
    epochs = [[entry for _ in range(3) for _, entry in next(stream).entries] for _ in range(4)]
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])


def test_batches_have_the_promised_form() -> None:
    (share,) = shares([Units(50)], 1, micro_batch=5, batches=Batches(15))
    part = Stream(share, workers=0)
    data = next(part)
    assert [tuple(batch["unit"].shape) for batch in data.micro_batches] == [(5, 2)] * 3
    assert all(tensor.is_contiguous() for batch in data.micro_batches for tensor in batch.values())
    assert data.micro_batches[1]["draws"].tolist() == [key(SEED, "draw", k) for k in range(5, 10)]
    assert data.micro_batches[1]["draws"].dtype == torch.int64


def test_threads_and_processes_give_the_same_steps() -> None:
    (share,) = shares([Units(50), Units(20, "b")], 1)
    plain, reference = Stream(share, workers=0), []
    for _ in range(12):
        reference.append(merged([next(plain)]))
    for options in (
        {"workers": 1},
        {"workers": 3},
        {"workers": 1, "processes": True},
        {"workers": 2, "processes": True},
    ):
        stream = Stream(share, **options)
        assert [merged([next(stream)]) for _ in range(7)] == reference[:7], options
        stream.seek(3)
        assert merged([next(stream)]) == reference[3]
        stream.close()


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_what_cannot_be_read_is_left_out_and_named(dp_size: int) -> None:
    sources = [Units(30, bad=frozenset({3, 17}))]
    whole = expected(sources, shares(sources, 1)[0], 36)
    ranks = [Stream(share, workers=0) for share in shares(sources, dp_size, tolerant=True, micro_batch=2)]
    seen: list[Any] = []
    faults: list[tuple[ExampleId, str | None]] = []
    for _ in range(3):
        parts = [next(rank) for rank in ranks]
        seen += merged(parts)[1]
        faults += sorted((slot, found.key) for part in parts for slot, found in part.faults)
        assert all(len(part.micro_batches) == 12 // dp_size // 2 for part in parts)
    assert seen == [entry for entry in whole if entry[1] not in (3, 17)]
    places = [ExampleId(number, 0, entry[1]) for number, entry in enumerate(whole) if entry[1] in (3, 17)]
    assert faults == [(slot, str(slot.unit)) for slot in places]
    # A later life, to which the same data is whole again, leaves out what was left out.
    share = shares([Units(30)], 1, tolerant=True)[0]
    later = Stream(share, workers=0)
    later.seek(0, places)
    assert [entry for _ in range(3) for _, entry in next(later).entries] == seen
    # What comes there now, because weights to come were changed, is another unit: that is not left out.
    later.seek(0, [slot._replace(unit=29) for slot in places])
    assert [entry for _ in range(3) for _, entry in next(later).entries] == whole


def test_a_rank_whose_whole_step_is_bad_still_has_a_batch_of_nothing() -> None:
    ranks = [
        Stream(share, workers=0)
        for share in shares([Units(4, bad=frozenset({0, 1, 2}))], 4, tolerant=True, batches=Batches(4))
    ]
    rows = [next(rank).micro_batches for rank in ranks]
    assert sorted(len(batches[0]["draws"]) for batches in rows) == [0, 0, 0, 1]
    assert {tuple(batches[0]["unit"].shape[1:]) for batches in rows} == {(2,)}
    with pytest.raises(DataError, match="bad"):
        next(Stream(shares([Units(4, bad=frozenset(range(4)))], 1, tolerant=True)[0], workers=0))


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 1}, {"workers": 2}, {"workers": 1, "processes": True}])
def test_a_bad_unit_ends_the_run_when_its_step_is_due(options: dict[str, Any]) -> None:
    sources = [Units(30, bad=frozenset({17}))]
    place = expected(sources, shares(sources, 1)[0], 30).index(["a", 17])
    stream, seen = Stream(shares(sources, 1)[0], **options), []
    with pytest.raises(DataError, match=r"a\.tar: byte 17") as caught:
        seen.extend(stream)
    assert (caught.value.shard, caught.value.key, caught.value.byte) == ("a.tar", "17", 17)
    assert [part.step for part in seen] == list(range(1, place // 12 + 1))
    stream.close()


def test_units_of_unequal_shape_are_named() -> None:
    class Ragged(Units):
        def read(self, unit: int, draw: int) -> dict[str, Any]:
            return {"image": np.zeros(unit % 2 + 1)}

    with pytest.raises(DataError, match=r"'image' has \(1,\) and \(2,\)"):
        next(Stream(shares([Ragged(9)], 1)[0], workers=0))


def test_a_rank_reads_only_its_lanes() -> None:
    """1,024 ranks over 100,000 shards, each one block: no shard is another rank's within an epoch."""
    shards, per_shard, ranks = 100_000, 1_000, 1_024
    source = Units(shards * per_shard)
    parts = [OrderedSource(source, ranks, 4, SEED, block=per_shard)]
    seen: dict[int, set[int]] = {}
    for rank in (0, 1, 511, 1023):
        share = RankStream(parts, Mixture([(0, [1])]), Batches(ranks * 64), None, SEED, dp_rank=rank, dp_size=ranks)
        far = 10**9 // (ranks * 64)  # somewhere in a run of 10^9 samples
        units = [unit for done in range(far, far + 40) for _, _, unit in share.example_ids(done)]
        seen[rank] = {unit // per_shard for unit in units}
        order = parts[0].walk.order
        assert order.lane_size(rank) in (97_656, 97_657)
        assert len(seen[rank]) <= 12  # 2,560 samples out of windows of 4 shards
    own = list(seen.values())
    assert sum(map(len, own)) <= len(set.union(*own)) + 2 * len(own)  # neighbors may share the shard at their border


def test_the_share_fits_a_process_and_the_position_is_a_number() -> None:
    (share,) = shares([Units(10**12)], 1, lanes=4_096, batches=Batches(4096), block=None)
    assert len(pickle.dumps(share)) < 10_000
    stream = Stream(share, workers=0)
    stream.seek(10**9 // 4096)
    data = next(stream)
    assert data.end_position == (10**9 // 4096 + 1) * 4096
    order = Order(10**12, 4_096, 3, default_block(10**12, 1 << 20, 4_096), SEED)
    number, entry = data.entries[0]
    assert entry[1] == order.sample(*order.at(number))


def test_close_ends_the_reading_and_seek_starts_anew() -> None:
    stream = Stream(shares([Units(50)], 1)[0], workers=1)
    first = merged([next(stream)])
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    stream.seek(0)
    assert merged([next(stream)]) == first
    stream.close()
    stream.close()


@pytest.mark.slow
@pytest.mark.parametrize("options", ["workers=1", "workers=2", "workers=2, processes=True"])
def test_the_interpreter_ends_with_a_live_stream(options: str) -> None:
    program = f"""
from tests.data.test_stream import Units, shares
from trainer.data.stream import Stream
if __name__ == "__main__":
    stream = Stream(shares([Units(50)], 1)[0], {options})
    print(next(stream).step)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
