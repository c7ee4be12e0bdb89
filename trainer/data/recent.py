"""What was made last is kept, up to a number of things."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """The `room` values that were asked for last, by number. Any thread may ask; a copy in another process is empty."""

    def __init__(self, room: int):
        self._room = room
        self._kept: OrderedDict[int, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int, make: Callable[[int], T]) -> T:
        """The value of `number`, made if it is not there; maybe by several threads at once."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        value = make(number)
        with self._lock:
            self._kept[number] = value
            while len(self._kept) > self._room:
                self._kept.popitem(last=False)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self._room,)
