"""Locks for file systems without any: files that say who holds them since when. The holder renews its lease while it
lives; a lease that was not renewed for a while is taken over, also from a machine that broke down.

The file system must support exclusive creation and renaming, and no clock matters but that of the process that looks.
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

LEASE_S = 60.0  # a lease that was not renewed for so long is taken over
RENEW_S = 10.0
SETTLE_S = 1.0  # after a lease was taken over, before it counts: another process may have tried at the same time
REPORT_AFTER_S = 1.0  # how long it may be unclear whether the holder lives, before that is reported


class Owner(NamedTuple):
    """The process that holds a lease. `boot`: the boot of its machine, `started`: the start time of the process."""

    host: str
    boot: str
    pid: int
    started: str | None
    since: float
    id: str

    @property
    def lives_here(self) -> bool:
        """Returns whether it is a process of this machine that still exists."""
        return self.boot == boot_id() and process_exists(self.pid, self.started)

    @property
    def has_ended(self) -> bool:
        """Returns whether it was a process of this machine that no longer exists."""
        return self.boot == boot_id() and not process_exists(self.pid, self.started)


class ObservedLease(NamedTuple):
    """The state of a lease file. `owner`: None while it is being written."""

    owner: Owner | None
    inode: int
    renewed_ns: int


def observe(path: Path) -> ObservedLease | None:
    """Returns the lease as it is now; None where there is none. Raises OSError."""
    try:
        with open(path, "rb") as file:
            content, status = file.read(), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    owner = None
    with suppress(ValueError, TypeError):
        owner = Owner(**json.loads(content))
    return ObservedLease(owner, status.st_ino, status.st_mtime_ns)


class Lease:
    """A lease that this process holds, renewed by a thread until it is released."""

    def __init__(self, path: Path, timeout: float, poll_s: float):
        """Takes the lease. Raises Timeout where another process that is known to live holds it after `timeout` seconds
        (negative: no limit); OSError."""
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
        with self._lock, suppress(OSError):  # a file that stays is taken over
            self._is_released.set()
            if self._is_ours():
                self._path.unlink(missing_ok=True)

    def _take(self, timeout: float, poll_s: float) -> None:
        began, is_reported = time.monotonic(), False
        last_lease, unchanged_since, last_look_at, is_renewed = None, began, began, False
        while not self._create():
            if (lease := observe(self._path)) is None:
                continue  # released at this moment
            now = time.monotonic()
            if lease != last_lease:
                last_lease, unchanged_since, is_renewed = lease, now, last_lease is not None
            elif now - last_look_at > LEASE_S / 2:  # storage was away: the holder could not renew the lease either
                unchanged_since = now
            last_look_at = now
            if now - unchanged_since >= LEASE_S or (lease.owner and lease.owner.has_ended):
                if self._take_over(lease):
                    return
                continue
            is_alive = is_renewed or (lease.owner is not None and lease.owner.lives_here)
            if is_alive and 0 <= timeout <= now - began:
                raise Timeout(str(self._path))
            if not is_alive and not is_reported and now - began > REPORT_AFTER_S:
                is_reported = True
                text = f"waiting up to {LEASE_S:g} s to see whether that process lives"
                print(f"onecurve: {self._path}: held by {describe(lease)}; {text}", file=sys.stderr, flush=True)
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

    def _take_over(self, lease: ObservedLease) -> bool:
        """Replaces a lease whose holder is gone by ours; returns whether we then hold it."""
        aside = self._path.with_name(f"{self._path.name}.{self._owner.id}")
        if observe(self._path) != lease:
            return False
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return False
        is_another = observe(aside) != lease  # renewed or taken meanwhile: not ours to take
        if is_another:
            with suppress(OSError):  # it exists again; or no hard links: its holder creates it again
                os.link(aside, self._path)
        aside.unlink(missing_ok=True)
        if is_another or not self._create():
            return False
        time.sleep(SETTLE_S)  # a process that looked before that, and renames only now, takes ours away
        return self._is_ours()

    def _is_ours(self) -> bool:
        lease = observe(self._path)
        return lease is not None and lease.owner == self._owner

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


def describe(lease: ObservedLease) -> str:
    """Returns who holds a lease, for messages."""
    age = max(0, round(time.time() - lease.renewed_ns / 1e9))
    if lease.owner is None:
        return f"an unknown process, {age} s old"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lease.owner.since))
    return f"process {lease.owner.pid} on {lease.owner.host} since {since}, renewed {age} s ago"
