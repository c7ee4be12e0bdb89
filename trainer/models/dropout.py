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
    p = 0, `x` is returned unchanged. The hash is two multiply-xorshift rounds per element on a well mixed row key
    (constants of xxHash32, rows mixed by splitmix64: Steele et al., OOPSLA 2014).
    """
    if p == 0 or draws is None:
        return x
    rows, columns = _keys(draws, site, x.shape[1], x.shape[2])
    bits = rows[:, :, None] ^ columns
    bits = bits * -2048144777  # 0x85EBCA77; int32 products wrap
    bits = (bits ^ (bits >> 15)) * -1640531535  # 0x9E3779B1
    bits = bits ^ (bits >> 13)
    dropped = (bits & 0x7FFFFFFF) < int(p * 2**31)
    return (x * (1 / (1 - p))).masked_fill(dropped, 0.0)


@torch.library.custom_op("onecurve::dropout_keys", mutates_args=())
def _keys(draws: Tensor, site: int, length: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns the keys of rows, int32 [B, length], and of columns, [width]. Opaque to torch.compile: in the C++ that it
    writes for CPUs, 64-bit products that wrap are undefined, and came out wrong (torch 2.13)."""
    rows = _splitmix64(draws[:, None] + _splitmix64(torch.arange(length, device=draws.device) + (site << 32)))
    columns = _splitmix64(torch.arange(width, device=draws.device) + (1 << 62))
    return rows.to(torch.int32), columns.to(torch.int32)


@_keys.register_fake
def _(draws: Tensor, site: int, length: int, width: int) -> tuple[Tensor, Tensor]:
    return draws.new_empty((len(draws), length), dtype=torch.int32), draws.new_empty(width, dtype=torch.int32)


def _splitmix64(x: Tensor) -> Tensor:
    """Applies the finalizer of splitmix64 to int64 values (products wrap, shifts are logical)."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)
