"""Work in processes that never outlive the one that asked for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from trainer.data.storage import command
from trainer.errors import OnecurveError

T = TypeVar("T")

_GRACE_S = 2  # how long processes may take to end those that they started
_AHEAD = 16  # items for each process that may be begun before the first of them is asked for


class Workers:
    """Calls functions in `count` processes, or here if it is 1. Functions and arguments must be picklable.

    As a context: all processes are gone at its end, whatever they were doing if it ends by an exception.
    """

    def __init__(self, count: int):
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.count > 1:  # spawned: no locks, threads or open files of ours
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, _begin)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._pool is None:
            return
        if error is not None:
            processes = list((getattr(self._pool, "_processes", None) or {}).values())
            for process in processes:
                process.terminate()  # see _begin
            end = time.monotonic() + _GRACE_S
            for process in processes:
                process.join(max(0, end - time.monotonic()))
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """The future of a call. What it raises is raised by `result`."""
        if self._pool is not None:
            return self._pool.submit(function, *arguments)
        future: Future[T] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def in_order(self, function: Callable[..., T], items: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """What comes of each item's arguments, in the order of the items."""
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(self.submit(function, *item))
            if self._pool is None or len(waiting) >= _AHEAD * self.count:
                yield result(waiting.popleft())
        while waiting:
            yield result(waiting.popleft())


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def result(future: Future[T]) -> T:
    """The future's result. Raises `OnecurveError` if its process was killed."""
    try:
        return future.result()
    except BrokenProcessPool:
        raise OnecurveError("a worker process was killed; most likely memory ran out: give fewer --workers") from None


def _begin() -> None:
    """In a new process: an interrupt is its parent's business, and so is its life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=_end, daemon=True).start())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end() -> None:
    """At once, whatever is being done, but not without the commands that were started for it."""
    command.end_all()
    os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _end()
