"""Documents to sequences: a lane is the endless concatenation of its documents, cut every `length` tokens."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.data.index import Shards
from trainer.data.order import Order
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError

Tokens = npt.NDArray[np.int32]
CACHE_BYTES = 64 << 20


class Piece(NamedTuple):
    """Input tokens [first_token, end_token) of one document; its separator counts as its last token."""

    shard: str
    key: str
    first_token: int
    end_token: int


class Documents:
    """The tokens of every sample, ended by the separator; the last used are kept, up to `cache_bytes`."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer, cache_bytes: int = CACHE_BYTES):
        self._shards, self._tokenizer = shards, tokenizer
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, Tokens] = OrderedDict()
        self._room = cache_bytes

    def tokens(self, sample: int) -> Tokens:
        """int32 [n], n >= 1, read-only. DataError, naming shard and key, if the sample is not UTF-8 text."""
        with self._lock:
            cached = self._cache.get(sample)
            if cached is not None:
                self._cache.move_to_end(sample)
                return cached
        tokens = self._encode(sample)
        with self._lock:
            if sample not in self._cache:  # another thread may have been first
                self._cache[sample] = tokens
                self._room -= tokens.nbytes
            while self._room < 0:
                self._room += self._cache.popitem(last=False)[1].nbytes
        return tokens

    def piece(self, sample: int, first: int, end: int) -> Piece:
        """The tokens [first, end) of `sample` by the names that a person knows."""
        return Piece(*self._shards.name(sample), first, end)

    def _encode(self, sample: int) -> Tokens:
        try:
            text = self._shards.read(sample).decode("utf-8")
        except UnicodeDecodeError as error:
            shard, key = self._shards.name(sample)
            raise DataError(f"{shard}: sample {key!r} is not UTF-8 text (at its byte {error.start})") from None
        ids = self._tokenizer.encode(text)
        tokens = np.empty(len(ids) + 1, dtype=np.int32)
        tokens[:-1] = ids
        tokens[-1] = self._tokenizer.separator
        tokens.flags.writeable = False
        return tokens


class Lane:
    """A place in one lane of `order`: the next document (epoch, index) and the first unread token in it."""

    def __init__(self, number: int, order: Order, documents: Documents, cursor: Sequence[int]):
        self._number, self._order, self._documents = number, order, documents
        self._epoch, self._index, self._offset = cursor
        self._size = order.lane_size(number)
        if not (self._epoch >= 0 and 0 <= self._index < self._size and self._offset >= 0):
            raise ValueError(f"lane {number} has {self._size} samples an epoch and cannot stand at {cursor}")
        self._sample = 0
        self._tokens: Tokens | None = None  # of the open document; None: not opened yet

    @property
    def cursor(self) -> tuple[int, int, int]:
        """(epoch, index, offset), with offset always inside the document."""
        return self._epoch, self._index, self._offset

    def read(self, row: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """Fill `row`, int64 [length + 1], with the next `length` tokens and one more, which stays unread.

        Returns the (sample, first, end) that the `length` tokens were taken from, in order.
        """
        length, filled = len(row) - 1, 0
        pieces = []
        while filled < length:
            tokens, first = self._open(), self._offset
            end = min(len(tokens), first + length - filled)
            row[filled : filled + end - first] = tokens[first:end]
            pieces.append((self._sample, first, end))
            filled += end - first
            self._move(end)
        row[length] = self._open()[self._offset]
        return pieces

    def skip(self, length: int) -> None:
        """Walk past the next `length` tokens."""
        while length:
            first = self._offset
            end = min(len(self._open()), first + length)
            length -= end - first
            self._move(end)

    def _open(self) -> Tokens:
        if self._tokens is None:
            self._sample = self._order.sample(self._epoch, self._number, self._index)
            tokens = self._documents.tokens(self._sample)
            if self._offset >= len(tokens):
                piece = self._documents.piece(self._sample, self._offset, self._offset)
                raise DataError(
                    f"{piece.shard}: sample {piece.key!r} has {len(tokens)} tokens, but the run stands at "
                    f"its token {self._offset}: data or tokenizer is not what the run began with."
                )
            self._tokens = tokens
        return self._tokens

    def _move(self, end: int) -> None:
        """The open document is read up to `end`; at its end the next one is due."""
        self._offset = end
        if end == len(self._open()):
            self._tokens, self._offset, self._index = None, 0, self._index + 1
            if self._index == self._size:
                self._epoch, self._index = self._epoch + 1, 0
