"""Reading ahead: a thread that keeps the order, hands errors on and never holds up the end of the process."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar, cast

T = TypeVar("T")
Job = TypeVar("Job")

_PATIENCE_S = 0.5  # how long close() waits for the item that is being made


class Prefetch(Iterator[T], Generic[T]):
    """The items of `iterator`, made by a daemon thread at most `depth` items ahead of the consumer.

    An error of the iterator is raised where its item would have come, and again at every later `next`.
    After `close` (also by garbage collection and at interpreter exit) there are no more items. Nobody else
    may use the iterator afterwards: a thread that is stuck in it is left behind, still holding it.
    """

    def __init__(self, iterator: Iterator[T], depth: int):
        if depth < 1:
            raise ValueError(f"depth must be >= 1, not {depth}")
        self._channel: _Channel[T] = _Channel(depth)
        thread = threading.Thread(target=self._channel.fill, args=(iterator,), name="prefetch", daemon=True)
        thread.start()
        # Runs at exit too, while the interpreter is whole: a thread must not be in foreign code when it goes.
        self._close = weakref.finalize(self, _shut, self._channel, thread)

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        return self._channel.take()

    def close(self) -> None:
        """Stop reading ahead and drop what was read. Returns within a second, whatever the iterator does."""
        self._close()


def concurrently(function: Callable[[Job], object], jobs: Iterable[Job]) -> None:
    """Call `function` for every job, each in a daemon thread, and wait; the first error is raised.

    Not a `ThreadPoolExecutor`: the interpreter would wait for its threads at exit, however long they take.
    """
    readers = [Prefetch(map(function, [job]), 1) for job in jobs]
    for reader in readers:
        next(reader)


class _Channel(Generic[T]):
    """What the two threads share. It does not know the Prefetch, so that a dropped one can be collected."""

    def __init__(self, depth: int):
        self._closed = False
        self._free = threading.Semaphore(depth)
        self._items: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def fill(self, iterator: Iterator[T]) -> None:
        while True:
            self._free.acquire()
            if self._closed:
                return
            try:
                self._items.put((next(iterator), None))
            except BaseException as error:  # StopIteration included: every end belongs to the consumer
                self._items.put((None, error))
                return

    def take(self) -> T:
        if self._closed:
            raise StopIteration
        item, error = self._items.get()
        if error is not None:
            self._items.put((None, error))  # it stays the last word
            raise error
        self._free.release()
        return cast(T, item)

    def close(self) -> None:
        self._closed = True
        self._free.release()  # wakes a waiting producer
        self._items.put((None, StopIteration()))  # and a waiting consumer


def _shut(channel: _Channel[T], thread: threading.Thread) -> None:
    channel.close()
    if thread is not threading.current_thread():  # garbage collection may run anywhere
        thread.join(_PATIENCE_S)
