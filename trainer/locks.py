"""Locks on shared storage: the kernel's, which end with their process; where a file system has none, files that name
their holder, and outlive a machine that breaks down."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

RUN = ".lock"
TELL_S = 10.0  # how long a lock is waited for before that is reported


def acquire(path: Path, timeout: float = 0) -> BaseFileLock:
    """Returns the lock, held. Raises Timeout where another process has it, OSError where there can be none."""
    lock = FileLock(path)  # where the file system has no flock (Lustre without -o flock) it is a file that stays
    try:
        lock.acquire(timeout=timeout)
    except NotImplementedError as error:  # filelock of before it had that
        raise OSError(errno.ENOSYS, "the file system has no locks; a newer filelock does without", str(path)) from error
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise OSError(error.errno, f"{error.strerror} (NFS without its lock service?)", str(path)) from error
        raise
    return lock


def acquire_run(run_dir: Path) -> BaseFileLock:
    """Returns the lock of a run's folder, which whoever trains there holds. Raises Timeout, OSError."""
    return acquire(run_dir / RUN)


def taken(run_dir: Path) -> str:
    """Says that a run's folder is locked, and by whom where only a file tells."""
    return f"another process trains in this folder{holder(run_dir / RUN)}"


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
    """Says who holds a lock that is only a file, and what to do where that process is gone; empty for the kernel's."""
    try:
        pid, host = path.read_text().splitlines()[:2]
    except (OSError, ValueError):
        return ""
    return f": process {pid} on {host} holds {path}; if that process is gone, delete this file"
