"""Locks where a file system has none: files that say who holds them since when. Their holder renews them while it
lives; what was not renewed for a while is taken over, also from a machine that broke down.

Nothing but exclusive creation and renaming is needed of the file system, and no clock but that of who looks.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from trainer.processes import boot_id, process_exists, start_time

LEASE_S = 60.0  # without being renewed: then a lease is taken over
RENEW_S = 10.0
SETTLE_S = 1.0  # after a lease was taken over, before it counts: another one may have tried at the same time
TELL_S = 1.0  # how long it may be unclear whether the holder lives, before that is reported


class Owner(NamedTuple):
    """Who holds a lease. `boot`: of which machine the process number is, `started`: of which process."""

    host: str
    boot: str
    pid: int
    started: str | None
    since: float
    id: str

    @property
    def lives_here(self) -> bool:
        """Whether it is a process of this machine that is still there."""
        return self.boot == boot_id() and process_exists(self.pid, self.started)

    @property
    def has_ended(self) -> bool:
        """Whether it was a process of this machine, and is there no more."""
        return self.boot == boot_id() and not process_exists(self.pid, self.started)


class ObservedLease(NamedTuple):
    """A lease as it was found. `owner`: None while it is being written."""

    owner: Owner | None
    inode: int
    renewed_ns: int


def observe(path: Path) -> ObservedLease | None:
    """The lease as it is now; None where there is none. Raises OSError."""
    try:
        with open(path, "rb") as file:
            found, now = file.read(), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    owner = None
    with suppress(ValueError, TypeError):
        owner = Owner(**json.loads(found))
    return ObservedLease(owner, now.st_ino, now.st_mtime_ns)


class Lease:
    """A lease that this process holds, renewed by a thread until it is released."""

    def __init__(self, path: Path, timeout: float, poll_s: float):
        """Takes it. Raises Timeout where another process holds it, once `timeout` (negative: none) is over and it is
        known that the other one lives; OSError."""
        self._path, pid = path, os.getpid()
        self._owner = Owner(os.uname().nodename, boot_id(), pid, start_time(pid), time.time(), uuid.uuid4().hex)
        self._lock, self._is_released = threading.Lock(), threading.Event()
        try:
            self._take(timeout, poll_s)
        except OSError:
            self.release()
            raise
        threading.Thread(target=self._renew, name="onecurve-lease", daemon=True).start()

    def release(self) -> None:
        with self._lock, suppress(OSError):  # what stays there is taken over
            self._is_released.set()
            if self._is_ours():
                self._path.unlink(missing_ok=True)

    def _take(self, timeout: float, poll_s: float) -> None:
        began, is_told = time.monotonic(), False
        seen, since, looked, is_renewed = None, began, began, False
        while not self._create():
            if (found := observe(self._path)) is None:
                continue  # released at this moment
            now = time.monotonic()
            if found != seen:
                seen, since, is_renewed = found, now, seen is not None
            elif now - looked > LEASE_S / 2:  # the storage was away: who holds it could not renew it either
                since = now
            looked = now
            if now - since >= LEASE_S or (found.owner and found.owner.has_ended):
                if self._take_over(found):
                    return
                continue
            is_alive = is_renewed or (found.owner is not None and found.owner.lives_here)
            if is_alive and 0 <= timeout <= now - began:
                raise Timeout(str(self._path))
            if not is_alive and not is_told and now - began > TELL_S:
                is_told = True
                text = f"waiting up to {LEASE_S:g} s to see whether that process lives"
                print(f"onecurve: {self._path}: held by {describe(found)}; {text}", file=sys.stderr, flush=True)
            time.sleep(poll_s)

    def _create(self) -> bool:
        """Makes the file unless there is one; returns whether there was none."""
        try:
            file = open(self._path, "x")  # noqa: SIM115
        except FileExistsError:
            return False
        try:
            with file:
                json.dump(self._owner._asdict(), file)
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _take_over(self, found: ObservedLease) -> bool:
        """Puts ours in the place of a lease whose holder is gone; returns whether it is ours then."""
        aside = self._path.with_name(f"{self._path.name}.{self._owner.id}")
        if observe(self._path) != found:
            return False
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return False
        is_another = observe(aside) != found  # renewed or taken meanwhile: not ours to take
        if is_another:
            with suppress(OSError):  # there is one again; or no hard links: its holder makes it anew
                os.link(aside, self._path)
        aside.unlink(missing_ok=True)
        if is_another or not self._create():
            return False
        time.sleep(SETTLE_S)  # who looked before that, and renames only now, takes ours away
        return self._is_ours()

    def _is_ours(self) -> bool:
        found = observe(self._path)
        return found is not None and found.owner == self._owner

    def _renew(self) -> None:
        while not self._is_released.wait(RENEW_S):
            with self._lock, suppress(OSError):  # storage that is away for now: again in a moment
                if self._is_released.is_set():
                    return
                if self._is_ours():
                    os.utime(self._path)
                elif not self._create():
                    text = "was not renewed for too long and is another process's now; two may write there"
                    print(f"onecurve: the lease {self._path} {text}", file=sys.stderr, flush=True)
                    return


def describe(found: ObservedLease) -> str:
    """Who holds a lease, for messages."""
    age = max(0, round(time.time() - found.renewed_ns / 1e9))
    if found.owner is None:
        return f"an unknown process, {age} s old"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.owner.since))
    return f"process {found.owner.pid} on {found.owner.host} since {since}, renewed {age} s ago"
