"""A cache of what was opened last, as much of it as a process may hold open."""

from __future__ import annotations

import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_FILES_EACH = 2  # descriptors an entry; a shard's bytes, tokens and packing are separate entries
_MOST, _MOST_EACH, _FEWEST = 16384, 4096, 4  # a mapping takes no descriptor, but mappings have a limit, too
_keepers: weakref.WeakSet[Any] = weakref.WeakSet()


def share_descriptors(keeper: Any) -> None:
    """Adds an object to those that share the descriptors of this process, as long as it lives."""
    _keepers.add(keeper)


def open_room() -> int:
    """Returns how many shards each object that keeps shards open may hold: together they take half of the files that
    the process may open at its present limit."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = _MOST if files == resource.RLIM_INFINITY else min(_MOST, files // 2 // _FILES_EACH)
    return min(_MOST_EACH, max(_FEWEST, room // max(1, len(_keepers))))


class RecentCache(Generic[T]):
    """Caches the most recently used values by number, as many as there is room for. It is thread-safe; a copy in
    another process is empty."""

    def __init__(self) -> None:
        self._values: OrderedDict[int, T] = OrderedDict()
        self._lock = threading.Lock()
        share_descriptors(self)

    def get(self, number: int, make: Callable[[int], T]) -> T:
        """Returns the value of `number`; makes it if it is absent, maybe in several threads at once."""
        with self._lock:
            if number in self._values:
                self._values.move_to_end(number)
                return self._values[number]
        value, room = make(number), open_room()
        with self._lock:
            self._values[number] = value
            while len(self._values) > room:
                self._values.popitem(last=False)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return RecentCache, ()
