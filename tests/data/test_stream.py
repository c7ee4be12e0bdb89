from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections import defaultdict
from itertools import chain, islice, pairwise
from math import gcd
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import TarWriter

from trainer.data import ledger
from trainer.data.index import Shards
from trainer.data.order import Order, default_block
from trainer.data.stream import Batch, StepData, Stream, Validation
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import ConfigError, DataError
from trainer.randomness import key

SEPARATOR = 256
LENGTH = 24


def write_shards(folder: Path, counts: list[int]) -> list[str]:
    """Shards of texts of 0 to 90 random characters, some of them of several bytes."""
    random, paths = Random(11), []
    for number, count in enumerate(counts):
        paths.append(str(folder / f"s-{number}.tar"))
        with TarWriter(paths[-1]) as tar:
            for i in range(count):
                text = "".join(random.choices("abc dé\nf日", k=random.choice([0, 1, 5, 23, 24, 60, 90])))
                tar.write({"__key__": f"doc{number}-{i:03d}", "txt": text})
    return paths


def read_tokens(paths: list[str]) -> dict[tuple[str, str], list[int]]:
    """(shard, key) -> byte tokens and the separator, in listed order; without any of the code under test."""
    tokens = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                tokens[Path(path).name, member.name.split(".")[0]] = [*content.read(), SEPARATOR]
    return tokens


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"), [17, 1, 29, 14])


@pytest.fixture(scope="module")
def shards(paths: list[str]) -> Shards:
    return Shards(paths, "txt")


@pytest.fixture(scope="module")
def documents(paths: list[str]) -> dict[tuple[str, str], list[int]]:
    return read_tokens(paths)


def streams(shards: Shards, dp_size: int, **options: Any) -> list[Stream]:
    defaults: dict[str, Any] = {
        "sequence_length": LENGTH,
        "global_batch": 60,
        "micro_batch": 60 // dp_size,
        "lanes": 12,
        "window": 3,
        "seed": 9,
        "workers": 0,
        "ledger": True,
    }
    made = {**defaults, **options}
    return [Stream(shards, ByteTokenizer(), dp_rank=rank, dp_size=dp_size, **made) for rank in range(dp_size)]


def merge(parts: list[StepData]) -> tuple[dict[str, list], torch.Tensor]:
    """The global batch of a step and the whole position, from the parts of all ranks."""
    size = len(parts)
    merged: dict[str, list] = {"step": [parts[0].step], "first": [parts[0].first]}
    for name in ("inputs", "targets", "draws"):
        columns = [torch.cat([batch[name] for batch in part.micro_batches]) for part in parts]
        merged[name] = torch.stack(columns, dim=1).flatten(0, 1).tolist()
    (row,) = ledger.rows((part.step, part.first, part.stride, part.pieces) for part in parts)
    merged["samples"] = row["samples"]
    for rank, part in enumerate(parts):
        assert (part.step, part.first - rank, part.stride) == (parts[0].step, parts[0].first, size)
    position = torch.stack([part.position for part in parts])
    whole = position.amax(dim=0)
    assert torch.all((position == whole) | (position == -1))  # hosts of the same lane agree
    assert whole.min() >= 0
    return merged, whole


def run(ranks: list[Stream], steps: int) -> tuple[list[dict[str, list]], list[torch.Tensor]]:
    merged = [merge([next(rank) for rank in ranks]) for _ in range(steps)]
    for rank in ranks:
        rank.close()
    return [batch for batch, _ in merged], [position for _, position in merged]


def test_batches_have_the_promised_form(shards: Shards) -> None:
    (stream,) = streams(shards, 1, micro_batch=20)
    part = next(stream)
    assert len(part.micro_batches) == 3
    for batch in part.micro_batches:
        assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
            "inputs": (torch.int64, (20, LENGTH)),
            "targets": (torch.int64, (20, LENGTH)),
            "draws": (torch.int64, (20,)),
        }
        assert all(value.is_contiguous() and value.device.type == "cpu" for value in batch.values())
    assert (part.position.dtype, tuple(part.position.shape)) == (torch.int64, (12, 3))
    assert part.micro_batches[1]["draws"].tolist() == [key(9, "draw", k) for k in range(20, 40)]
    json.dumps(stream.fingerprint)


@pytest.mark.parametrize("lanes", [1, 7, 12, 61, 500])
def test_the_stream_is_what_its_definition_says(
    shards: Shards, documents: dict[tuple[str, str], list[int]], lanes: int
) -> None:
    """Token for token against lanes that are written out whole, and the exact cover of every epoch."""
    steps = 12
    batches, _ = run(streams(shards, 1, lanes=lanes), steps)
    names, sizes = list(documents), [len(tokens) - 1 for tokens in documents.values()]
    order = Order(len(names), lanes, 3, default_block(len(names), sum(sizes), lanes), 9)
    need = steps * 60 * LENGTH + 1
    tokens_of: dict[int, list[int]] = {}
    for lane in range(order.lanes):
        docs = (names[order.sample(epoch, lane, i)] for epoch in range(need) for i in range(order.lane_size(lane)))
        tokens_of[lane] = list(islice(chain.from_iterable(documents[doc] for doc in docs), need))
    read: dict[int, list[list]] = defaultdict(list)
    for number, (inputs, targets, sample) in enumerate(
        (inputs, targets, sample)
        for batch in batches
        for inputs, targets, sample in zip(batch["inputs"], batch["targets"], batch["samples"], strict=True)
    ):
        lane, at = number % order.lanes, number // order.lanes * LENGTH
        assert inputs == tokens_of[lane][at : at + LENGTH]
        assert targets == tokens_of[lane][at + 1 : at + LENGTH + 1]
        assert sum(end - first for _, _, first, end in sample) == LENGTH
        assert inputs == [token for shard, name, first, end in sample for token in documents[shard, name][first:end]]
        read[lane] += sample
    if lanes <= 12:
        check_cover(read, documents, order)


def check_cover(read: dict[int, list[list]], documents: dict[tuple[str, str], list[int]], order: Order) -> None:
    """A lane's pieces make whole documents, one by one; an epoch of all lanes holds each document once."""
    epochs: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for lane, pieces in read.items():
        finished: list[tuple[str, str]] = []
        reached = 0
        for shard, name, first, end in pieces:
            assert first == reached < end <= len(documents[shard, name])
            reached = end
            if end == len(documents[shard, name]):
                finished.append((shard, name))
                reached = 0
        size = order.lane_size(lane)
        assert len(finished) >= 2 * size
        for epoch in (0, 1):
            epochs[epoch] += finished[epoch * size : (epoch + 1) * size]
    for names in epochs.values():
        assert sorted(names) == sorted(documents)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("lanes", [12, 7, 500])
def test_global_batches_do_not_depend_on_who_reads_them(shards: Shards, lanes: int) -> None:
    expected = run(streams(shards, 1, lanes=lanes), 6)
    for dp_size in (1, 2, 3, 4, 5):
        for micro_batch in {60 // dp_size, 60 // dp_size // 3 or 1, 1}:
            for workers in (0, 1, 2):
                if (60 // dp_size) % micro_batch == 0:
                    ranks = streams(shards, dp_size, lanes=lanes, micro_batch=micro_batch, workers=workers)
                    batches, positions = run(ranks, 6)
                    assert batches == expected[0]
                    assert all(map(torch.equal, positions, expected[1]))


@settings(max_examples=35, deadline=None)
@given(
    lives=st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 5]), st.integers(0, 2), st.booleans()),
        min_size=2,
        max_size=5,
    ),
    lanes=st.sampled_from([1, 2, 5, 12, 16, 60, 500]),
    length=st.sampled_from([1, 7, 24, 100]),
)
def test_any_interruption_and_resize_gives_the_same_continuation(
    shards: Shards, lives: list[tuple[int, int, int, bool]], lanes: int, length: int
) -> None:
    options = {"lanes": lanes, "sequence_length": length}
    expected, positions = run(streams(shards, 1, **options), sum(life[0] for life in lives))
    done, position = 0, None
    for steps, dp_size, workers, used in lives:
        ranks = streams(shards, dp_size, workers=workers, micro_batch=1, **options)
        for rank in ranks:
            if used:
                next(rank)  # also a stream that has run before, and read ahead, can seek
            rank.seek(done, position)
        batches, seen = run(ranks, steps)
        assert batches == expected[done : done + steps]
        assert all(map(torch.equal, seen, positions[done : done + steps]))
        done, position = done + steps, seen[-1]


@pytest.mark.parametrize(("lanes", "dp_size"), [(12, 4), (12, 5), (6, 4), (7, 3), (1, 5), (61, 2)])
def test_a_rank_hosts_the_lanes_of_its_sequences_only(shards: Shards, lanes: int, dp_size: int) -> None:
    for rank, stream in enumerate(streams(shards, dp_size, lanes=lanes)):
        position = next(stream).position
        hosted = {lane for lane in range(stream.fingerprint["lanes"]) if position[lane, 0] >= 0}
        common = gcd(stream.fingerprint["lanes"], dp_size)
        assert hosted == {lane for lane in range(stream.fingerprint["lanes"]) if lane % common == rank % common}


def test_a_position_is_a_snapshot(shards: Shards) -> None:
    (stream,) = streams(shards, 1, workers=1)
    parts = [next(stream) for _ in range(5)]
    copies = [part.position.clone() for part in parts]
    next(stream)
    assert all(torch.equal(part.position, copy) for part, copy in zip(parts, copies, strict=True))
    assert not torch.equal(copies[0], copies[1])
    stream.close()


def test_ledger_off_gives_no_pieces_and_the_same_batches(shards: Shards) -> None:
    (on,), (off,) = streams(shards, 1), streams(shards, 1, ledger=False)
    a, b = next(on), next(off)
    assert (len(a.pieces), b.pieces) == (60, [])
    assert torch.equal(a.micro_batches[0]["inputs"], b.micro_batches[0]["inputs"])


def test_seeds_orders_and_epochs_differ(shards: Shards) -> None:
    def inputs(**options: Any) -> list:
        return run(streams(shards, 1, **options), 1)[0][0]["inputs"]

    kinds = [inputs(), inputs(seed=10), inputs(lanes=6), inputs(window=1), inputs(block=5)]
    assert all(a != b for i, a in enumerate(kinds) for b in kinds[:i])
    prints = [streams(shards, 1, **o)[0].fingerprint for o in ({}, {"seed": 10}, {"block": 5})]
    assert all(a != b for i, a in enumerate(prints) for b in prints[:i])
    assert streams(shards, 1)[0].fingerprint == streams(shards, 5, workers=2)[3].fingerprint


def test_positions_that_cannot_be_are_refused(shards: Shards) -> None:
    (stream,) = streams(shards, 1)
    with pytest.raises(ValueError, match="only step 0 has no position"):
        stream.seek(3, None)
    for position in (torch.zeros(11, 3, dtype=torch.int64), torch.full((12, 3), -1)):
        with pytest.raises(ValueError, match=r"the position of 12 lanes is \[12, 3\]"):
            stream.seek(3, position)
    with pytest.raises(AssertionError):
        streams(shards, 7)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_bad_sample_is_named_when_its_step_is_due(tmp_path: Path, workers: int) -> None:
    with TarWriter(str(tmp_path / "bad.tar")) as tar:
        for i in range(40):
            tar.write({"__key__": f"k{i}", "txt": b"\xff" if i == 29 else b"x" * 50})
    (stream,) = streams(
        Shards([str(tmp_path / "bad.tar")], "txt"), 1, workers=workers, lanes=4, global_batch=4, micro_batch=2
    )
    seen: list[StepData] = []
    with pytest.raises(DataError, match=r"bad\.tar: sample 'k29'"):
        seen.extend(stream)
    assert [part.step for part in seen] == list(range(1, len(seen) + 1))
    assert 0 < len(seen) < 23  # 40 documents of 51 tokens in steps of 4 * 24
    stream.close()


def test_close_ends_the_threads_and_seek_starts_anew(shards: Shards) -> None:
    (stream,) = streams(shards, 1, workers=1)
    first = next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    stream.seek(0, None)
    assert torch.equal(next(stream).position, first.position)
    stream.close()
    stream.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_interpreter_ends_with_a_live_stream(paths: list[str], workers: int) -> None:
    program = f"""
from trainer.data.index import Shards
from trainer.data.stream import Stream
from trainer.data.tokenizer import ByteTokenizer
stream = Stream(Shards({paths}, "txt"), ByteTokenizer(), sequence_length=24, global_batch=60, micro_batch=60,
                lanes=12, window=3, seed=9, dp_rank=0, dp_size=1, workers={workers})
print(next(stream).step)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def validation(shards: Shards, dp_size: int, **options: Any) -> list[list[Batch]]:
    made = {"sequence_length": LENGTH, "micro_batch": 3, **options}
    passes = [Validation(shards, ByteTokenizer(), dp_rank=rank, dp_size=dp_size, **made) for rank in range(dp_size)]
    first, again = [list(one) for one in passes], [list(one) for one in passes]
    for batch, same in zip(chain.from_iterable(first), chain.from_iterable(again), strict=True):
        assert all(torch.equal(batch[name], same[name]) for name in ("inputs", "targets", "draws"))
    return first


@pytest.mark.parametrize("sequences", [None, 1, 5, 40, 10_000])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 5, 64])
def test_validation_predicts_every_token_once(
    shards: Shards, documents: dict[tuple[str, str], list[int]], dp_size: int, sequences: int | None
) -> None:
    text = list(chain.from_iterable(documents.values()))
    if sequences is not None:
        text = text[: sequences * LENGTH + 1]
    ranks = validation(shards, dp_size, sequences=sequences)
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch[name].shape == (3, LENGTH) for rank in ranks for batch in rank for name in ("inputs", "targets"))
    assert all(batch["draws"].tolist() == [0, 0, 0] for rank in ranks for batch in rank)
    rows = [
        (rank[step]["inputs"][row].tolist(), rank[step]["targets"][row].tolist())
        for step in range(len(ranks[0]))
        for row in range(3)
        for rank in ranks
    ]
    pairs = [pair for inputs, targets in rows for pair in zip(inputs, targets, strict=True) if pair[1] != -100]
    assert pairs == list(pairwise(text))
    assert all(x >= 0 for inputs, _ in rows for x in inputs)
    assert (len(rows) - 3 * dp_size) * LENGTH < len(text) - 1  # not one batch too many


@pytest.mark.parametrize("spare", [0, 1, LENGTH - 1])
def test_validation_edges(tmp_path: Path, spare: int) -> None:
    with TarWriter(str(tmp_path / "v.tar")) as tar:
        tar.write({"__key__": "v", "txt": b"x" * (2 * LENGTH + spare)})
    (batches,) = validation(Shards([str(tmp_path / "v.tar")], "txt"), 1, micro_batch=1)
    assert len(batches) == (2 if spare == 0 else 3)
    assert sum(int((batch["targets"] != -100).sum()) for batch in batches) == 2 * LENGTH + spare


def test_validation_without_text_is_refused(tmp_path: Path) -> None:
    with TarWriter(str(tmp_path / "v.tar")) as tar:
        tar.write({"__key__": "v", "txt": b""})
    with pytest.raises(ConfigError, match="no token to predict"):
        validation(Shards([str(tmp_path / "v.tar")], "txt"), 1)
