"""Runs functions in processes that never outlive their parent."""

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

_GRACE_S = 2  # how long processes may take to end their children
_AHEAD = 16  # items per process that may be submitted before the first result is consumed


class Workers:
    """Calls functions in `count` processes, or in this one if `count` is 1. Functions and arguments must be picklable.

    A context manager: at its end all processes are gone, busy ones too if it ends by an exception.
    """

    def __init__(self, count: int):
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.count > 1:  # spawned: no locks, threads or open files of ours
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, _set_up_worker)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._pool is None:
            return
        if error is not None:
            processes = list((getattr(self._pool, "_processes", None) or {}).values())
            for process in processes:
                process.terminate()  # see _set_up_worker
            end = time.monotonic() + _GRACE_S
            for process in processes:
                process.join(max(0, end - time.monotonic()))
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Returns the future of a call. `result` raises what the call raises."""
        if self._pool is not None:
            return self._pool.submit(function, *arguments)
        future: Future[T] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def in_order(self, function: Callable[..., T], items: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Yields the result for the arguments of each item, in the order of the items."""
        pending: deque[Future[T]] = deque()
        for item in items:
            pending.append(self.submit(function, *item))
            if self._pool is None or len(pending) >= _AHEAD * self.count:
                yield result(pending.popleft())
        while pending:
            yield result(pending.popleft())


def cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def result(future: Future[T]) -> T:
    """Returns the result of a future. Raises `OnecurveError` if its process was killed."""
    try:
        return future.result()
    except BrokenProcessPool:
        raise OnecurveError("a worker process was killed; most likely memory ran out: give fewer --workers") from None


def _set_up_worker() -> None:
    """Sets up a new process: it ignores interrupts, which its parent handles, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=_exit_worker, daemon=True).start())
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_worker() -> None:
    """Exits at once, after ending the commands that this process started."""
    command.end_all()
    os._exit(1)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _exit_worker()
