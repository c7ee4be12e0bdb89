"""Work done in a fork of this process, of which nothing stays behind: no threads, no connections."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

from trainer.errors import ConfigError, Crashed, OnecurveError

T = TypeVar("T")


def run_in_fork(make: Callable[[], T]) -> T:
    """Returns what `make` does, which must be picklable. Raises ConfigError with the problems of an OnecurveError;
    where there is no fork, or a daemon may have no children, it is made here."""
    if "fork" not in multiprocessing.get_all_start_methods() or multiprocessing.current_process().daemon:
        return make()
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(make, sending), daemon=True)
    with receiving, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: this one needs none of them
        process.start()
        sending.close()
        try:
            made, problems, code = receiving.recv()
        except EOFError:
            process.join()
            raise Crashed(f"a process that opens remote shards ended with code {process.exitcode}") from None
    process.join()
    if problems is not None:
        raise ConfigError(problems, code)
    return made


def _send(make: Callable[[], object], sending: Connection) -> None:
    try:
        answer: tuple[object, list[str] | None, int] = (make(), None, 0)
    except OnecurveError as error:
        answer = (None, str(error).split("\n"), error.exit_code)
    with sending:
        sending.send(answer)
