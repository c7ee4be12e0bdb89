"""The order of samples: pure integer functions of (seed, epoch, lane, index), with no tables and no state.

Nothing in this module depends on ranks or workers.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from functools import lru_cache
from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.randomness import key as random_key

# Stored with a run: any change of the functions below, of how a mixture is dealt or how documents are packed needs
# another name.
ORDER = "lanes-1"

_MASK = (1 << 64) - 1
_ROUNDS = 8  # after 4, neighbors in a range of 64 are still neighbors 1.7 times as often as by chance
_BLOCK_BYTES = 4 << 20

Numbers = npt.NDArray[np.int64]

_key = lru_cache(maxsize=4096)(random_key)


def permute(i: int, n: int, key: int) -> int:
    """Returns where `i` goes in the permutation of 0..n-1 that `key` selects, for any n >= 1 and 0 <= i < n.

    An alternating Feistel network over a rectangle of a x b >= n cells, almost square, with modular
    addition; cells >= n are walked through again (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002). Fewer than n + sqrt(n) + 1 cells, so a second walk is rare.
    """
    a, b = _rectangle(n)
    keys = _round_keys(key)
    while True:
        left, right = divmod(i, b)
        for turn in range(0, _ROUNDS, 2):
            left = (left + _mix(right ^ keys[turn])) % a
            right = (right + _mix(left ^ keys[turn + 1])) % b
        i = left * b + right
        if i < n:
            return i


def unpermute(j: int, n: int, key: int) -> int:
    """Inverts `permute`: `unpermute(permute(i, n, key), n, key) == i`."""
    a, b = _rectangle(n)
    keys = _round_keys(key)
    while True:
        left, right = divmod(j, b)
        for turn in range(_ROUNDS - 2, -1, -2):
            right = (right - _mix(left ^ keys[turn + 1])) % b
            left = (left - _mix(right ^ keys[turn])) % a
        j = left * b + right
        if j < n:
            return j


def permute_many(numbers: Numbers, n: int, key: int) -> Numbers:
    """Permutes each of `numbers`, int64 [k]: the same function as `permute`, 100 times faster for thousands of them."""
    a, b = map(np.uint64, _rectangle(n))
    keys = [np.uint64(part) for part in _round_keys(key)]
    result, waiting, cells = np.empty(len(numbers), np.int64), np.arange(len(numbers)), numbers.astype(np.uint64)
    while len(waiting):
        left, right = np.divmod(cells, b)
        for turn in range(0, _ROUNDS, 2):
            left = (left + _mix(right ^ keys[turn]) % a) % a  # reduced first: uint64 must not overflow
            right = (right + _mix(left ^ keys[turn + 1]) % b) % b
        cells = left * b + right
        inside = cells < np.uint64(n)
        result[waiting[inside]] = cells[inside]
        waiting, cells = waiting[~inside], cells[~inside]
    return result


def default_block(n_samples: int, total_bytes: int, lanes: int) -> int:
    """Returns the number of samples a block: about 4 MiB of them, but at least 4 blocks a lane if there are enough."""
    by_bytes = _BLOCK_BYTES * n_samples // max(total_bytes, 1)
    return max(1, min(by_bytes, n_samples // (4 * min(lanes, n_samples))))


_cached_unpermute = lru_cache(maxsize=256)(unpermute)


class Order:
    """Orders `samples` virtual samples, dealt to `lanes`: every epoch is a permutation of all of them.

    Epoch e permutes the blocks (`block` consecutive samples, the last one may be short) into a row. Lane j
    owns the j-th contiguous part of the row; within it, windows of `window` blocks' worth of samples (the
    last one may be shorter) are permuted sample by sample.

    `lanes` is capped at `samples`, so that no lane is empty. Every query takes O(1) time and memory.
    """

    def __init__(self, samples: int, lanes: int, window: int, block: int, seed: int):
        if min(samples, lanes, window, block) < 1:
            raise ValueError(f"none may be < 1: {samples=}, {lanes=}, {window=}, {block=}")
        self.samples = samples
        self.lanes = min(lanes, samples)
        self.window, self.block, self.seed = window, block, seed
        self._blocks = -(-samples // block)
        self._short = samples - (self._blocks - 1) * block  # samples of the last block, 1..block

    def lane_size(self, lane: int) -> int:
        """Returns the number of samples of an epoch in `lane`; it differs by at most one between lanes."""
        return self.samples // self.lanes + (lane < self.samples % self.lanes)

    def sample(self, epoch: int, lane: int, index: int) -> int:
        """Returns the virtual sample, 0..samples-1, that is number `index` (< lane_size) of `lane` in `epoch`."""
        size = self.lane_size(lane)
        if not 0 <= index < size:
            raise IndexError(f"lane {lane} has {size} samples an epoch, not one of number {index}")
        length = self.window * self.block
        number = index // length
        start = number * length
        window_offset = permute(
            index - start, min(length, size - start), _key(self.seed, "window", epoch, lane, number)
        )
        return self._row(epoch, self._lane_start(lane) + start + window_offset)

    def window_samples(self, epoch: int, lane: int, number: int) -> Numbers:
        """Returns the virtual samples of window `number` of `lane` in their order, int64 [<= window * block].

        `window_samples(e, j, i // length)[i % length]` is `sample(e, j, i)` for length = window * block.
        """
        length, size = self.window * self.block, self.lane_size(lane)
        start = number * length
        if not 0 <= start < size:
            raise IndexError(f"lane {lane} has {-(-size // length)} windows an epoch, not one of number {number}")
        count = min(length, size - start)
        window_offsets = permute_many(np.arange(count), count, _key(self.seed, "window", epoch, lane, number))
        places = self._lane_start(lane) + start + window_offsets
        places += (places >= self._end_of_short_block(epoch)) * (self.block - self._short)
        slots, offsets = np.divmod(places, self.block)
        first = int(slots.min())  # a window's slots are neighbors
        blocks = permute_many(np.arange(first, int(slots.max()) + 1), self._blocks, self._blocks_key(epoch))
        return blocks[slots - first] * self.block + offsets

    def at(self, position: int) -> tuple[int, int, int]:
        """Returns (epoch, lane, index) of the run's sample number `position`: lanes take turns, epoch after epoch."""
        epoch, place = divmod(position, self.samples)
        return epoch, place % self.lanes, place // self.lanes

    def _lane_start(self, lane: int) -> int:
        """Returns the place in the row at which the part of `lane` begins."""
        return lane * (self.samples // self.lanes) + min(lane, self.samples % self.lanes)

    def _blocks_key(self, epoch: int) -> int:
        return _key(self.seed, "blocks", epoch)

    def _end_of_short_block(self, epoch: int) -> int:
        """Returns the place after the short block: places from there on lie as if the short block were a whole one."""
        return _cached_unpermute(self._blocks - 1, self._blocks, self._blocks_key(epoch)) * self.block + self._short

    def _row(self, epoch: int, place: int) -> int:
        """Returns the virtual sample at `place` (0..samples-1) of the epoch's row of permuted blocks."""
        if place >= self._end_of_short_block(epoch):
            place += self.block - self._short
        slot, offset = divmod(place, self.block)
        return permute(slot, self._blocks, self._blocks_key(epoch)) * self.block + offset


class Walk:
    """Looks up many positions of an `Order` at once, near each other as a run's are: it caches open windows.

    It is thread-safe. If the windows together would take more than `window_bytes`, samples are looked up one by one.
    """

    def __init__(self, order: Order, window_bytes: int = 64 << 20):
        self.order = order
        self._length = order.window * order.block
        self._room = max(1, window_bytes // (8 * self._length))
        self._windows: OrderedDict[tuple[int, int, int], Numbers] = OrderedDict()

    def samples(self, positions: Numbers) -> Numbers:
        """Returns the virtual samples at `positions` of the run, int64 [k] both: `Order.sample(*Order.at(p))` of
        each."""
        epochs, places = np.divmod(positions, self.order.samples)
        indexes, lanes = np.divmod(places, self.order.lanes)
        numbers, offsets = np.divmod(indexes, self._length)
        windows = np.stack([epochs, lanes, numbers], axis=1)
        by_window = np.lexsort(windows.T)
        windows = windows[by_window]
        boundaries = np.flatnonzero(np.any(windows[1:] != windows[:-1], axis=1)) + 1
        samples = np.empty(len(positions), np.int64)
        for part in np.split(by_window, boundaries) if len(positions) else ():
            key = (int(epochs[part[0]]), int(lanes[part[0]]), int(numbers[part[0]]))
            if self._room >= self.order.lanes or 64 * len(part) > self._length:
                samples[part] = self._window(key)[offsets[part]]
            else:
                samples[part] = [self.order.sample(key[0], key[1], index) for index in indexes[part].tolist()]
        return samples

    def _window(self, key: tuple[int, int, int]) -> Numbers:
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = self.order.window_samples(*key)
            with suppress(KeyError):  # another thread was faster
                while len(self._windows) > 2 * self._room:
                    self._windows.popitem(last=False)
        return window


@lru_cache(maxsize=256)
def _rectangle(n: int) -> tuple[int, int]:
    """Returns sides a >= b with a * b >= n: a = ceil(sqrt(n)), and the smallest b."""
    a = isqrt(n - 1) + 1
    return a, -(-n // a)


@lru_cache(maxsize=4096)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(_mix(key + turn) for turn in range(_ROUNDS))


def _mix(x: Any) -> Any:
    """SplitMix64's step (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).

    Of an int below 2^64, or of a uint64 array, whose sums and products wrap by themselves.
    """
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
