"""A copy of the model, spread over processes, trains on one batch: what one of them cannot read, none of them uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

from trainer.data.bad_data import BadData
from trainer.data.stream import ExampleId, StepData, Stream
from trainer.topology import Topology


class AgreedStream:
    """A tolerant `Stream` of pipeline or tensor parallel, where each process reads for itself. One small collective a
    step among those of a copy; a step on which they differ is made again without what any of them left out. All of a
    copy decide by the same answers, and no other copy waits for that before its next update."""

    def __init__(self, stream: Stream, topology: Topology):
        self._stream, self._topology, self._group = stream, topology, topology.replica_group()
        self._left_out: frozenset[ExampleId] = frozenset()

    @property
    def faults(self) -> list[BadData]:
        return self._stream.faults

    def seek(self, done: int, left_out: Iterable[ExampleId] = ()) -> None:
        self._left_out = frozenset(left_out)
        self._stream.seek(done, self._left_out)

    def close(self) -> None:
        self._stream.close()

    def take(self, give_up: Callable[[], bool] = lambda: False) -> StepData:
        """Returns the next step; abandoned by all of the copy, where one of them gave it up."""
        data, known = self._stream.take(give_up), dict[ExampleId, BadData]()
        if any(self._topology.gather_all(data.abandoned, self._group)):
            return self._stream.share.without_samples(data.step - 1, like=data)  # of the same shapes on all
        while True:
            own = [[*slot, asdict(fault)] for slot, fault in data.faults]
            parts = self._topology.gather_all(own, self._group)
            told = [{ExampleId(*slot): BadData(**fault) for *slot, fault in part} for part in parts]
            new = {slot: fault for part in told for slot, fault in part.items()}
            known |= new
            if all(part.keys() == new.keys() for part in told):
                return replace(data, faults=sorted(known.items()))
            self._stream.seek(data.step - 1, self._left_out | known.keys())
            data = next(self._stream)
