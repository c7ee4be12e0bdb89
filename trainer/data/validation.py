"""The pass over held-out data: every unit once, in listed order, dealt to the ranks."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.data.stream import Batch, Row, Source, batch
from trainer.errors import DataError


class Validation:
    """This rank's micro-batches of the first `units` units (None: all) of `source`, at each `iter` the same.

    All ranks yield the same number of batches, tensors [B, ...] by name and "draws" int64 [B], all 0. Where a rank has
    no units left for its last batch, B is smaller, maybe 0. Nothing is random, nothing is left out: DataError (shard,
    key) for what cannot be read.
    """

    def __init__(
        self, source: Source, *, micro_batch: int, dp_rank: int = 0, dp_size: int = 1, units: int | None = None
    ):
        self._source, self._micro_batch = source, micro_batch
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._units = min(source.n, units) if units else source.n

    def __iter__(self) -> Iterator[Batch]:
        of_a_batch = self._micro_batch * self._dp_size
        for first in range(0, self._units, of_a_batch):
            units = range(first + self._dp_rank, min(first + of_a_batch, self._units), self._dp_size)
            if units:
                yield batch([(0, self._read(unit)) for unit in units])
            else:
                nothing = batch([(0, self._read(0))])
                yield {name: tensor[:0] for name, tensor in nothing.items()}

    def _read(self, unit: int) -> Row:
        try:
            return self._source.read(unit, 0)
        except DataError as error:
            raise DataError(f"data.validation: {error}", shard=error.shard, key=error.key, byte=error.byte) from error
