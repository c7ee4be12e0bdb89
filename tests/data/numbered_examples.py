"""A source in memory, whose units are their own numbers: for tests of order alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.data.bad_data import BadData
from trainer.errors import DataError


@dataclass
class Units:
    n: int
    name: str = "a"
    bad: frozenset[int] = frozenset()
    bytes: int = 1 << 20
    faults: list[BadData] = field(default_factory=list)

    def read(self, example_index: int, draw: int) -> dict[str, Any]:
        if example_index in self.bad:
            raise DataError(
                f"{self.name}.tar: byte {example_index}: bad",
                shard=f"{self.name}.tar",
                key=str(example_index),
                byte=example_index,
            )
        return {"unit": np.array([ord(self.name), example_index]), "drawn": np.int64(draw % 1000)}

    def foresee(self, example_indices: Sequence[int]) -> None:
        pass

    def entry(self, example_index: int) -> list[Any]:
        return [self.name, example_index]
