"""The pass over held-out data: read ahead by threads, the same batches and errors as read in the training thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from tests.data.numbered_examples import Units
from trainer.data.validation import Validation
from trainer.errors import DataError


@dataclass
class Watched(Units):
    """Remembers what was read by which thread, and what was foreseen."""

    read_by: list[tuple[int, str]] = field(default_factory=list)
    foreseen: list[int] = field(default_factory=list)

    def read(self, unit: int, draw: int) -> dict:
        self.read_by.append((unit, threading.current_thread().name))
        return super().read(unit, draw)

    def foresee(self, units: Sequence[int]) -> None:
        self.foreseen += units


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_batches_as_without_threads(workers: int) -> None:
    for n, size, rank in ((23, 2, 0), (23, 2, 1), (9, 4, 3), (1, 2, 1)):
        source = Watched(n)
        ahead = Validation(source, micro_batch=2, dp_rank=rank, dp_size=size, workers=workers)
        plain = list(Validation(Units(n), micro_batch=2, dp_rank=rank, dp_size=size))
        for _ in range(2):  # as often as there are evaluations
            batches = list(ahead)
            assert len(batches) == len(plain)
            for one, other in zip(batches, plain, strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one)
        assert {thread for _, thread in source.read_by} == {"read-ahead"}
        assert {unit for unit, _ in source.read_by} == set(source.foreseen)
        assert max(source.foreseen) < n


def test_what_cannot_be_read_is_named_in_its_place() -> None:
    for workers in (0, 2):
        read: list[int] = []
        held_out = Validation(Units(20, bad=frozenset([13])), micro_batch=4, workers=workers)
        with pytest.raises(DataError, match=r"data.validation: a\.tar: byte 13: bad") as caught:
            read.extend(unit for batch in held_out for unit in batch["unit"][:, 1].tolist())
        assert (caught.value.shard, caught.value.key) == ("a.tar", "13")
        assert read == list(range(12))


def test_an_evaluation_that_is_broken_off_leaves_no_thread() -> None:
    def readers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "read-ahead"} - before

    before = set[threading.Thread]()
    before = readers()
    batches = Validation(Watched(1000), micro_batch=1, workers=3).batches()
    next(batches)
    assert len(readers()) == 3
    batches.close()
    for thread in readers():
        thread.join(60)
    assert not readers()


@dataclass
class Stuck(Units):
    """From its sixth unit on nothing comes."""

    come: threading.Event = field(default_factory=threading.Event)

    def read(self, unit: int, draw: int) -> dict:
        if unit > 5:
            self.come.wait()
        return super().read(unit, draw)


def test_what_does_not_come_is_given_up_and_has_the_shapes_of_what_would() -> None:
    source, asked = Stuck(9), [False]

    def give_up() -> bool:
        said, asked[0] = asked[0], True  # only when asked again: what is late may still come
        return said

    batches = list(Validation(source, micro_batch=2, dp_size=1, workers=2).batches(give_up))
    source.come.set()
    plain = list(Validation(Units(9), micro_batch=2, dp_size=1))
    assert [{name: (t.shape, t.dtype) for name, t in b.items()} for b in batches] == [
        {name: (t.shape, t.dtype) for name, t in b.items()} for b in plain
    ]
    assert all(torch.equal(one["unit"], other["unit"]) for one, other in zip(batches[:3], plain[:3], strict=True))
    assert not any(tensor.any() for batch in batches[3:] for tensor in batch.values())
