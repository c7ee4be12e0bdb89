"""The stream of global batches, the same for any number of ranks; and the validation pass beside it.

Sequence number k of the run is the next of lane k mod lanes. A rank makes the numbers k with
k mod dp_size == dp_rank and, to know where its lanes stand, walks them past the sequences of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.index import Shards
from trainer.data.loader import Prefetch, concurrently
from trainer.data.order import ORDER, Order, default_block
from trainer.data.packing import Documents, Lane, Piece
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.randomness import key

Batch = dict[str, torch.Tensor]

NO_TARGET = -100
_STEPS_AHEAD = 4


@dataclass(frozen=True)
class StepData:
    """One rank's part of one optimizer step."""

    step: int
    """1-based."""
    micro_batches: list[Batch]
    """In order; each {"inputs": int64 [B, T], "targets": int64 [B, T], "draws": int64 [B]}, CPU, contiguous.
    `draws` is one random 63-bit integer a sequence, the same whichever rank trains on it."""
    position: torch.Tensor
    """int64 [lanes, 3]: (epoch, index, offset) of every lane AFTER this step; -1 where this rank does not
    host the lane. The element-wise maximum over the ranks is the whole position."""
    pieces: list[list[Piece]]
    """Where each of this rank's sequences came from; empty if the ledger is off."""
    first: int
    stride: int
    """Sequence i of `pieces` is number first + i * stride of the run."""


class Stream:
    """An endless iterator of `StepData`, the same for any dp_size, micro_batch, workers and interruptions.

    `lanes` is capped at the number of samples; `block` is by default `default_block`'s. `workers=0` makes a
    step when it is asked for; otherwise a thread reads ahead, and with `workers` > 1 the lanes of a step
    advance in that many threads. `global_batch` must be a multiple of dp_size * micro_batch.
    `next` raises DataError, which names the sample that cannot be read.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        global_batch: int,
        micro_batch: int,
        lanes: int,
        window: int,
        seed: int,
        dp_rank: int,
        dp_size: int,
        workers: int = 1,
        ledger: bool = False,
        block: int | None = None,
    ):
        assert global_batch % (dp_size * micro_batch) == 0, (global_batch, dp_size, micro_batch)
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        block = block or default_block(shards.n, int(shards.sizes.sum()), lanes)
        self._share = _Share(
            order=Order(shards.n, lanes, window, block, seed),
            documents=Documents(shards, tokenizer),
            sequence_length=sequence_length,
            global_batch=global_batch,
            micro_batch=micro_batch,
            dp_rank=dp_rank,
            dp_size=dp_size,
            ledger=ledger,
            workers=workers,
        )
        self._workers = workers
        self._reader: Prefetch[StepData] | None = None
        self.fingerprint: dict[str, Any] = {  # JSON-able: a run can only go on with the same one
            "order": ORDER,
            "seed": seed,
            "lanes": self._share.order.lanes,
            "window": window,
            "block": block,
            "samples": shards.n,
            "shards": shards.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "sequence_length": sequence_length,
            "global_batch": global_batch,
        }
        self.seek(0, None)

    def seek(self, step: int, position: torch.Tensor | None) -> None:
        """Go to where `step` steps are done: `position` is the whole one (no -1 rows) after the last of them.

        None is the birth of the run (step 0). ValueError if `position` cannot be one of this stream.
        """
        if position is None and step:
            raise ValueError(f"only step 0 has no position, not step {step}")
        self._stop()
        self._steps = self._share.steps(step, self._share.lanes(position))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StepData:
        if not self._workers:
            return next(self._steps)
        if self._reader is None:
            self._reader = Prefetch(self._steps, _STEPS_AHEAD)
        return next(self._reader)

    def close(self) -> None:
        """Stop reading ahead, within a second. There is no next step until a `seek`."""
        self._stop()
        self._steps = iter(())

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


@dataclass(frozen=True)
class _Share:
    """One rank's share of the run. Holds no place in it: every reader walks lanes of its own."""

    order: Order
    documents: Documents
    sequence_length: int
    global_batch: int
    micro_batch: int
    dp_rank: int
    dp_size: int
    ledger: bool
    workers: int

    def lanes(self, position: torch.Tensor | None) -> dict[int, Lane]:
        """The lanes that this rank hosts, those its sequence numbers ever fall on, at `position`."""
        count = self.order.lanes
        position = torch.zeros(count, 3, dtype=torch.int64) if position is None else position
        if position.shape != (count, 3) or position.min() < 0:
            raise ValueError(f"the position of {count} lanes is [{count}, 3] and >= 0, not {position}")
        common = gcd(count, self.dp_size)
        cursors = position.tolist()
        return {
            number: Lane(number, self.order, self.documents, cursors[number])
            for number in range(self.dp_rank % common, count, common)
        }

    def steps(self, step: int, lanes: dict[int, Lane]) -> Iterator[StepData]:
        """The steps behind `step` finished ones, at which `lanes` stand."""
        position = np.full((self.order.lanes, 3), -1, dtype=np.int64)
        for number, lane in lanes.items():
            position[number] = lane.cursor
        while True:
            yield self._step(step, lanes, position)
            step += 1

    def _step(self, step: int, lanes: dict[int, Lane], position: npt.NDArray[np.int64]) -> StepData:
        """Advance `lanes` and `position` by the global batch behind `step` finished ones."""
        base = step * self.global_batch
        first, end = base + self.dp_rank, base + self.global_batch
        size, length, count = self.global_batch // self.dp_size, self.sequence_length, self.order.lanes
        rows = np.empty((size, length + 1), dtype=np.int64)
        taken: list[list[tuple[int, int, int]]] = [[] for _ in range(size)]

        def advance(numbers_of_lanes: list[range]) -> None:
            for numbers in numbers_of_lanes:
                lane = lanes[numbers[0] % count]
                for number in numbers:
                    row, other = divmod(number - first, self.dp_size)
                    if other:
                        lane.skip(length)
                    else:
                        taken[row] = lane.read(rows[row])
                position[numbers[0] % count] = lane.cursor

        touched = range(base, min(end, base + count))
        work = [range(number, end, count) for number in touched if number % count in lanes]
        if self.workers > 1:
            concurrently(advance, [work[i :: self.workers] for i in range(self.workers)])
        else:
            advance(work)
        draws = np.array([key(self.order.seed, "draw", k) for k in range(first, end, self.dp_size)], np.int64)
        return StepData(
            step=step + 1,
            micro_batches=_batches(rows[:, :-1], rows[:, 1:], draws, self.micro_batch),
            position=torch.from_numpy(position.copy()),
            pieces=[[self.documents.piece(*piece) for piece in row] for row in taken] if self.ledger else [],
            first=first,
            stride=self.dp_size,
        )


class Validation:
    """Every document once, in listed order, concatenated and cut: this rank's micro-batches, at each `iter`.

    Over all ranks together, every token but the very first is a target exactly once. The last sequence is
    padded (inputs 0, targets -100), and so are whole ones where a rank has none left: all ranks yield the
    same number of batches {"inputs", "targets": int64 [micro_batch, T], "draws": int64 [micro_batch], all 0}.

    `sequences` limits the whole, over all ranks. The first pass reads the tokens (of the documents within the
    limit) and keeps this rank's part, 4 bytes each. It raises ConfigError if there is nothing to predict,
    DataError for a sample that cannot be read.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        sequences: int | None = None,
    ):
        self._samples = shards.n
        self._documents = Documents(shards, tokenizer, cache_bytes=0)
        self._length, self._micro_batch = sequence_length, micro_batch
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._limit = None if sequences is None else sequences * sequence_length + 1
        self._rows: npt.NDArray[np.int32] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._rows is None:
            self._rows = self._read()
        draws = np.zeros(self._micro_batch, dtype=np.int64)
        for start in range(0, len(self._rows), self._micro_batch):
            rows = self._rows[start : start + self._micro_batch].astype(np.int64)
            inputs, targets = rows[:, :-1].clip(min=0), rows[:, 1:]
            yield from _batches(inputs, np.where(targets < 0, NO_TARGET, targets), draws, self._micro_batch)

    def _read(self) -> npt.NDArray[np.int32]:
        """This rank's sequences, int32 [batches * micro_batch, T + 1], -1 where there is no token."""
        documents, count = [], 0
        for sample in range(self._samples):
            documents.append(self._documents.tokens(sample))
            count += len(documents[-1])
            if self._limit is not None and count >= self._limit:
                break
        tokens = np.concatenate(documents)[: self._limit]
        if len(tokens) < 2:
            raise ConfigError("the validation data has no token to predict: its documents are empty")
        sequences = -(-(len(tokens) - 1) // self._length)
        of_a_batch = self._micro_batch * self._dp_size
        padded = np.full(-(-sequences // of_a_batch) * of_a_batch * self._length + 1, -1, dtype=np.int32)
        padded[: len(tokens)] = tokens
        cut = np.lib.stride_tricks.sliding_window_view(padded, self._length + 1)[:: self._length]
        return cut[self._dp_rank :: self._dp_size].copy()


def _batches(inputs: npt.NDArray, targets: npt.NDArray, draws: npt.NDArray, micro_batch: int) -> list[Batch]:
    """Cut [n, T], [n, T] and [n] into contiguous micro-batches."""
    names = ("inputs", "targets", "draws")
    arrays = (torch.from_numpy(np.ascontiguousarray(array)) for array in (inputs, targets, draws))
    columns = [tensor.split(micro_batch) for tensor in arrays]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
