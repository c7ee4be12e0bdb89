"""A process that has imported the trainer once, and forks the ranks of each life of a run: a restart takes no imports.

The supervisor writes an order a line to its socket, and reads there what became of the ranks. When the supervisor is
gone, however it went, so are this process and all ranks; when this process is, the kernel kills the ranks.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

from onecurve.paths import put_working_folder_last
from trainer.processes import die_with_parent, make_printing_safe

OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)  # the supervisor's to understand
LEFTOVERS_S = 3.0  # what children of a dead rank get to end by themselves: W&B's service writes what it has
_PR_SET_NAME = 15


def main() -> None:
    """Runs `python -m launch.forkserver SOCKET_FD`: serves, and in each forked rank trains and ends its process."""
    make_printing_safe()
    signal.pthread_sigmask(signal.SIG_BLOCK, OURS)  # what is sent to a rank before it is one waits for it
    import_module("torch._dynamo")  # which optimizers import
    import_module("trainer.run")
    import_module("trainer.registry").import_all()
    server = Server(socket.socket(fileno=int(sys.argv[1])))
    try:
        server.serve()
    except BecomeRank as rank:
        rank.become()
        from trainer.__main__ import guarded

        code = guarded(rank.arguments, time.monotonic())
        end(code)


def end(code: int) -> None:
    """Ends the process as multiprocessing's forks do: exit functions run, but the interpreter is not finalized, during
    which threads of libraries may abort."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class BecomeRank(Exception):  # no error: leaves the server's loop in the child
    """Turns this process into a rank, with its arguments and environment."""

    def __init__(self, arguments: list[str], environment: dict[str, str], parent: int):
        self.arguments, self.environment, self.parent = arguments, environment, parent

    def become(self) -> None:
        os.setsid()  # what it starts is found by its group, and a terminal's Ctrl-C does not come here
        die_with_parent(self.parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, OURS)
        os.environ.update(self.environment)
        rank = self.environment["RANK"]
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"onecurve-{rank}".encode(), 0, 0, 0)
        if rank != "0":
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Server:
    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.ranks: dict[int, int] = {}  # process id -> rank
        self.watched: dict[int, int] = {}  # pidfd -> process id
        self.leftovers: dict[int, float] = {}  # process group of a dead rank -> when what is left of it is killed
        self._unread = b""

    def serve(self) -> None:
        """Obeys orders until the other end is closed. Raises BecomeRank in the ranks."""
        try:
            while True:
                commands = self.connection.fileno()
                ready, _, _ = select.select([commands, *self.watched], [], [], 0.2 if self.leftovers else None)
                for descriptor in set(ready) & self.watched.keys():
                    self._report_end(descriptor)
                self._clear(time.monotonic())
                for order in self._orders() if commands in ready else ():
                    self._obey(order)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            for process in self.ranks:
                os.kill(process, signal.SIGKILL)  # it may have no group of its own yet
            for group in [*self.ranks, *self.leftovers]:
                _kill_group(group)

    def _orders(self) -> Iterator[dict[str, Any]]:
        received = self.connection.recv(1 << 16)
        if not received:
            raise EOFError
        *lines, self._unread = (self._unread + received).split(b"\n")
        return map(json.loads, lines)

    def _obey(self, order: dict[str, Any]) -> None:
        if "signal" in order:
            for process in self.ranks:  # not yet waited for: the numbers are still theirs
                os.kill(process, order["signal"])
            return
        store = os.memfd_create("onecurve-store")  # goes with its last process; nothing listens, nothing is left behind
        for environment in order["start"]:
            sys.stdout.flush()
            server = os.getpid()
            if not (process := os.fork()):
                self.connection.close()
                for descriptor in self.watched:
                    os.close(descriptor)
                environment["ONECURVE_STORE"] = f"/proc/self/fd/{store}"
                raise BecomeRank(order["arguments"], environment, server)
            self.ranks[process] = int(environment["RANK"])
            self.watched[os.pidfd_open(process)] = process
        os.close(store)

    def _report_end(self, descriptor: int) -> None:
        process = self.watched.pop(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(process, 0)
        self.leftovers[process] = time.monotonic() + LEFTOVERS_S
        report = {"rank": self.ranks.pop(process), "code": os.waitstatus_to_exitcode(status)}
        self.connection.sendall((json.dumps(report) + "\n").encode())

    def _clear(self, now: float) -> None:
        for group, deadline in list(self.leftovers.items()):
            if now > deadline or not _lives(group):
                _kill_group(group)
                del self.leftovers[group]


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    put_working_folder_last()
    main()
