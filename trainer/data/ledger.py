"""The ledger of what was trained on: rows of `ledger.jsonl`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any


def rows(parts: Iterable[tuple[int, list[tuple[int, Any]]]]) -> list[dict[str, Any]]:
    """Builds one row a step, in order, from the (step, [(number in the run, entry), ...]) of all ranks in any order.

    A row is {"step": s, "samples": [entry, ...]} in global order. Raises ValueError if a sequence comes twice.
    """
    steps: dict[int, dict[int, Any]] = defaultdict(dict)
    for step, entries in parts:
        numbered = dict(entries)
        if duplicates := steps[step].keys() & numbered:
            raise ValueError(f"the ledger has sequences {sorted(duplicates)} of step {step} twice")
        steps[step].update(numbered)
    return [{"step": step, "samples": [entry for _, entry in sorted(steps[step].items())]} for step in sorted(steps)]
