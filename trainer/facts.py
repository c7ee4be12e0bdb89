"""What a model or an objective may know of the run that it is made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.data.tokenizer import Tokenizer


TOO_EARLY = "objective: `facts.example` is what it makes of a row, so it is not there while it is made itself"


class NoExample(ValueError):
    """There is no data to read an example from."""


@dataclass(frozen=True)
class Facts:
    """Facts of a run, known before its model is made."""

    vocab_size: int
    """Token ids are below it."""
    sequence_length: int
    """Tokens of a row."""
    steps: int
    """`train.steps`."""
    tokenizer: Tokenizer | None = None
    """The data's tokenizer; `token_bytes` and `token_chars` say how much text each token stands for."""
    classes: tuple[str, ...] = ()
    """Names of the classes that labels are numbers of, by `data.classes`; none where that is null."""
    read_example: Callable[[], dict[str, Tensor]] | None = None

    @classmethod
    def of(
        cls, config: Config, tokenizer: Tokenizer, read_example: Callable[[], dict[str, Tensor]] | None = None
    ) -> Facts:
        return cls(
            tokenizer.vocab_size,
            config.data.sequence_length,
            config.train.steps,
            tokenizer,
            tuple(config.data.classes or ()),
            read_example,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the example: processes that an objective is sent to make examples, and ask for none."""
        return {name: value for name, value in vars(self).items() if name != "example"} | {"read_example": None}

    @cached_property
    def example(self) -> dict[str, Tensor]:
        """Returns a batch [1, ...] of the run, on the CPU, as the objective makes it: names, shapes and types count,
        its values are those of any row. It is read on first use; an objective may not use it in its constructor."""
        if self.read_example is None:
            raise NoExample("these facts were made without data")
        return self.read_example()
