"""A source in memory, whose units are their own numbers: for tests of order alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.data.faults import Fault
from trainer.errors import DataError


@dataclass
class Units:
    n: int
    name: str = "a"
    bad: frozenset[int] = frozenset()
    bytes: int = 1 << 20
    faults: list[Fault] = field(default_factory=list)

    def read(self, unit: int, draw: int) -> dict[str, Any]:
        if unit in self.bad:
            raise DataError(f"{self.name}.tar: byte {unit}: bad", shard=f"{self.name}.tar", key=str(unit), byte=unit)
        return {"unit": np.array([ord(self.name), unit]), "drawn": np.int64(draw % 1000)}

    def foresee(self, units: Sequence[int]) -> None:
        pass

    def entry(self, unit: int) -> list[Any]:
        return [self.name, unit]
