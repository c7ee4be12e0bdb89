"""Ranks that share a replica of the model train on one batch: a sample that one of them cannot read, none uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

from trainer.data.bad_data import BadData
from trainer.data.stream import ExampleId, StepData, Stream
from trainer.topology import Topology


class AgreedStream:
    """A tolerant `Stream` for pipeline or tensor parallel, where each rank reads for itself. One small collective per
    step compares the ranks of a replica; a step on which they differ is read again without the samples that any of them
    left out. All ranks of a replica decide by the same answers, and no other replica waits for that."""

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
        """Returns the next step; if one rank gave it up, all ranks of the replica abandon it."""
        data, all_faults = self._stream.take(give_up), dict[ExampleId, BadData]()
        if any(self._topology.gather_all(data.abandoned, self._group)):
            return self._stream.share.without_samples(data.step - 1, template=data)  # of the same shapes on all
        while True:
            local_faults = [[*slot, asdict(fault)] for slot, fault in data.faults]
            gathered = self._topology.gather_all(local_faults, self._group)
            faults_by_rank = [{ExampleId(*slot): BadData(**fault) for *slot, fault in faults} for faults in gathered]
            step_faults = {slot: fault for faults in faults_by_rank for slot, fault in faults.items()}
            all_faults |= step_faults
            if all(faults.keys() == step_faults.keys() for faults in faults_by_rank):
                return replace(data, faults=sorted(all_faults.items()))
            self._stream.seek(data.step - 1, self._left_out | all_faults.keys())
            data = next(self._stream)
