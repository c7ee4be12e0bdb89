"""The stream's order for other trainers: a stage that a `webdataset.DataPipeline` starts with, or any loader iterates.

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

_AT_ONCE = 1024  # samples whose places are worked out together
_MOST_WORKERS = 64


class OrderedSamples(IterableDataset):
    """Endless samples {"__key__", "__url__", extension: bytes} in onecurve's order, every epoch exact.

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
        self._pass = epoch_length and epoch_length * world_size  # samples of the run
        storage = storage or Storage(default_cache())
        find = partial(Shards.open, shards, None, storage, key="shards")
        remote = any(map(is_remote, [shards] if isinstance(shards, str) else shards))
        # So that this process has no clients of servers, which no worker that a data loader forks could use.
        self._shards: Shards = run_in_fork(find) if remote and not has_clients() else find()
        self._mapped = storage.mmap
        block = default_block(self._shards.n, self._shards.bytes, lanes)
        self._walk = Walk(Order(self._shards.n, lanes, window, block, seed))
        self._identity = {
            "order": ORDER, "seed": seed, "lanes": self._walk.order.lanes, "window": window, "block": block,
            "shards": self._shards.fingerprint,
        }  # fmt: skip
        self._progress = _Progress()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        shards, urls, mapped = self._shards, self._shards.urls, self._mapped
        turns = _Turns(self)
        count = 8
        while len(numbers := turns.next(count := min(2 * count, _AT_ONCE))):
            for number, i in shards.locate_many(numbers):
                key, members = shards.sample(number, i)
                turns.take(1)
                if mapped:  # views of files can be neither decoded by others nor sent to another process
                    members = {name: bytes(content) for name, content in members.items()}
                yield {"__key__": key, "__url__": urls[number], **members}
        turns.end()

    def payloads(self, field: str, count: int) -> Iterator[list[bytes | memoryview]]:
        """Instead of samples lists of `count` times their member `field`: the same order, read in bulk. Of shards that
        are mapped (`Storage(mmap=True)`) they are views, to be made tensors of where they are read."""
        turns = _Turns(self)
        while len(numbers := turns.next(-(-_AT_ONCE // count) * count)):
            payloads = self._shards.read_many(numbers, field)
            for _ in range(0, len(numbers), count):
                found = list(islice(payloads, count))
                turns.take(len(found))
                yield found
        turns.end()

    def state_dict(self) -> dict[str, Any]:
        """Where this stage stands: under 1 KB, at any place of any data set."""
        taken, until = self._progress.get(*_worker())
        return {**self._identity, "taken": taken, "until": until}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state_dict` was taken, in constant time. ValueError if it is of other data or another order.

        When each rank has taken equally many samples, all their states are equal (without workers), and any other
        number of ranks goes on from one of them.
        """
        different = [name for name, value in self._identity.items() if state.get(name) != value]
        if different:
            raise ValueError(f"the state is of another stream: {', '.join(different)} differ")
        self._progress.reset(*_worker(), int(state["taken"]), int(state.get("until", 0)))


def _worker() -> tuple[int, int]:
    """How many workers the data loader has (0: this is none of a loader), and the number of this one."""
    worker = get_worker_info()
    return (worker.num_workers, worker.id) if worker else (0, 0)


class _Progress:
    """How far a stage is, in memory that a process shares with the workers it starts: they come and go with each pass.

    Of each reader: the samples of the run that were taken, all ranks' together, in the rounds that it has done; and
    where its pass ends (0: none is under way). A row for each number of workers that a loader may have, as each deals
    samples out otherwise; of two rows the one that is further was read later.
    """

    def __init__(self) -> None:
        self._table = torch.zeros(_MOST_WORKERS + 1, _MOST_WORKERS, 2, dtype=torch.int64)
        self._share()

    def _share(self) -> None:
        self._table.share_memory_()
        self._cells = self._table.numpy()
        self._resumed = False  # whether this process is a worker that is put in the middle of a pass

    def get(self, workers: int, own: int) -> tuple[int, int]:
        """Where a reader stands: (taken, until)."""
        row, place = self._latest(workers, own)
        taken, until = self._cells[row, place].tolist()
        return taken, until

    def begin(self, workers: int, own: int, length: int | None) -> memoryview:
        """The numbers of a reader that begins a pass, to be written to. `length`: of a pass; None: it never ends. One
        that was broken off goes on, unless all its readers were through."""
        row, place = self._latest(workers, own)
        taken, until = self._cells[row, place].tolist()
        is_over = bool((self._cells[row, : max(row, 1), 0] >= until).all()) and not self._resumed
        if is_over or not until:
            until = (taken // length + 1) * length if length else 0
        self._resumed = False
        cell = self._cells[workers, own].data
        cell[0], cell[1] = taken, until
        return cell

    def _latest(self, workers: int, own: int) -> tuple[int, int]:
        """Row and place of the reader that stands where this one goes on: its own, or of another loader's row."""
        taken = self._cells[..., 0]
        furthest = max(taken[:workers].max(initial=0), taken[workers + 1 :].max(initial=0))
        if taken[workers, own] >= furthest:
            return workers, own
        rows, places = np.nonzero(taken == furthest)
        return next((int(row), int(place)) for row, place in zip(rows, places, strict=True) if row != workers)

    def reset(self, workers: int, own: int, taken: int, until: int) -> None:
        """Puts a reader somewhere, also further back; each worker of a loader does so for itself."""
        self._cells[:workers] = self._cells[workers + 1 :] = 0
        self._cells[workers, own] = taken, until
        self._resumed = workers > 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_table": self._table}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._share()


class _Turns:
    """One pass of one reader: which samples are its own, from where the one before ended."""

    def __init__(self, stage: OrderedSamples):
        workers, own = _worker()
        if workers > _MOST_WORKERS:
            raise ValueError(f"{workers} workers: a data loader of this stage has at most {_MOST_WORKERS}")
        self._walk, self._shards = stage._walk, stage._shards
        self._first = stage._rank + own * stage._world_size
        self._stride = stage._world_size * max(workers, 1)
        self._cell = stage._progress.begin(workers, own, stage._pass)
        self._taken, self._until = self._cell
        self._asked = self._taken

    def next(self, count: int) -> Numbers:
        """The samples that come next, int64 [<= count]; none where the pass ends."""
        numbers: Numbers = self._asked + self._first + self._stride * np.arange(count)
        if self._until:
            numbers = numbers[numbers < self._until]
        self._asked += self._stride * count
        samples = self._walk.samples(numbers)
        self._shards.foresee(samples)
        return samples

    def take(self, count: int) -> None:
        """Notes that so many more have been read."""
        self._taken += self._stride * count
        is_last = self._until and self._taken + self._first >= self._until
        self._cell[0] = self._until if is_last else self._taken

    def end(self) -> None:
        """Notes that the pass is over."""
        self._cell[0], self._cell[1] = self._until, 0
