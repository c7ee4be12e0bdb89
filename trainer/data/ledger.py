"""What was trained on, as rows of `ledger.jsonl`: formatting only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from trainer.data.packing import Piece


def rows(parts: Iterable[tuple[int, int, int, list[list[Piece]]]]) -> list[dict[str, Any]]:
    """One row a step, steps rising, from the (step, first, stride, pieces) of all ranks in any order.

    A row is {"step": s, "samples": [[[shard, key, first_token, end_token], ...], ...]}: the sequences of the
    global batch in global order, each a list of pieces. ValueError if a rank's part of a step is missing or
    comes twice.
    """
    steps: dict[int, dict[int, list[Piece]]] = defaultdict(dict)
    sizes: dict[int, int] = {}
    for step, first, stride, pieces in parts:
        numbered = {first + i * stride: sequence for i, sequence in enumerate(pieces)}
        if twice := steps[step].keys() & numbered:
            raise ValueError(f"the ledger has sequences {sorted(twice)} of step {step} twice")
        steps[step].update(numbered)
        sizes[step] = stride * len(pieces)
    for step, sequences in steps.items():
        if len(sequences) != sizes[step]:
            raise ValueError(f"the ledger has {len(sequences)} of the {sizes[step]} sequences of step {step}")
    return [{"step": step, "samples": _in_order(steps[step])} for step in sorted(steps)]


def _in_order(sequences: dict[int, list[Piece]]) -> list[list[list[str | int]]]:
    return [[list(piece) for piece in sequences[number]] for number in sorted(sequences)]
