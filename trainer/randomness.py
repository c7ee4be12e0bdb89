"""Every random draw is a function of counters (seed, epoch, sample, layer, name), never of a generator's history.

That is what makes a draw the same on any process, at any time, after any number of interruptions.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b


def key(*parts: int | str) -> int:
    """A 63-bit integer that names the tuple `parts`, the same on every machine and Python version."""
    return int.from_bytes(_hash(*parts).digest(), "little") >> 1


def keys(*parts: int | str) -> Callable[[int], int]:
    """`key(*parts, n)` as a function of the integer `n` alone, for many of them."""
    begun = _hash(*parts)

    def of(n: int) -> int:
        whole = begun.copy()
        whole.update(b"\x1fint:%d" % n)
        return int.from_bytes(whole.digest(), "little") >> 1

    return of


def _hash(*parts: int | str) -> blake2b:
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return blake2b(text.encode(), digest_size=8)
