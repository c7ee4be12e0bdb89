"""Locks on shared storage: the kernel's, which end with their process; where a file system has none (Lustre without
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
LEASE = ".lease"  # behind the name of the lock that a lease stands for
TELL_S = 10.0  # how long a lock is waited for before that is reported
REFUSED = {
    errno.ENOLCK: "its lock service does not answer; start NFS's lockd, or mount with -o local_lock=flock",
    errno.EOPNOTSUPP: "its file system cannot lock files; mount it so that it can, or choose a folder elsewhere",
}


class Lock(Protocol):
    """A lock that is held."""

    def release(self) -> None: ...


class NoLocks(OSError):
    """A file system that refuses locks, and why."""


def acquire(path: Path, timeout: float = 0, poll_s: float = 0.05) -> Lock:
    """Returns the lock, held. Raises Timeout where another process has it, OSError where there can be none."""
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
    """Whether the kernel locks files there: asked by giving back a lock that is not ours. Raises OSError."""
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
    """The file that stands for a lock where there is no other."""
    return path.with_name(path.name + LEASE)


def acquire_run(run_dir: Path) -> Lock:
    """Returns the lock of a run's folder, which whoever trains there holds. Raises Timeout, OSError."""
    return acquire(run_dir / RUN)


def describe_run_lock(run_dir: Path) -> str:
    """Says that a run's folder is locked, and by whom where a file tells."""
    return f"another process trains in this folder{holder(run_dir / RUN)}"


def refused(error: OSError) -> str:
    """Says what could not be done in a folder that is locked before it is written."""
    return f"cannot be {'locked' if isinstance(error, NoLocks) else 'written'}: {error.strerror or error}"


@contextmanager
def hold(path: Path, timeout: float, poll_s: float) -> Iterator[None]:
    """Holds the lock. Raises as `acquire`."""
    lock = acquire(path, timeout, poll_s)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def waited_for(path: Path) -> Iterator[None]:
    """Holds the lock, however long another process has it; that one is named when it takes long."""
    try:
        lock = acquire(path, TELL_S)
    except Timeout:
        print(f"onecurve: waiting for the lock {path}{holder(path)}", file=sys.stderr, flush=True)
        lock = acquire(path, -1)
    try:
        yield
    finally:
        lock.release()


def holder(path: Path) -> str:
    """Says who holds a lock that is a lease, and when that ends should it be gone; empty for the kernel's."""
    try:
        found = leases.observe(lease_of(path))
    except OSError:
        found = None
    if found is None:
        return ""
    gone = f"if that process is gone, {leases.LEASE_S:g} s later the same command goes on"
    return f" ({lease_of(path)}: {leases.describe(found)}; {gone})"
