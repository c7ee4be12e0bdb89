"""Reading ahead: threads or processes make the next items; order and errors are those of a plain loop.

The processes are not torch's DataLoader: that one wraps a worker's error in text, waits 5 s for a busy worker when it
is closed, and leaves a busy one behind when its parent is killed.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
import torch.multiprocessing

from trainer.errors import ConfigError, Crashed
from trainer.processes import remove_afterwards

T = TypeVar("T")

_LONGEST_TEMPDIR = 107 - len("/pymp-01234567/listener-01234567")  # longest TMPDIR that a socket's address has room for
_LATE_S = 0.5  # after this wait, a reader may give an item up
_PATIENCE_S = 0.5  # how long close() waits for items in progress
_KILLED_S = 0.2  # how long a killed process may take to end
_NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_WHAT_KILLS = {
    signal.SIGKILL: "; most likely memory ran out: lower data.workers",
    signal.SIGBUS: "; most likely shared memory (/dev/shm) is full: enlarge it or lower data.workers",
}


def read_ahead(
    make: Callable[[int], T], first: int, *, depth: int, workers: int, processes: bool = False
) -> ReadAhead[T]:
    """Returns an iterator of `make(first)`, `make(first + 1)`, ..., made by `workers` threads at most `depth` items
    ahead.

    With `processes` every worker is a process: `make` and the items must be picklable, tensors come back through shared
    memory. Raises ConfigError if `make` is not picklable. If a process dies, its item raises Crashed.
    """
    if depth < 1 or workers < 1:
        raise ValueError(f"depth and workers must be >= 1, not {depth} and {workers}")
    workers = min(workers, depth)
    return ReadAhead(_processes(make, workers) if processes else [make] * workers, first, depth)


class ReadAhead(Iterator[T], Generic[T]):
    """Yields items in order. An error of a maker is raised in place of its item, and again at every later `next`.

    After `close` (also by garbage collection and at interpreter exit) there are no more items. Every maker has its own
    thread; a thread that is stuck is left behind.
    """

    def __init__(self, makers: Sequence[Callable[[int], T]], first: int, depth: int):
        self._shelf: _Shelf[T] = _Shelf(first, depth)
        threads = [
            threading.Thread(target=self._shelf.fill, args=(make,), name="read-ahead", daemon=True) for make in makers
        ]
        for thread in threads:
            thread.start()
        # Registered now to run at exit before multiprocessing waits for its processes, and while the interpreter is
        # whole: a thread must not be in foreign code when it goes.
        processes = [make for make in makers if isinstance(make, _Process)]
        self._close = weakref.finalize(self, _shut_down, self._shelf, threads, processes)
        atexit.register(self._close)

    def __iter__(self) -> ReadAhead[T]:
        return self

    def __next__(self) -> T:
        return self._shelf.take()

    def take(self, give_up: Callable[[], bool]) -> T | None:
        """Returns the next item. While it is late, `give_up` is called now and then; returns None once that is true."""
        while not self._shelf.wait(_LATE_S):
            if give_up():
                return None
        return self._shelf.take()

    def close(self) -> None:
        """Stops reading ahead and drops what was read. Returns within a second, whatever the makers do."""
        self._close()
        atexit.unregister(self._close)


class _Shelf(Generic[T]):
    """Holds what the threads share. Has no reference to the ReadAhead, so that it can be garbage-collected."""

    def __init__(self, first: int, depth: int):
        self.owner = os.getpid()
        self._depth = depth
        self._closed = False
        self._failed = False
        self._next_to_make = self._next_to_return = first  # numbers of items
        self._results: dict[int, tuple[T | None, BaseException | None]] = {}
        self._changed = threading.Condition()  # on a reentrant lock: garbage collection closes wherever it runs

    def fill(self, make: Callable[[int], T]) -> None:
        try:
            while (number := self._claim_next()) is not None:
                try:
                    self._store(number, make(number), None)
                except BaseException as error:  # the consumer must hear of any end
                    self._store(number, None, error)
        finally:
            if isinstance(make, _Process):
                make.close()

    def _claim_next(self) -> int | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._failed or self._next_to_make < self._next_to_return + self._depth
            )
            if self._closed or self._failed:
                return None
            self._next_to_make += 1
            return self._next_to_make - 1

    def _store(self, number: int, item: T | None, error: BaseException | None) -> None:
        with self._changed:
            self._failed |= error is not None
            if not self._closed:
                self._results[number] = (item, error)
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or self._next_to_return in self._results, seconds)

    def take(self) -> T:
        with self._changed:
            self.wait()
            if self._closed:
                raise StopIteration
            item, error = self._results[self._next_to_return]
            if error is not None:
                raise error  # and keeps it: every later call raises it again
            del self._results[self._next_to_return]
            self._next_to_return += 1
            self._changed.notify_all()
            return cast(T, item)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._results.clear()
            self._changed.notify_all()


def _shut_down(shelf: _Shelf[Any], threads: list[threading.Thread], processes: list[_Process]) -> None:
    if os.getpid() != shelf.owner:  # a fork has neither the threads nor the workers
        return
    shelf.close()
    end = time.monotonic() + _PATIENCE_S
    # Garbage collection may run in one of them.
    other_threads = [thread for thread in threads if thread is not threading.current_thread()]
    for thread in other_threads:
        thread.join(max(0.0, end - time.monotonic()))
    for process in processes:
        process.kill(max(0.0, end - time.monotonic()))
    end = time.monotonic() + _KILLED_S
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for thread in other_threads if processes else []:  # they waited for the processes
        thread.join(max(0.0, end - time.monotonic()))


def _processes(make: Callable[[int], T], workers: int) -> list[_Process]:
    try:
        pickled = pickle.dumps(make, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # objects may raise anything
        raise ConfigError(f"data.processes=true: {type(error).__name__}: {error}") from error
    # Neither fork, which copies locks that threads hold and a CUDA context that is of no use, nor spawn, which pays for
    # an import of torch in every worker (143 MB and 1.4 s against 4 MB and 5 ms).
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    # Launchers signal every process of a job; what a signal means is the trainer's business alone.
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:
        _remove_sockets_afterwards()
        return [_Process(context, pickled) for _ in range(workers)]
    except OSError as error:  # no place for sockets, none that is short enough, no more processes
        tempdir = tempfile.gettempdir()
        raise ConfigError(f"data.processes=true: cannot start processes: {error} (TMPDIR={tempdir})") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


@functools.cache
def _remove_sockets_afterwards() -> None:
    """Has the workers' folder of sockets removed even if this process is killed."""
    usual_tempdir = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TEMPDIR:
        tempfile.tempdir = "/tmp"
    try:
        remove_afterwards(Path(get_temp_dir()))
    finally:
        tempfile.tempdir = usual_tempdir


class _Process:
    """Runs a process that makes items, for one thread. The process ends when its connection closes or its parent
    ends."""

    def __init__(self, context: Any, pickled: bytes):
        self._connection, child_connection = context.Pipe()
        with child_connection:
            self._process = context.Process(
                target=_serve, args=(pickled, child_connection), name="read-ahead", daemon=True
            )
            self._process.start()

    def __call__(self, number: int) -> Any:
        try:
            self._connection.send(number)
            item, error, trace = self._connection.recv()
        except (EOFError, OSError) as broken_pipe:
            raise Crashed(f"a data worker process {self._describe_end()}") from broken_pipe
        if error is not None:
            raise error from RuntimeError(f"in a data worker process:\n{trace}")
        return item

    def _describe_end(self) -> str:
        self._process.join(_KILLED_S)
        code = self._process.exitcode
        if code is None or code >= 0:
            return f"ended by itself (exit code {code})"
        return f"was killed by {signal.Signals(-code).name}{_WHAT_KILLS.get(signal.Signals(-code), '')}"

    def close(self) -> None:
        self._connection.close()

    def kill(self, patience_s: float) -> None:
        """Kills the process, unless it ends within `patience_s`."""
        self._process.join(patience_s)
        if self._process.is_alive():
            self._process.kill()

    def join(self, timeout: float) -> None:
        self._process.join(timeout)


def _serve(pickled: bytes, connection: Connection) -> None:
    """Runs in a worker process: numbers in, (item, error, traceback) out, until the other end is closed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    make: Callable[[int], Any] | None = None
    with suppress(EOFError, OSError):
        while True:
            number = connection.recv()
            try:
                make = make or pickle.loads(pickled)  # in here: a missing module is an error like any other
                answer = ForkingPickler.dumps((make(number), None, ""))
            except BaseException as error:
                answer = ForkingPickler.dumps((None, _make_portable(error), traceback.format_exc()))
            connection.send_bytes(answer)


def _make_portable(error: BaseException) -> BaseException:
    """Returns the error itself if it survives pickling, else a RuntimeError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # its class may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        time.sleep(1)  # an idle worker ends by itself, and cleans up
        os._exit(1)
