"""The stream's order for other trainers: a stage that a `webdataset.DataPipeline` starts with, or any loader iterates.

    source = OrderedSamples("shards/train-{000000..000099}.tar", seed=1, rank=rank, world_size=size)
    pipeline = webdataset.DataPipeline(source, webdataset.decode(), webdataset.to_tuple("txt", "json"))

It has the two methods of torchdata's `Stateful`, so that `StatefulDataLoader` saves and restores it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from trainer.data.order import ORDER, Numbers, Order, Walk, default_block
from trainer.data.shards import Shards
from trainer.data.storage import Storage, default_cache

_AT_ONCE = 1024  # samples whose places are worked out together


class OrderedSamples(IterableDataset):
    """Endless samples {"__key__", "__url__", extension: bytes-like} in onecurve's order, every epoch exact.

    Sample number k of the run goes to rank k mod `world_size` and there to the data loader's worker
    (k div `world_size`) mod its workers, so one sample at a time (`batch_size=None`) any number of workers gives one
    order. `storage`: cache, and how remote shards are read. Errors are those of `Shards`: ConfigError, DataError.
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
        storage: Storage | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self._rank, self._world_size = rank, world_size
        self._shards = Shards.open(shards, None, storage or Storage(default_cache()), key="shards")
        block = default_block(self._shards.n, self._shards.bytes, lanes)
        self._walk = Walk(Order(self._shards.n, lanes, window, block, seed))
        self._identity = {
            "order": ORDER, "seed": seed, "lanes": self._walk.order.lanes, "window": window, "block": block,
            "shards": self._shards.fingerprint,
        }  # fmt: skip
        self._taken = 0  # samples of the run, all ranks' together, in the rounds that this rank (or worker) has done

    def __iter__(self) -> Iterator[dict[str, Any]]:
        shards, urls, stride = self._shards, self._shards.urls, self._turns()[1]
        count = 8
        while True:
            count = min(2 * count, _AT_ONCE)
            for number, i in shards.locate_many(self._next(count)):
                key, members = shards.sample(number, i)
                self._taken += stride
                yield {"__key__": key, "__url__": urls[number], **members}

    def payloads(self, field: str, count: int) -> Iterator[list[bytes | memoryview]]:
        """Instead of samples lists of `count` times their member `field`: the same order, read in bulk."""
        stride, lists = self._turns()[1], -(-_AT_ONCE // count)
        while True:
            payloads = self._shards.read_many(self._next(lists * count), field)
            for _ in range(lists):
                found = list(islice(payloads, count))
                self._taken += stride * count
                yield found

    def _turns(self) -> tuple[int, int]:
        """Which samples of a round are this rank's, or this worker's of it: the first, and how many are between."""
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return self._rank + own * self._world_size, self._world_size * workers

    def _next(self, count: int) -> Numbers:
        """The samples that come next, int64 [count]."""
        turn, stride = self._turns()
        samples = self._walk.samples(self._taken + turn + stride * np.arange(count))
        self._shards.foresee(samples)
        return samples

    def state_dict(self) -> dict[str, Any]:
        """Where this stage stands: under 1 KB, at any place of any data set."""
        return {**self._identity, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state_dict` was taken, in constant time. ValueError if it is of other data or another order.

        When each rank has taken equally many samples, all their states are equal (without workers), and any other
        number of ranks goes on from one of them.
        """
        different = [name for name, value in self._identity.items() if state.get(name) != value]
        if different:
            raise ValueError(f"the state is of another stream: {', '.join(different)} differ")
        self._taken = int(state["taken"])
