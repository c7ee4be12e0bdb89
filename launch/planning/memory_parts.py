"""The bytes of a process, part by part, and its share of the model's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from launch.planning.planned_model import Parameter

MIB = 2**20


class Transfer(NamedTuple):
    """One kind of traffic of a process in a step, the least that the collective needs."""

    name: str
    nbytes: int
    processes: int
    """Number of processes that take part: neighbors, as all layouts place them."""
    waits: bool
    """Whether computing waits for it instead of overlapping with it."""


def ring_fraction(n: int) -> float:
    """Returns the fraction of a tensor that each of `n` processes sends in a ring all-gather or reduce-scatter."""
    return (n - 1) / n


class MemoryParts(NamedTuple):
    """The bytes of one process at one moment."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """All that the forward and backward pass allocates, with copies of weights in the compute data type."""
    buffers: int = 0
    """Buffers of the strategy: gathered layers, buckets, received activations."""

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class ParameterShare:
    """The parameters that a process computes with, sharded over `shards` processes."""

    parameters: Sequence[Parameter]
    shards: int = 1

    def fraction(self, parameter: Parameter) -> float:
        """Returns the largest fraction of a parameter on a process: FSDP2 shards rows, and may pad them."""
        if self.shards == 1 or not parameter.shape:
            return 1.0
        rows = parameter.shape[0]
        return -(-rows // self.shards) / max(1, rows)

    @cached_property
    def parameter_bytes(self) -> int:
        return round(sum(p.nbytes * self.fraction(p) for p in self.parameters))

    @cached_property
    def trained_bytes(self) -> int:
        return round(sum(p.nbytes * self.fraction(p) for p in self.parameters if p.is_trained))

    @cached_property
    def state_bytes(self) -> int:
        return round(sum(p.state * self.fraction(p) for p in self.parameters))

    def of_block(self, block: int) -> ParameterShare:
        return ParameterShare([p for p in self.parameters if p.block == block], self.shards)

    @property
    def padded_bytes(self) -> int:
        """Returns the bytes of the gathered parameters, padding included."""
        return self.parameter_bytes * self.shards
