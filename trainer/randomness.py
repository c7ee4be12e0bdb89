"""Every random draw is a function of counters (seed, epoch, sample, layer, name), never of a generator's history.

That is what makes a draw the same on any process, at any time, after any number of interruptions.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def key(*parts: int | str) -> int:
    """Returns a 63-bit integer that names the tuple `parts`, the same on every machine and Python version."""
    return int.from_bytes(_hash(*parts).digest(), "little") >> 1


def keys(*parts: int | str) -> Callable[[int], int]:
    """Returns `key(*parts, n)` as a function of the integer `n` alone, for many of them."""
    prefix = _hash(*parts)

    def key_of(n: int) -> int:
        digest = prefix.copy()
        digest.update(b"\x1fint:%d" % n)
        return int.from_bytes(digest.digest(), "little") >> 1

    return key_of


def seed_torch(seed: int, device: torch.device) -> None:
    """Seeds the generators that a model on `device` draws from by default: its own, and the CPU's.

    `torch.manual_seed` seeds all devices of the machine, and looks each kind of them up: a hundred times the cost.
    """
    import torch  # late: readers of data have no use for it

    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _hash(*parts: int | str) -> blake2b:
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return blake2b(text.encode(), digest_size=8)
