"""Measures shards: samples, bytes, fields, sizes, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from trainer.data import tokenizer as tokenization
from trainer.data.index import Numbers, ShardIndex
from trainer.data.shards import Shards
from trainer.data.storage import Storage, shown
from trainer.errors import ConfigError, DataError

_SAMPLE_BYTES = 1 << 20  # bytes of text that an estimate is made from
TOKEN_ID_BYTES = {"u16": 2, "u32": 4}  # by extension


@dataclass(frozen=True)
class Measured:
    """The measurements of one shard. `fields`: extension -> (samples that have it, bytes); `sizes`: bytes of each
    sample, int64 [n]; `tokens`: None if unknown."""

    size: int
    samples: int
    fields: dict[str, tuple[int, int]]
    sizes: Numbers
    tokens: int | None


def measure(url: str, storage: Storage, field: str | None = None, tokenizer: str | None = None) -> Measured:
    """Measures a shard by its index, which is built if necessary. Counts the tokens of a member u16 or u32 or, with a
    `tokenizer`, those of the text `field`, separators included. Raises `DataError`, and `ConfigError` if no sample has
    that field."""
    index = ShardIndex.open(url, storage)
    fields = index.summary.fields
    tokens = None
    if tokenizer is not None:
        if (field := field or "txt") not in fields:
            choices = ", ".join(sorted(fields)) or "nothing"
            raise ConfigError(f"--field {field}: no sample of {shown(url)} has it; there is: {choices}")
        tokens = _count(index, storage, field, _tokenizer(tokenizer))
    else:
        for extension, width in TOKEN_ID_BYTES.items():
            if extension in fields:
                tokens = (tokens or 0) + fields[extension][1] // width
    return Measured(index.size, len(index.keys), fields, index.sizes(), tokens)


@lru_cache(maxsize=1)
def _tokenizer(spec: str) -> tokenization.Tokenizer:
    return tokenization.load(spec)


def _count(index: ShardIndex, storage: Storage, field: str, tokenizer: tokenization.Tokenizer) -> int:
    tokens = 0
    offsets, sizes = index.field(field)
    with closing(storage.open(index.url)) as blob:
        for key, at, size in zip(index.keys, offsets.tolist(), sizes.tolist(), strict=True):
            if at < 0:
                continue
            try:
                tokens += len(tokenizer.encode(str(blob.read(at, size), "utf-8"))) + 1
            except UnicodeDecodeError as error:
                place, byte = shown(index.url), at + error.start
                raise DataError(
                    f"{place}: byte {byte}: sample {key!r}: is not UTF-8 text", shard=place, key=key, byte=byte
                ) from None
    return tokens


def about_tokens(shards: Shards, tokenizer: tokenization.Tokenizer) -> int:
    """Estimates the number of tokens of the texts of the shards, separators included, from an even sample of them."""
    step = -(-shards.bytes // _SAMPLE_BYTES) or 1
    texts = [bytes(shards.read(v)) for v in range(0, shards.n, step)]
    tokens = sum(len(tokenizer.encode(str(content, "utf-8"))) for content in texts)
    return round(tokens * shards.bytes / max(1, sum(map(len, texts)))) + shards.n


def sum_measured(parts: Sequence[Measured]) -> dict[str, Any]:
    """Returns the sums over all shards, JSON-able. `histogram`: [least size, size above the largest, samples] of each
    bin; bins are powers of two."""
    sizes = np.concatenate([part.sizes for part in parts])
    fields: dict[str, dict[str, int]] = {}
    for part in parts:
        for name, (count, size) in part.fields.items():
            sums = fields.setdefault(name, {"samples": 0, "bytes": 0})
            sums["samples"] += count
            sums["bytes"] += size
    totals: dict[str, Any] = {
        "shards": len(parts),
        "samples": len(sizes),
        "bytes": sum(part.size for part in parts),
        "fields": dict(sorted(fields.items())),
    }
    if len(sizes):
        totals["sample_bytes"] = {
            "min": int(sizes.min()),
            "median": float(np.median(sizes)),
            "mean": float(sizes.mean()),
            "max": int(sizes.max()),
        }
        totals["histogram"] = _histogram(sizes)
    if any(part.tokens is not None for part in parts):
        totals["tokens"] = sum(part.tokens or 0 for part in parts)
    return totals


def _histogram(sizes: Numbers) -> list[list[int]]:
    bits = np.frexp(sizes.astype(np.float64))[1]  # of a size from 2^(b-1) to below 2^b: b
    counts = np.bincount(bits).tolist()
    first = int(bits.min())
    return [[(1 << bit) >> 1, 1 << bit, counts[bit]] for bit in range(first, len(counts))]
