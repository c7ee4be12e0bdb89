"""Work done in a fork of this process, so that it leaves nothing behind: no threads, no connections."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

from trainer.errors import ConfigError, Crashed, OnecurveError

T = TypeVar("T")


def run_in_fork(work: Callable[[], T]) -> T:
    """Calls `work` in a fork and returns its result, which must be picklable. Raises ConfigError with the problems of
    an OnecurveError. Where there are no forks, or in a daemon, which may not fork, `work` is called in this process."""
    if "fork" not in multiprocessing.get_all_start_methods() or multiprocessing.current_process().daemon:
        return work()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(work, sender), daemon=True)
    with receiver, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forks beside threads: this one needs none
        process.start()
        sender.close()
        try:
            result, problems, exit_code = receiver.recv()
        except EOFError:
            process.join()
            raise Crashed(f"a process that opens remote shards ended with code {process.exitcode}") from None
    process.join()
    if problems is not None:
        raise ConfigError(problems, exit_code)
    return result


def _send(work: Callable[[], object], sender: Connection) -> None:
    try:
        answer: tuple[object, list[str] | None, int] = (work(), None, 0)
    except OnecurveError as error:
        answer = (None, str(error).split("\n"), error.exit_code)
    with sender:
        sender.send(answer)
