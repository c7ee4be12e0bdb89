"""Every random draw is a function of counters (seed, epoch, sample, layer, name), never of a generator's history.

That is what makes a draw the same on any process, at any time, after any number of interruptions.
"""

from __future__ import annotations

from hashlib import blake2b


def key(*parts: int | str) -> int:
    """A 63-bit integer that names the tuple `parts`, the same on every machine and Python version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
