"""onecurve's order for other trainers: the first stage of a `webdataset.DataPipeline`, or a dataset for any loader.

    source = OrderedSamples("shards/train-{000000..000099}.tar", seed=1, rank=rank, world_size=size)
    pipeline = webdataset.DataPipeline(source, webdataset.decode(), webdataset.to_tuple("txt", "json"))

It has the two methods of torchdata's `Stateful`, so that `StatefulDataLoader` saves and restores it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from trainer.data.fork import run_in_fork
from trainer.data.order import ORDER, Numbers, Order, Walk, default_block
from trainer.data.shards import Shards
from trainer.data.storage import Storage, default_cache, is_remote
from trainer.data.storage.obstore_backend import has_clients

_AT_ONCE = 1024  # samples that are located together
_MOST_WORKERS = 64


class OrderedSamples(IterableDataset):
    """Yields samples {"__key__", "__url__", extension: bytes} without end in onecurve's order, every epoch exact.

    Sample number k of the run goes to rank k mod `world_size` and there to the data loader's worker
    (k div `world_size`) mod its workers, so one sample at a time (`batch_size=None`) any number of workers gives one
    order. Each pass goes on where the one before ended, in the workers of any loader. With `epoch_length` a pass ends
    by itself after so many samples of this rank, which a loader that prefetches needs to lose none; one that is broken
    off is ended by the next. `storage`: cache, and how remote shards are read. Errors are those of `Shards`:
    ConfigError, DataError.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        seed: int,
        lanes: int = 96,
        window: int = 8,
        rank: int = 0,
        world_size: int = 1,
        epoch_length: int | None = None,
        storage: Storage | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if epoch_length is not None and epoch_length < 1:
            raise ValueError(f"epoch_length={epoch_length}: a pass has at least one sample")
        self._rank, self._world_size = rank, world_size
        self._pass_length = epoch_length and epoch_length * world_size  # samples of the run
        storage = storage or Storage(default_cache())
        open_shards = partial(Shards.open, shards, None, storage, key="shards")
        is_any_remote = any(map(is_remote, [shards] if isinstance(shards, str) else shards))
        # In a fork, so that this process has no clients of servers: workers forked by a data loader could not use them.
        self._shards: Shards = run_in_fork(open_shards) if is_any_remote and not has_clients() else open_shards()
        self._is_mapped = storage.mmap
        block = default_block(self._shards.n, self._shards.bytes, lanes)
        self._walk = Walk(Order(self._shards.n, lanes, window, block, seed))
        self._identity = {
            "order": ORDER, "seed": seed, "lanes": self._walk.order.lanes, "window": window, "block": block,
            "shards": self._shards.fingerprint,
        }  # fmt: skip
        self._progress = _Progress()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        shards, urls, is_mapped = self._shards, self._shards.urls, self._is_mapped
        reader = _Pass(self)
        count = 8
        while len(numbers := reader.next(count := min(2 * count, _AT_ONCE))):
            for number, i in shards.locate_many(numbers):
                key, members = shards.sample(number, i)
                reader.take(1)
                if is_mapped:  # views of files can be neither decoded by others nor sent to another process
                    members = {name: bytes(content) for name, content in members.items()}
                yield {"__key__": key, "__url__": urls[number], **members}
        reader.end()

    def payloads(self, field: str, count: int) -> Iterator[list[bytes | memoryview]]:
        """Yields lists of the member `field` of `count` samples: the same order, read in bulk. Members of mapped shards
        (`Storage(mmap=True)`) are views: make tensors of them in the process that reads them."""
        reader = _Pass(self)
        while len(numbers := reader.next(-(-_AT_ONCE // count) * count)):
            payloads = self._shards.read_many(numbers, field)
            for _ in range(0, len(numbers), count):
                chunk = list(islice(payloads, count))
                reader.take(len(chunk))
                yield chunk
        reader.end()

    def state_dict(self) -> dict[str, Any]:
        """Returns where this stage stands: under 1 KB, at any place of any data set."""
        position, pass_end = self._progress.get(*_worker())
        return {**self._identity, "taken": position, "until": pass_end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state_dict` was called, in constant time. Raises ValueError for other data or another order.

        When each rank has taken equally many samples, all their states are equal (without workers), and any other
        number of ranks goes on from one of them.
        """
        different = [name for name, value in self._identity.items() if state.get(name) != value]
        if different:
            raise ValueError(f"the state is of another stream: {', '.join(different)} differ")
        self._progress.reset(*_worker(), int(state["taken"]), int(state.get("until", 0)))


def _worker() -> tuple[int, int]:
    """Returns the number of the data loader's workers (0: this process is not a worker), and the id of this one."""
    worker = get_worker_info()
    return (worker.num_workers, worker.id) if worker else (0, 0)


class _Progress:
    """Holds how far a stage is, in memory that a process shares with its workers: they come and go with each pass.

    For each reader: the samples of the run, over all ranks, in the rounds that it has done; and where its pass ends
    (0: no pass is under way). There is a row for each number of workers that a loader may have, as each number deals
    samples differently; of two rows the one that is further was read later.
    """

    def __init__(self) -> None:
        self._table = torch.zeros(_MOST_WORKERS + 1, _MOST_WORKERS, 2, dtype=torch.int64)
        self._share_memory()

    def _share_memory(self) -> None:
        self._table.share_memory_()
        self._cells = self._table.numpy()
        self._resumed = False  # whether this process is a worker that resumes in the middle of a pass

    def get(self, workers: int, worker_id: int) -> tuple[int, int]:
        """Returns where a reader stands: (position, end of its pass)."""
        row, place = self._latest_cell(workers, worker_id)
        position, pass_end = self._cells[row, place].tolist()
        return position, pass_end

    def begin(self, workers: int, worker_id: int, length: int | None) -> memoryview:
        """Begins a reader's pass and returns its cell, to be written to. `length`: of a pass; None: it never ends. A
        pass that was broken off goes on, unless all its readers were through."""
        row, place = self._latest_cell(workers, worker_id)
        position, pass_end = self._cells[row, place].tolist()
        is_over = bool((self._cells[row, : max(row, 1), 0] >= pass_end).all()) and not self._resumed
        if is_over or not pass_end:
            pass_end = (position // length + 1) * length if length else 0
        self._resumed = False
        cell = self._cells[workers, worker_id].data
        cell[0], cell[1] = position, pass_end
        return cell

    def _latest_cell(self, workers: int, worker_id: int) -> tuple[int, int]:
        """Returns row and place of the reader where this one continues: its own, or one in another loader's row."""
        positions = self._cells[..., 0]
        furthest = max(positions[:workers].max(initial=0), positions[workers + 1 :].max(initial=0))
        if positions[workers, worker_id] >= furthest:
            return workers, worker_id
        rows, places = np.nonzero(positions == furthest)
        return next((int(row), int(place)) for row, place in zip(rows, places, strict=True) if row != workers)

    def reset(self, workers: int, worker_id: int, position: int, pass_end: int) -> None:
        """Moves a reader, forward or back; each worker of a loader moves itself."""
        self._cells[:workers] = self._cells[workers + 1 :] = 0
        self._cells[workers, worker_id] = position, pass_end
        self._resumed = workers > 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_table": self._table}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._share_memory()


class _Pass:
    """Runs one pass of one reader: deals it its samples, from where the last pass ended."""

    def __init__(self, stage: OrderedSamples):
        workers, worker_id = _worker()
        if workers > _MOST_WORKERS:
            raise ValueError(f"{workers} workers: a data loader of this stage has at most {_MOST_WORKERS}")
        self._walk, self._shards = stage._walk, stage._shards
        self._first = stage._rank + worker_id * stage._world_size
        self._stride = stage._world_size * max(workers, 1)
        self._cell = stage._progress.begin(workers, worker_id, stage._pass_length)
        self._position, self._pass_end = self._cell
        self._requested = self._position

    def next(self, count: int) -> Numbers:
        """Returns the next samples, int64 [<= count]; none at the end of the pass."""
        numbers: Numbers = self._requested + self._first + self._stride * np.arange(count)
        if self._pass_end:
            numbers = numbers[numbers < self._pass_end]
        self._requested += self._stride * count
        samples = self._walk.samples(numbers)
        self._shards.foresee(samples)
        return samples

    def take(self, count: int) -> None:
        """Records that `count` more samples have been read."""
        self._position += self._stride * count
        is_last = self._pass_end and self._position + self._first >= self._pass_end
        self._cell[0] = self._pass_end if is_last else self._position

    def end(self) -> None:
        """Records that the pass is over."""
        self._cell[0], self._cell[1] = self._pass_end, 0
