"""Dropout whose mask is a function of (sequence, layer, position, channel), not of a generator's history.

The same sequence gets the same mask on any process, in any micro-batch, after any resume, and again when activation
checkpointing recomputes it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dropout(x: Tensor, p: float, draws: Tensor | None, site: int) -> Tensor:
    """Zeroes a share `p` of `x` [B, T, C] and scales the rest by 1 / (1 - p).

    `draws` [B] int64 names each sequence; `site` numbers the place in the model. Without `draws` (evaluation) or with
    p = 0, `x` is returned as it is. The hash is two multiply-xorshift rounds per element on a well mixed row key
    (constants of xxHash32, rows mixed by splitmix64: Steele et al., OOPSLA 2014).
    """
    if p == 0 or draws is None:
        return x
    _, length, width = x.shape
    rows = _splitmix64(draws[:, None] + _splitmix64(torch.arange(length, device=x.device) + (site << 32)))
    columns = _splitmix64(torch.arange(width, device=x.device) + (1 << 62))
    bits = rows.to(torch.int32)[:, :, None] ^ columns.to(torch.int32)
    bits = bits * -2048144777  # 0x85EBCA77; int32 products wrap
    bits = (bits ^ (bits >> 15)) * -1640531535  # 0x9E3779B1
    bits = bits ^ (bits >> 13)
    dropped = (bits & 0x7FFFFFFF) < int(p * 2**31)
    return (x * (1 / (1 - p))).masked_fill(dropped, 0.0)


def _splitmix64(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 on int64 (products wrap, shifts made logical)."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)
