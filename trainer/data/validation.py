"""The pass over held-out data: every unit once, in listed order, dealt to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from trainer.data.loader import read_ahead
from trainer.data.stream import Batch, Row, Source, batch
from trainer.errors import DataError

_BATCHES_AHEAD = 4


class Validation:
    """This rank's micro-batches of the first `units` units (None: all) of `source`, at each `iter` the same.

    All ranks yield the same number of batches, tensors [B, ...] by name and "draws" int64 [B], all 0. Where a rank has
    no units left for its last batch, B is smaller, maybe 0. Nothing is random, nothing is left out: DataError (shard,
    key) for what cannot be read.

    `workers=0` reads a batch when it is asked for; otherwise threads read ahead until the end, or until the iterator is
    closed.
    """

    def __init__(
        self,
        source: Source,
        *,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        units: int | None = None,
        workers: int = 0,
    ):
        self._source, self._micro_batch, self._workers = source, micro_batch, workers
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._units = min(source.n, units) if units else source.n
        self._of_a_batch = micro_batch * dp_size
        self._batches = -(-self._units // self._of_a_batch)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, give_up: Callable[[], bool] = lambda: False) -> Generator[Batch]:
        """Yields them. While one is late, but not the first, `give_up` is asked now and then: where it says so, zeros
        come in its place and in that of all behind it."""
        if not self._workers:
            yield from map(self._batch, range(self._batches))
            return
        depth = max(_BATCHES_AHEAD, 2 * self._workers)
        reader = read_ahead(self._batch, 0, depth=min(depth, self._batches), workers=self._workers)
        try:
            made: Batch | None = next(reader)
            yield (like := made or {})
            for number in range(1, self._batches):
                made = made and reader.take(give_up)
                yield made or self._zeros(number, like)
        finally:
            reader.close()

    def _batch(self, number: int) -> Batch:
        """This rank's share of a batch; nothing behind the last one, to which a reader comes."""
        first = number * self._of_a_batch
        if first >= self._units:
            return {}
        units = self._share(number)
        self._source.foresee(units or [0])
        if units:
            return batch([(0, self._read(example_index)) for example_index in units])
        nothing = batch([(0, self._read(0))])
        return {name: tensor[:0] for name, tensor in nothing.items()}

    def _share(self, number: int) -> range:
        first = number * self._of_a_batch
        return range(first + self._dp_rank, min(first + self._of_a_batch, self._units), self._dp_size)

    def _zeros(self, number: int, like: Batch) -> Batch:
        rows = len(self._share(number))
        return {name: tensor.new_zeros((rows, *tensor.shape[1:])) for name, tensor in like.items()}

    def _read(self, example_index: int) -> Row:
        try:
            return self._source.read(example_index, 0)
        except DataError as error:
            raise DataError(f"data.validation: {error}", shard=error.shard, key=error.key, byte=error.byte) from error
