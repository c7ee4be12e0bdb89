"""The stream of global batches: a pure function of the step, the same for any number of ranks.

Sequence number k of the run belongs to rank k mod dp_size. Its content follows from k alone: the mixture selects the
source, and the source's order selects the example. So there is nothing to replay, and nothing to save but k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from trainer.data.bad_data import BadData
from trainer.data.batch_sizes import Batches
from trainer.data.deal import ROW_BY_ROW, Deal
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
    """Holds what a run shuffles: `n` examples of about `bytes` / n bytes, sequences of tokens or decoded samples."""

    n: int
    bytes: int

    @property
    def faults(self) -> Sequence[BadData]:
        """Returns what was found damaged when the source was opened, and is not read."""

    def read(self, example_index: int, draw: int) -> Row:
        """Reads arrays or tensors by name, of one shape for all examples. `draw`: 63 random bits, the only randomness.

        Raises DataError (shard, key) if the example cannot be read.
        """

    @property
    def fingerprint(self) -> str:
        """Returns a fingerprint of its examples, as far as known when it is opened: equal in every attempt of a run."""

    def foresee(self, example_indices: Sequence[int]) -> None:
        """Hints that these will be read soon, in this order: remote ones are fetched in the background."""

    def entry(self, example_index: int) -> Any:
        """Returns the example as the ledger names it: [shard, key], or a list of spans."""


class ExampleId(NamedTuple):
    """Names an example by its number in the run: it is example `unit` of source number `source`."""

    number: int
    source: int
    unit: int


@dataclass(frozen=True)
class StepData:
    """Holds one rank's part of one step."""

    step: int
    """1-based."""
    micro_batches: list[Batch]
    """In order; tensors [B, ...] by name, CPU, contiguous, and "draws" int64 [B]: one random 63-bit integer a sequence,
    the same whichever rank trains on it. B is smaller, maybe 0, where an example was quarantined."""
    end_position: int
    """The number of sequences of the run up to and including this step, over all ranks."""
    entries: list[tuple[int, Any]]
    """(number in the run, ledger entry) of each of this rank's sequences; empty if the ledger is off."""
    faults: list[tuple[ExampleId, BadData]]
    """(example, what is wrong) of those that were quarantined in this step."""
    abandoned: bool = False
    """Whether this rank gave up waiting for its samples: no rank is to do the step."""


@dataclass(frozen=True)
class OrderedSource:
    """Orders the examples of a source within a run. `lanes` is capped at their number."""

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
    """Knows one rank's share of the run: what it reads at each step. Has no position, and can be sent to a process."""

    parts: Sequence[OrderedSource]
    mixture: Mixture
    batches: Batches
    micro_batch: int | None
    seed: int
    dp_rank: int = 0
    dp_size: int = 1
    deal: Deal = ROW_BY_ROW
    ledger: bool = False
    tolerant: bool = False
    quarantined: frozenset[ExampleId] = frozenset()
    source_field: str = ""
    """The field, int64, that holds the number of each row's source; empty for no such field."""

    def example_ids(self, done: int) -> list[ExampleId]:
        """Returns this rank's examples of the step after `done` finished ones; `source` is an index in `parts`."""
        position = self.batches.position(done)
        numbers = position + self.deal.rows(self.batches.size(done), self.dp_rank, self.dp_size)
        sources, source_positions = self.mixture.at(numbers)
        indexes = np.empty_like(numbers)
        for i in np.unique(sources):
            indexes[sources == i] = self.parts[i].walk.samples(source_positions[sources == i])
        return list(map(ExampleId, numbers.tolist(), sources.tolist(), indexes.tolist()))

    def step(self, done: int) -> StepData:
        """Reads this rank's part of the step after `done` finished ones."""
        example_ids = self.example_ids(done)
        for i, part in enumerate(self.parts):
            part.source.foresee(
                [example_index for _, source_number, example_index in example_ids if source_number == i]
            )
        draws = keys(self.seed, "draw")
        rows: list[tuple[int, Row] | None] = []
        entries, faults = [], []
        for example_id in example_ids:
            number, source_number, example_index = example_id
            draw, source = draws(number), self.parts[source_number].source
            rows.append(None)
            if example_id in self.quarantined:
                continue
            try:
                point("data.read")
                rows[-1] = (draw, self._read(source_number, example_index, draw))
            except DataError as error:
                if not self.tolerant:
                    raise
                faults.append((example_id, BadData.of(error)))
                continue
            if self.ledger:
                entries.append((number, source.entry(example_index)))
        size = self.micro_batch or len(rows)
        groups = [[row for row in rows[i : i + size] if row] for i in range(0, len(rows), size)]
        return StepData(
            step=done + 1,
            micro_batches=[batch(group) if group else self._empty_batch(rows) for group in groups],
            end_position=self.batches.position(done + 1),
            entries=entries,
            faults=faults,
        )

    def without_samples(self, done: int, template: StepData) -> StepData:
        """Returns the step after `done` finished ones, abandoned: zeros in place of samples. `template`: an earlier
        step, for the names, shapes and types of its tensors."""
        count = len(self.deal.rows(self.batches.size(done), self.dp_rank, self.dp_size))
        size, example = self.micro_batch or count, template.micro_batches[0]
        batches = [
            {name: tensor.new_zeros((min(size, count - i), *tensor.shape[1:])) for name, tensor in example.items()}
            for i in range(0, count, size)
        ]
        return StepData(done + 1, batches, self.batches.position(done + 1), [], [], abandoned=True)

    def example(self) -> Batch:
        """Reads a batch of one sequence: the first that can be read."""
        return batch([self._any_row()])

    def _read(self, source_number: int, example_index: int, draw: int) -> Row:
        row = self.parts[source_number].source.read(example_index, draw)
        return {**row, self.source_field: np.int64(source_number)} if self.source_field else row

    def _empty_batch(self, rows: Iterable[tuple[int, Row] | None]) -> Batch:
        """Returns a micro-batch without a sequence: its rank must still take part in the step."""
        row = next(filter(None, rows), None) or self._any_row()
        return {name: tensor[:0] for name, tensor in batch([row]).items()}

    def _any_row(self) -> tuple[int, Row]:
        last_error = DataError("there is no example to read")
        for source_number, part in enumerate(self.parts):
            for example_index in range(min(part.source.n, 1000)):
                try:
                    return 0, self._read(source_number, example_index, 0)
                except DataError as error:
                    last_error = error
        raise last_error


class Stream:
    """Iterates over `StepData` without end, the same for any dp_size, micro_batch, workers and interruptions.

    With `workers=0`, `next` reads the step itself; otherwise threads (or, with `processes`, processes) read ahead.
    Every batch size must be a multiple of dp_size * micro_batch. `next` raises DataError, which names the sample that
    cannot be read; with `share.tolerant` the sample is quarantined instead, and named in the step's faults.
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
        """Returns what was found damaged when the data was opened."""
        return [fault for part in self.share.parts for fault in part.source.faults]

    def seek(self, done: int, quarantined: Iterable[ExampleId] = ()) -> None:
        """Goes to the step after `done` steps. `quarantined`: examples to leave out, besides those that cannot be
        read."""
        self._stop()
        self._done, self._last = done, None
        share = RankStream(**{**vars(self.share), "quarantined": frozenset(quarantined)})
        self._make = share.step

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StepData:
        return self.take()

    def take(self, give_up: Callable[[], bool] = lambda: False) -> StepData:
        """Returns the next step. While it is late, `give_up` is called now and then: once that is true, the step and
        all after it are abandoned, until a `seek`. The first step is waited for in any case, and so is every step that
        is read in this thread (`workers=0`)."""
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
            last = self._last
            data = self._reader.take(lambda: last is not None and give_up())
            if data is None and last is not None:
                data = self.share.without_samples(self._done, last)
        self._done, self._last = self._done + 1, data
        return data

    def close(self) -> None:
        """Stops reading ahead, within a second. There is no next step until a `seek`."""
        self._stop()
        self._make = None

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def batch(rows: Sequence[tuple[int, Row]]) -> Batch:
    """Stacks (draw, row) into tensors [B, ...], contiguous; rows have equal names and shapes.

    Raises DataError, which names the field that some lack, or whose shapes differ.
    """
    if differing := set().union(*(set(row) ^ set(rows[0][1]) for _, row in rows)):
        raise DataError(f"samples of one batch must have the same fields, but some lack {sorted(differing)[0]!r}")
    stacked = {name: _stack(name, [row[name] for _, row in rows]) for name in rows[0][1]}
    return stacked | {"draws": torch.tensor([draw for draw, _ in rows], dtype=torch.int64)}


def _stack(name: str, values: Sequence[Any]) -> torch.Tensor:
    if len(shapes := {np.shape(value) for value in values}) > 1:
        shape, other_shape = sorted(map(tuple, shapes))[:2]
        raise DataError(
            f"samples of one batch must have one shape, but {name!r} has {shape} and {other_shape}: resize or pad it"
        )
    if isinstance(values[0], torch.Tensor):
        return torch.stack(list(values))
    return torch.from_numpy(np.stack(values))  # four times as fast as a tensor of each
