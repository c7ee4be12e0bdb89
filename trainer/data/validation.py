"""The pass over held-out data: every example once, in order, dealt to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from trainer.data.deal import ROW_BY_ROW, Deal
from trainer.data.loader import read_ahead
from trainer.data.stream import Batch, Row, Source, batch
from trainer.errors import DataError

_BATCHES_AHEAD = 4


class Validation:
    """Yields this rank's micro-batches of the first `num_examples` examples (None: all) of `source`, at each `iter`
    the same.

    All ranks yield the same number of batches, tensors [B, ...] by name and "draws" int64 [B], all 0. Where a rank has
    too few examples for its last batch, B is smaller, maybe 0. Nothing is random and nothing is left out: an example
    that cannot be read raises DataError (shard, key).

    With `workers=0` a batch is read when it is needed; otherwise threads read ahead until the end, or until the
    iterator is closed.
    """

    def __init__(
        self,
        source: Source,
        *,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        deal: Deal = ROW_BY_ROW,
        num_examples: int | None = None,
        workers: int = 0,
    ):
        self._source, self._workers = source, workers
        self._num_examples = min(source.n, num_examples) if num_examples else source.n
        self._shares = deal.batches(self._num_examples, micro_batch, dp_rank, dp_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, give_up: Callable[[], bool] = lambda: False) -> Generator[Batch]:
        """Yields the batches. While one is late, but not the first, `give_up` is called now and then: once that is
        true, zeros come in place of this batch and all after it."""
        count = len(self._shares)
        if not self._workers:
            yield from map(self._batch, range(count))
            return
        depth = max(_BATCHES_AHEAD, 2 * self._workers)
        reader = read_ahead(self._batch, 0, depth=min(depth, count), workers=self._workers)
        try:
            current: Batch | None = next(reader)
            yield (template := current or {})
            for number in range(1, count):
                current = current and reader.take(give_up)
                yield current or self._zeros(number, template)
        finally:
            reader.close()

    def _batch(self, number: int) -> Batch:
        """Reads this rank's share of a batch; returns {} after the last one, as a reader may read that far ahead."""
        if number >= len(self._shares):
            return {}
        example_indices = self._shares[number]
        self._source.foresee(example_indices or [0])
        if example_indices:
            return batch([(0, self._read(example_index)) for example_index in example_indices])
        example = batch([(0, self._read(0))])
        return {name: tensor[:0] for name, tensor in example.items()}

    def _zeros(self, number: int, template: Batch) -> Batch:
        rows = len(self._shares[number])
        return {name: tensor.new_zeros((rows, *tensor.shape[1:])) for name, tensor in template.items()}

    def _read(self, example_index: int) -> Row:
        try:
            return self._source.read(example_index, 0)
        except DataError as error:
            raise DataError(f"data.validation: {error}", shard=error.shard, key=error.key, byte=error.byte) from error
