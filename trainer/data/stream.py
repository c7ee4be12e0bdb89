"""The stream of global batches: a pure function of the step, the same for any number of ranks.

Sequence number k of the run belongs to rank k mod dp_size. Which one it is follows from k alone: the mixture says from
which source, the source's order says which of its units. So there is nothing to replay, and nothing to save but k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from trainer.data.bad_data import BadData
from trainer.data.batch_sizes import Batches
from trainer.data.loader import read_ahead
from trainer.data.mixture import Mixture
from trainer.data.order import Order, Walk, default_block
from trainer.errors import DataError
from trainer.fault_points import point
from trainer.randomness import keys

Batch = dict[str, torch.Tensor]
Row = Mapping[str, Any]

_STEPS_AHEAD = 4


class Source(Protocol):
    """What a run shuffles: `n` units of about `bytes` / n bytes, sequences of tokens or decoded samples."""

    n: int
    bytes: int

    @property
    def faults(self) -> Sequence[BadData]:
        """What was found damaged when it was opened, and left out."""

    def read(self, example_index: int, draw: int) -> Row:
        """Arrays or tensors by name, of one shape for all units. `draw`: 63 random bits, all that may be random in it.

        DataError (shard, key) if the unit cannot be read.
        """

    @property
    def fingerprint(self) -> str:
        """Returns a fingerprint of its examples, as far as known when it is opened: equal in every attempt of a run."""

    def foresee(self, example_indices: Sequence[int]) -> None:
        """A hint that these will be read soon, in this order: what comes over the network is fetched meanwhile."""

    def entry(self, example_index: int) -> Any:
        """The unit as the ledger names it: [shard, key], or a list of pieces."""


class ExampleId(NamedTuple):
    """A place in the run, and what comes there: unit `unit` of source number `source`."""

    number: int
    source: int
    unit: int


@dataclass(frozen=True)
class StepData:
    """One rank's part of one optimizer step."""

    step: int
    """1-based."""
    micro_batches: list[Batch]
    """In order; tensors [B, ...] by name, CPU, contiguous, and "draws" int64 [B]: one random 63-bit integer a sequence,
    the same whichever rank trains on it. B is smaller, maybe 0, where a unit was left out."""
    taken: int
    """Sequences of the run up to and with this step, over all ranks: the position behind it."""
    entries: list[tuple[int, Any]]
    """(number in the run, ledger entry) of each of this rank's sequences; empty if the ledger is off."""
    faults: list[tuple[ExampleId, BadData]]
    """(place, what is wrong) of those that were left out now."""
    abandoned: bool = False
    """Whether this rank gave up waiting for its samples: the step is not to be done by any rank."""


@dataclass(frozen=True)
class OrderedSource:
    """A source within a run: how its units are ordered. `lanes` is capped at their number."""

    source: Source
    lanes: int
    window: int
    seed: int
    block: int | None = None
    walk: Walk = field(init=False)

    def __post_init__(self) -> None:
        block = self.block or default_block(self.source.n, self.source.bytes, self.lanes)
        object.__setattr__(self, "walk", Walk(Order(self.source.n, self.lanes, self.window, block, self.seed)))


@dataclass(frozen=True)
class RankStream:
    """One rank's share of the run: what it reads at which step. Holds no place in it, and can be sent to a process."""

    parts: Sequence[OrderedSource]
    mixture: Mixture
    batches: Batches
    micro_batch: int | None
    seed: int
    dp_rank: int = 0
    dp_size: int = 1
    ledger: bool = False
    tolerant: bool = False
    left_out: frozenset[ExampleId] = frozenset()
    numbered: str = ""
    """The field, int64, that tells each row's source by its number; empty for none."""

    def units(self, done: int) -> list[ExampleId]:
        """This rank's sequences of the step behind `done` finished ones; a slot's source is the number of a part."""
        first = self.batches.taken(done)
        numbers = np.arange(first + self.dp_rank, first + self.batches.size(done), self.dp_size)
        which, own = self.mixture.at(numbers)
        units = np.empty_like(numbers)
        for i in np.unique(which):
            units[which == i] = self.parts[i].walk.samples(own[which == i])
        return list(map(ExampleId, numbers.tolist(), which.tolist(), units.tolist()))

    def step(self, done: int) -> StepData:
        """This rank's part of the step behind `done` finished ones."""
        units = self.units(done)
        for i, part in enumerate(self.parts):
            part.source.foresee([example_index for _, which, example_index in units if which == i])
        draws = keys(self.seed, "draw")
        rows: list[tuple[int, Row] | None] = []
        entries, faults = [], []
        for slot in units:
            number, which, example_index = slot
            draw, source = draws(number), self.parts[which].source
            rows.append(None)
            if slot in self.left_out:
                continue
            try:
                point("data.read")
                rows[-1] = (draw, self._read(which, example_index, draw))
            except DataError as error:
                if not self.tolerant:
                    raise
                faults.append((slot, BadData.of(error)))
                continue
            if self.ledger:
                entries.append((number, source.entry(example_index)))
        size = self.micro_batch or len(rows)
        groups = [[row for row in rows[i : i + size] if row] for i in range(0, len(rows), size)]
        return StepData(
            step=done + 1,
            micro_batches=[batch(group) if group else self._nothing(rows) for group in groups],
            taken=self.batches.taken(done + 1),
            entries=entries,
            faults=faults,
        )

    def without_samples(self, done: int, like: StepData) -> StepData:
        """Returns the step behind `done` finished ones, abandoned: zeros in place of samples. `like`: an earlier step,
        for the names, shapes and types of its tensors."""
        count = len(range(self.dp_rank, self.batches.size(done), self.dp_size))
        size, example = self.micro_batch or count, like.micro_batches[0]
        batches = [
            {name: tensor.new_zeros((min(size, count - i), *tensor.shape[1:])) for name, tensor in example.items()}
            for i in range(0, count, size)
        ]
        return StepData(done + 1, batches, self.batches.taken(done + 1), [], [], abandoned=True)

    def example(self) -> Batch:
        """A batch of one sequence that can be read."""
        return batch([self._any_row()])

    def _read(self, which: int, example_index: int, draw: int) -> Row:
        row = self.parts[which].source.read(example_index, draw)
        return {**row, self.numbered: np.int64(which)} if self.numbered else row

    def _nothing(self, rows: Iterable[tuple[int, Row] | None]) -> Batch:
        """A micro-batch without a sequence: its rank must still take part in the step."""
        row = next(filter(None, rows), None) or self._any_row()
        return {name: tensor[:0] for name, tensor in batch([row]).items()}

    def _any_row(self) -> tuple[int, Row]:
        problem = DataError("there is no unit to read")
        for which, part in enumerate(self.parts):
            for example_index in range(min(part.source.n, 1000)):
                try:
                    return 0, self._read(which, example_index, 0)
                except DataError as error:
                    problem = error
        raise problem


class Stream:
    """An endless iterator of `StepData`, the same for any dp_size, micro_batch, workers and interruptions.

    `workers=0` makes a step when it is asked for; otherwise threads (or, with `processes`, processes) read ahead.
    Every batch size must be a multiple of dp_size * micro_batch. `next` raises DataError, which names the sample that
    cannot be read; with `share.tolerant` the sample is left out instead, and named in the step's faults.
    """

    def __init__(self, share: RankStream, *, workers: int = 1, processes: bool = False):
        self.share = share
        self._workers, self._processes = workers, processes
        self._done = 0
        self._reader: Any = None
        self._make: Callable[[int], StepData] | None = None
        self._last: StepData | None = None
        self.seek(0)

    @property
    def faults(self) -> list[BadData]:
        """What was found damaged when the data was opened."""
        return [fault for part in self.share.parts for fault in part.source.faults]

    def seek(self, done: int, left_out: Iterable[ExampleId] = ()) -> None:
        """Go to where `done` steps are done. `left_out`: what is left out besides what cannot be read."""
        self._stop()
        self._done, self._last = done, None
        share = RankStream(**{**vars(self.share), "left_out": frozenset(left_out)})
        self._make = share.step

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StepData:
        return self.take()

    def take(self, give_up: Callable[[], bool] = lambda: False) -> StepData:
        """Returns the next step. While it is late, `give_up` is asked now and then: where it says so, the step and all
        behind it are abandoned, until a `seek`. The first step is waited for in any case, and so is every step that is
        read in this thread (`workers=0`)."""
        if self._make is None:
            raise StopIteration
        if self._last is not None and self._last.abandoned:
            data = self.share.without_samples(self._done, self._last)
        elif not self._workers:
            data = self._make(self._done)
        else:
            if self._reader is None:
                depth = max(_STEPS_AHEAD, 2 * self._workers)
                self._reader = read_ahead(
                    self._make, self._done, depth=depth, workers=self._workers, processes=self._processes
                )
            before = self._last
            data = self._reader.take(lambda: before is not None and give_up())
            if data is None and before is not None:
                data = self.share.without_samples(self._done, before)
        self._done, self._last = self._done + 1, data
        return data

    def close(self) -> None:
        """Stop reading ahead, within a second. There is no next step until a `seek`."""
        self._stop()
        self._make = None

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def batch(rows: Sequence[tuple[int, Row]]) -> Batch:
    """Stacks (draw, row) into tensors [B, ...], contiguous; rows have equal names and shapes.

    DataError names the field that some lack, or whose shapes differ.
    """
    if others := set().union(*(set(row) ^ set(rows[0][1]) for _, row in rows)):
        raise DataError(f"samples of one batch must have the same fields, but some lack {sorted(others)[0]!r}")
    stacked = {name: _stack(name, [row[name] for _, row in rows]) for name in rows[0][1]}
    return stacked | {"draws": torch.tensor([draw for draw, _ in rows], dtype=torch.int64)}


def _stack(name: str, values: Sequence[Any]) -> torch.Tensor:
    if len(shapes := {np.shape(value) for value in values}) > 1:
        one, other = sorted(map(tuple, shapes))[:2]
        raise DataError(
            f"samples of one batch must have one shape, but {name!r} has {one} and {other}: resize or pad it"
        )
    if isinstance(values[0], torch.Tensor):
        return torch.stack(list(values))
    return torch.from_numpy(np.stack(values))  # a quarter of the time that tensors of each take
