"""Words of messages: what is nearest to a value that is refused."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest_hint(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; there are: {', '.join(sorted(known))}"


def multiples(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`."""
    below, above = value // unit * unit, (value // unit + 1) * unit
    return f"{below} or {above}" if below else f"{above}"


def divisor(of: int, at_most: int) -> int:
    """The largest divisor that is not above `at_most`."""
    return max(size for size in range(1, of + 1) if of % size == 0 and size <= max(1, at_most))
