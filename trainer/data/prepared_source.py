"""A source whose rows an objective turns into its examples, in the threads that read: masked, paired, padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.bad_data import BadData
from trainer.data.stream import Source
from trainer.randomness import key


class PreparedSource:
    """Passes each row of `source` to `prepare` with a draw. In an evaluation, which has no draws, the draw follows from
    the example's index: it is the same at each evaluation, on any process."""

    def __init__(self, source: Source, prepare: Callable[[dict[str, Tensor], int], dict[str, Tensor]]):
        self.source, self.prepare = source, prepare
        self.n, self.bytes = source.n, source.bytes

    @property
    def faults(self) -> Sequence[BadData]:
        return self.source.faults

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def read(self, example_index: int, draw: int) -> dict[str, Tensor]:
        row = {name: _tensor(value) for name, value in self.source.read(example_index, draw).items()}
        return self.prepare(row, draw or key("unit", example_index))

    def foresee(self, example_indices: Sequence[int]) -> None:
        self.source.foresee(example_indices)

    def entry(self, example_index: int) -> Any:
        return self.source.entry(example_index)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
