"""The threads of a process that fetch remote bytes: one a connection. Work of one name is done once."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import cache

WAITING = 64  # the most hints that may wait; more are dropped


class _Job:
    def __init__(self, name: Hashable, work: Callable[[], bytes]):
        self.name, self.work = name, work
        self.future: Future[bytes] = Future()
        self.is_started = False


class Pool:
    """Runs work in at most `connections` daemon threads (which end with the process, whatever they wait for): first the
    work that a reader waits for, then the rest. Work of one name is shared while it is pending."""

    def __init__(self, connections: int):
        self._connections = connections
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._jobs: dict[Hashable, _Job] = {}
        self._urgent: deque[_Job] = deque()
        self._hints: deque[_Job] = deque()
        self._threads = self._idle = 0

    def result(self, name: Hashable, work: Callable[[], bytes]) -> Future[bytes]:
        """Submits `work` and returns its future, or that of pending work of this name."""
        with self._lock:
            if (job := self._jobs.get(name)) is None:
                job = self._jobs[name] = _Job(name, work)
            elif job.is_started:
                return job.future
            self._urgent.append(job)  # may wait in both queues: the thread that takes it first does it
            self._wake()
            return job.future

    def foresee(self, name: Hashable, work: Callable[[], bytes], max_waiting: int = WAITING) -> None:
        """Submits work that nobody waits for yet, unless `max_waiting` such items are waiting already."""
        with self._lock:
            if name not in self._jobs and len(self._hints) < max_waiting:
                job = self._jobs[name] = _Job(name, work)
                self._hints.append(job)
                self._wake()

    def forget(self, belongs: Callable[[Hashable], bool]) -> None:
        """Drops work that has not started and that nobody waits for."""
        with self._lock:
            awaited = {id(job) for job in self._urgent}
            for job in [
                job for job in self._hints if belongs(job.name) and id(job) not in awaited and not job.is_started
            ]:
                self._hints.remove(job)
                del self._jobs[job.name]

    def _wake(self) -> None:
        if len(self._urgent) + len(self._hints) > self._idle and self._threads < self._connections:
            threading.Thread(target=self._run, name="onecurve-fetch", daemon=True).start()
            self._threads += 1
        self._ready.notify()

    def _run(self) -> None:
        while True:
            job = self._take()
            try:
                result = job.work()
            except BaseException as error:
                self._done(job)
                job.future.set_exception(error)
            else:
                self._done(job)
                job.future.set_result(result)
            del job

    def _take(self) -> _Job:
        with self._ready:
            while True:
                while queue := self._urgent or self._hints:
                    if not (job := queue.popleft()).is_started:
                        job.is_started = True
                        return job
                self._idle += 1
                self._ready.wait()
                self._idle -= 1

    def _done(self, job: _Job) -> None:
        with self._lock:
            del self._jobs[job.name]


@cache
def shared(connections: int) -> Pool:
    """Returns the process's pool."""
    return Pool(connections)


os.register_at_fork(after_in_child=shared.cache_clear)
