"""Bytes of a process, part by part, and its share of the model's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from launch.planning.planned_model import Parameter

MIB = 2**20


class Sent(NamedTuple):
    """What a process sends in a step, at the least that a collective can do with."""

    what: str
    nbytes: int
    processes: int
    """Among how many: neighbors, as all layouts place them."""
    waits: bool
    """Whether computing has to wait for it; else it goes on meanwhile."""


def shared(n: int) -> float:
    """The share of a tensor that each of `n` processes sends in a ring, of a gathering or a scattering."""
    return (n - 1) / n


class MemoryParts(NamedTuple):
    """Bytes of one process."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """All that the forward and backward pass makes and keeps, copies of weights in the compute data type too."""
    buffers: int = 0
    """The strategy's own: gathered layers, buckets, what is received."""

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class ParameterShare:
    """One process's part of the model, sharded over `shards` more."""

    parameters: Sequence[Parameter]
    shards: int = 1

    def part(self, parameter: Parameter) -> float:
        """The share of a parameter that is held: rows are dealt out, the last processes may have fewer (FSDP2)."""
        if self.shards == 1 or not parameter.shape:
            return 1.0
        rows = parameter.shape[0]
        return -(-rows // self.shards) / max(1, rows)

    @cached_property
    def parameter_bytes(self) -> int:
        return round(sum(p.nbytes * self.part(p) for p in self.parameters))

    @cached_property
    def trained(self) -> int:
        return round(sum(p.nbytes * self.part(p) for p in self.parameters if p.trained))

    @cached_property
    def state(self) -> int:
        return round(sum(p.state * self.part(p) for p in self.parameters))

    def of_block(self, block: int) -> ParameterShare:
        return ParameterShare([p for p in self.parameters if p.block == block], self.shards)

    @property
    def padded(self) -> int:
        """Bytes of the whole, gathered: with the rows that are dealt out for nothing."""
        return self.parameter_bytes * self.shards
