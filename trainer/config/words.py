"""Suggests the nearest alternatives to a refused value, for messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest_hint(word: str, choices: Iterable[str]) -> str:
    close = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; there are: {', '.join(sorted(choices))}"


def multiples(value: int, unit: int) -> str:
    """Returns the multiples of `unit` around `value`."""
    below, above = value // unit * unit, (value // unit + 1) * unit
    return f"{below} or {above}" if below else f"{above}"


def divisor(number: int, at_most: int) -> int:
    """Returns the largest divisor of `number` that is not above `at_most`."""
    return max(size for size in range(1, number + 1) if number % size == 0 and size <= max(1, at_most))
