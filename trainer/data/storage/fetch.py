"""The threads of a process that fetch from remote places: as many as connections, each piece of work done once."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import cache

WAITING = 64  # hints that may wait at most; more are dropped


class _Job:
    def __init__(self, name: Hashable, work: Callable[[], bytes]):
        self.name, self.work = name, work
        self.future: Future[bytes] = Future()
        self.taken = False


class Pool:
    """Runs work in at most `connections` daemon threads (which end with the process, whatever they wait for): first
    what a reader waits for, then what was only foreseen. Work of one name that is under way is shared."""

    def __init__(self, connections: int):
        self._connections = connections
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._jobs: dict[Hashable, _Job] = {}
        self._now: deque[_Job] = deque()
        self._later: deque[_Job] = deque()
        self._threads = self._idle = 0

    def result(self, name: Hashable, work: Callable[[], bytes]) -> Future[bytes]:
        """The result of `work`, or of the work of this name that was handed in before."""
        with self._lock:
            if (job := self._jobs.get(name)) is None:
                job = self._jobs[name] = _Job(name, work)
            elif job.taken:
                return job.future
            self._now.append(job)  # may wait in both queues: whoever takes it first does it
            self._wake()
            return job.future

    def foresee(self, name: Hashable, work: Callable[[], bytes], waiting: int = WAITING) -> None:
        """Hands in work that nobody waits for yet, unless as much as `waiting` is waiting already."""
        with self._lock:
            if name not in self._jobs and len(self._later) < waiting:
                job = self._jobs[name] = _Job(name, work)
                self._later.append(job)
                self._wake()

    def forget(self, belongs: Callable[[Hashable], bool]) -> None:
        """Drops foreseen work that was not begun and that nobody waits for."""
        with self._lock:
            awaited = {id(job) for job in self._now}
            for job in [job for job in self._later if belongs(job.name) and id(job) not in awaited and not job.taken]:
                self._later.remove(job)
                del self._jobs[job.name]

    def _wake(self) -> None:
        if len(self._now) + len(self._later) > self._idle and self._threads < self._connections:
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
                while queue := self._now or self._later:
                    if not (job := queue.popleft()).taken:
                        job.taken = True
                        return job
                self._idle += 1
                self._ready.wait()
                self._idle -= 1

    def _done(self, job: _Job) -> None:
        with self._lock:
            del self._jobs[job.name]


@cache
def shared(connections: int) -> Pool:
    """The process's pool."""
    return Pool(connections)


os.register_at_fork(after_in_child=shared.cache_clear)
