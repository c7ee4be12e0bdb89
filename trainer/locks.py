"""Locks on shared storage: the kernel's, which end with their process, or, where a file system has none (Lustre without
`-o flock`), leases, which end a while after it."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from trainer import leases
from trainer.leases import Lease

RUN = ".lock"
LEASE = ".lease"  # suffix of the lease that stands for a lock
REPORT_AFTER_S = 10.0  # how long a lock is waited for before that is reported
REFUSED = {
    errno.ENOLCK: "its lock service does not answer; start NFS's lockd, or mount with -o local_lock=flock",
    errno.EOPNOTSUPP: "its file system cannot lock files; mount it so that it can, or choose a folder elsewhere",
}


class Lock(Protocol):
    """A lock that this process holds."""

    def release(self) -> None: ...


class NoLocks(OSError):
    """A file system refuses locks, for the reason in the text."""


def acquire(path: Path, timeout: float = 0, poll_s: float = 0.05) -> Lock:
    """Takes a lock and returns it. Raises Timeout where another process has it, OSError where it cannot be taken."""
    try:
        if not has_flock(path):
            return Lease(lease_of(path), timeout, poll_s)
        lock = FileLock(path)
        lock.acquire(timeout=timeout, poll_interval=poll_s)
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise NoLocks(error.errno, f"{error.strerror}: {REFUSED[error.errno]}", str(path)) from error
    return lock


def has_flock(path: Path) -> bool:
    """Returns whether the kernel locks files there, as releasing a lock that is not ours shows. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def lease_of(path: Path) -> Path:
    """Returns the file that stands for a lock where the file system has none."""
    return path.with_name(path.name + LEASE)


def acquire_run(run_dir: Path) -> Lock:
    """Takes the lock of a run directory, which every process that trains there holds. Raises Timeout, OSError."""
    return acquire(run_dir / RUN)


def describe_run_lock(run_dir: Path) -> str:
    """Returns the sentence that a run directory is locked, and by whom where a lease says so."""
    return f"another process trains in this folder{holder(run_dir / RUN)}"


def describe_refusal(error: OSError) -> str:
    """Returns whether a folder could not be locked or not be written, and why, for messages."""
    return f"cannot be {'locked' if isinstance(error, NoLocks) else 'written'}: {error.strerror or error}"


@contextmanager
def hold(path: Path, timeout: float, poll_s: float) -> Iterator[None]:
    """Holds the lock. Raises what `acquire` raises."""
    lock = acquire(path, timeout, poll_s)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def hold_when_free(path: Path) -> Iterator[None]:
    """Waits for the lock as long as another process has it, and holds it; a long wait is reported."""
    try:
        lock = acquire(path, REPORT_AFTER_S)
    except Timeout:
        print(f"onecurve: waiting for the lock {path}{holder(path)}", file=sys.stderr, flush=True)
        lock = acquire(path, -1)
    try:
        yield
    finally:
        lock.release()


def holder(path: Path) -> str:
    """Returns who holds a lock that is a lease, and when the lease ends should that process be gone, for messages;
    empty for a lock of the kernel."""
    try:
        lease = leases.observe(lease_of(path))
    except OSError:
        lease = None
    if lease is None:
        return ""
    expiry = f"if that process is gone, {leases.LEASE_S:g} s later the same command goes on"
    return f" ({lease_of(path)}: {leases.describe(lease)}; {expiry})"
