"""Packing: documents to sequences, the examples that a run shuffles. A sequence's tokens depend on the data alone.

`concat` cuts the token line every `length` tokens. `best_fit` puts whole documents of a shard together, as tightly as
they fit (Ding et al., "Fewer truncations improve language modeling", 2024): only those longer than a sequence are cut.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.data import array_cache
from trainer.data.recent_cache import RecentCache
from trainer.data.shared_work import ALONE, WorkSharing
from trainer.data.tokens import TokenLine
from trainer.errors import ConfigError

NO_TARGET = -100
BEST_FIT = "best_fit-1"  # part of the cache files' names: a change of the algorithm needs another one

Row = dict[str, npt.NDArray[np.int64]]
Numbers = npt.NDArray[np.int64]


class Span(NamedTuple):
    """Names input tokens [first_token, end_token) of one document; its separator counts as its last token."""

    shard: str
    key: str
    first_token: int
    end_token: int


class Concatenated:
    """Cuts the line every `length` tokens: example i is tokens [i * length, (i + 1) * length); only the last
    may be short."""

    def __init__(self, line: TokenLine, length: int):
        self.n = -(-line.total // length)
        self._length, self._total = length, line.total

    def ranges(self, example_index: int) -> list[tuple[int, int]]:
        """Returns the ranges of the token line that make the example."""
        return [(example_index * self._length, min((example_index + 1) * self._length, self._total))]


class BestFit:
    """Makes each example of whole documents of one shard; cuts only documents that are longer than a sequence.

    How a shard is packed is computed once, and kept beside its tokens.
    """

    def __init__(self, line: TokenLine, length: int, team: WorkSharing):
        self._line, self._length = line, length
        self._open: RecentCache[Numbers] = RecentCache()
        shards = list(range(len(line.starts) - 1))
        self._starts = np.cumsum([0, *team.share("packed shards", shards, self._count)])
        self.n = int(self._starts[-1])

    def ranges(self, example_index: int) -> list[tuple[int, int]]:
        shard = int(np.searchsorted(self._starts, example_index, side="right")) - 1
        packed, base, number = (
            self._packed_spans(shard),
            int(self._line.starts[shard]),
            example_index - int(self._starts[shard]),
        )
        first, end = np.searchsorted(packed[0], [number, number + 1])
        return [(base + begin, base + stop) for begin, stop in packed[1:, first:end].T.tolist()]

    def _count(self, shard: int) -> int:
        return int(self._packed_spans(shard)[0].max(initial=-1)) + 1

    def _packed_spans(self, shard: int) -> Numbers:
        """Returns for each span of the shard its example, first and end token in the shard: int64 [3, spans]."""
        return self._open.get(shard, self._load)

    def _load(self, shard: int) -> Numbers:
        ends, path = self._line.shard(shard).ends, self._line.derived_path(shard, f"{BEST_FIT}-{self._length}.npy")
        tokens = int(ends[-1]) if len(ends) else 0
        packed = array_cache.load_array(path)
        if packed is not None and int((packed[2] - packed[1]).sum()) == tokens:
            return packed
        spans = [
            (first, min(first + self._length, end))
            for begin, end in pairwise([0, *ends.tolist()])
            for first in range(begin, end, self._length)
        ]
        bins = best_fit([end - first for first, end in spans], self._length)
        rows = [(example_index, *spans[i]) for example_index, items in enumerate(bins) for i in items]
        packed = np.array(rows, np.int64).reshape(-1, 3).T.copy()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            array_cache.save_array(path, packed)
        except OSError as error:
            raise ConfigError(f"data.cache: {path} cannot be written: {error.strerror}") from error
        return packed


class Packed:
    """Packs documents into sequences of `length` tokens, the examples of a run; see `trainer.data.stream.Source`.

    A row is {"inputs", "targets"}, int64 [length] each. Every token of the line is an input once an epoch, and its
    target is the token that follows it. There is no target (-100) at the end of the data set, nor at the end of a
    document if `document_mask` is on or unrelated documents are packed together (`best_fit`). With `document_mask` a
    row also has "documents" and "positions": which of the row's documents a token is in (-1: none), and its place
    there, counted from 0 at the row's or the document's start.
    """

    def __init__(
        self,
        line: TokenLine,
        length: int,
        *,
        packing: str = "concat",
        document_mask: bool = False,
        team: WorkSharing = ALONE,
    ):
        self._line, self._length, self._document_mask = line, length, document_mask
        self._layout: Any = Concatenated(line, length) if packing == "concat" else BestFit(line, length, team)
        self._is_continuous = packing == "concat"  # whether consecutive ranges are consecutive text
        self.n = self._layout.n
        self.bytes = line.total * 2
        self.faults, self.fingerprint = line.faults, line.fingerprint

    def read(self, example_index: int, draw: int) -> Row:
        """Reads the row of an example."""
        ranges = self._layout.ranges(example_index)
        if not self._document_mask and self._is_continuous:
            (first, end), (inputs, targets) = ranges[0], self._empty()
            tokens = self._line.read(first, end - first + 1)
            inputs[: end - first] = tokens[: end - first]
            targets[: len(tokens) - 1] = tokens[1:]
            return {"inputs": inputs, "targets": targets}
        return self._row(ranges)

    def foresee(self, example_indices: Sequence[int]) -> None:
        """Hints that these examples will be read soon."""
        if self._line.foresees:
            for example_index in example_indices:
                for first, end in self._layout.ranges(example_index):
                    self._line.foresee(first, end)

    def entry(self, example_index: int) -> list[Span]:
        """Returns the example as the ledger names it."""
        return [
            Span(*self._line.shards.name(int(self._line.shards.starts[shard]) + document), first, end)
            for begin, stop in self._layout.ranges(example_index)
            for shard, document, first, end in self._line.documents(begin, stop)
        ]

    def _row(self, ranges: Sequence[tuple[int, int]]) -> Row:
        inputs, targets = self._empty()
        documents, positions = np.full(self._length, -1, np.int64), np.zeros(self._length, np.int64)
        at = number = 0
        for first, end in ranges:
            tokens = self._line.read(first, end - first + 1).astype(np.int64)
            for shard, document, begin, stop in self._line.documents(first, end):
                count, whole = stop - begin, stop == self._document_size(shard, document)
                inputs[at : at + count] = tokens[:count]
                following = tokens[1 : count + 1]
                targets[at : at + len(following)] = following
                if whole and (self._document_mask or not self._is_continuous):
                    targets[at + count - 1] = NO_TARGET  # what comes next is another text
                documents[at : at + count], positions[at : at + count] = number, np.arange(count)
                at, number, tokens = at + count, number + 1, tokens[count:]
        row = {"inputs": inputs, "targets": targets}
        return row | {"documents": documents, "positions": positions} if self._document_mask else row

    def _document_size(self, shard: int, document: int) -> int:
        ends = self._line.shard(shard).ends
        return int(ends[document]) - (int(ends[document - 1]) if document else 0)

    def _empty(self) -> tuple[Numbers, Numbers]:
        return np.zeros(self._length, np.int64), np.full(self._length, NO_TARGET, np.int64)


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Packs items by best-fit decreasing: the longest first, each into the fullest bin that still has room for it.

    Returns the bins, each the sorted indexes of its items. `sizes` are 1..room.
    """
    bins: list[list[int]] = []
    bins_by_space: dict[int, list[int]] = defaultdict(list)
    spaces: list[int] = []  # the different amounts of free space in bins, rising
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect_left(spaces, sizes[i])
        if at == len(spaces):
            number, space = len(bins), room
            bins.append([])
        else:
            space = spaces[at]
            number = bins_by_space[space].pop()
            if not bins_by_space[space]:
                del spaces[at]
        bins[number].append(i)
        remaining = space - sizes[i]
        if remaining:
            if not bins_by_space[remaining]:
                insort(spaces, remaining)
            bins_by_space[remaining].append(number)
    return [sorted(items) for items in bins]
