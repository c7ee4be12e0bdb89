"""What was opened last is kept, as much of it as a process may hold open."""

from __future__ import annotations

import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_FILES_EACH = 2  # of what is open for a shard; its bytes, its tokens, how they are packed are kept apart
_MOST, _MOST_EACH, _FEWEST = 16384, 4096, 4  # a mapping takes no file, but they have a limit, too
_keepers: weakref.WeakSet[Any] = weakref.WeakSet()


def share_descriptors(keeper: Any) -> None:
    """Makes an object one of those that share the descriptors of this process, as long as it lives."""
    _keepers.add(keeper)


def open_room() -> int:
    """Returns how many shards each object that keeps shards open may hold: together they take half of the files that
    the process may open, as its limit is now."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = _MOST if files == resource.RLIM_INFINITY else min(_MOST, files // 2 // _FILES_EACH)
    return min(_MOST_EACH, max(_FEWEST, room // max(1, len(_keepers))))


class RecentCache(Generic[T]):
    """The values that were asked for last, by number, as many as there is room for. Any thread may ask; a copy in
    another process is empty."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, T] = OrderedDict()
        self._lock = threading.Lock()
        share_descriptors(self)

    def get(self, number: int, make: Callable[[int], T]) -> T:
        """The value of `number`, made if it is not there; maybe by several threads at once."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        value, room = make(number), open_room()
        with self._lock:
            self._kept[number] = value
            while len(self._kept) > room:
                self._kept.popitem(last=False)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return RecentCache, ()
