"""The stream's order for other trainers: a stage that a `webdataset.DataPipeline` starts with, or any loader iterates.

    source = OrderedSamples("shards/train-{000000..000099}.tar", field="txt", seed=1, rank=rank, world_size=size)
    pipeline = webdataset.DataPipeline(source, webdataset.decode(), webdataset.to_tuple("txt", "json"))

It has the two methods of torchdata's `Stateful`, so that `StatefulDataLoader` saves and restores it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from trainer.data.index import Shards
from trainer.data.order import ORDER, Numbers, Order, default_block


class OrderedSamples(IterableDataset):
    """Endless samples {"__key__", "__url__", extension: bytes} in onecurve's order, every epoch exact.

    Sample number k of the run goes to rank k mod `world_size` and there to the data loader's worker
    (k div `world_size`) mod its workers, so one sample at a time (`batch_size=None`) any number of workers gives one
    order. `field` is a member that every sample has. Errors are those of `Shards`: ConfigError, DataError.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        field: str,
        seed: int,
        lanes: int = 96,
        window: int = 8,
        rank: int = 0,
        world_size: int = 1,
        cache_dir: Path | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self._given, self._field, self._cache_dir = shards, field, cache_dir
        self._rank, self._world_size = rank, world_size
        self._shards = Shards.open(shards, field, cache_dir)
        block = default_block(self._shards.n, int(self._shards.sizes.sum()), lanes)
        self._order = Order(self._shards.n, lanes, window, block, seed)
        self._identity = {
            "order": ORDER, "seed": seed, "lanes": self._order.lanes, "window": window, "block": block,
            "shards": self._shards.fingerprint,
        }  # fmt: skip
        self._taken = 0  # samples of the run, all ranks' together, in the rounds that this rank (or worker) has done

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        stride, turn = self._world_size * workers, self._rank + own * self._world_size
        windows: dict[int, tuple[tuple[int, int], Numbers]] = {}  # the open window of each lane
        length = self._order.window * self._order.block
        while True:
            epoch, lane, index = self._order.at(self._taken + turn)
            place = (epoch, index // length)
            if lane not in windows or windows[lane][0] != place:
                windows[lane] = (place, self._order.window_samples(epoch, lane, place[1]))
            sample = int(windows[lane][1][index % length])
            key = self._shards.name(sample)[1]
            members = self._shards.members(sample)
            self._taken += stride
            yield {"__key__": key, "__url__": self._shards.path(sample), **members}

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

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes that are spawned: open files stay behind."""
        return {name: value for name, value in vars(self).items() if name != "_shards"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._shards = Shards.open(self._given, self._field, self._cache_dir)
