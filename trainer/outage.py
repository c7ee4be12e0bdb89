"""Storage that does not answer: the one rule of what that is, how long it is waited for, and how that is told.

What a file system says of a file (it is not there, it may not be read, too many are open) is an answer. Any other
error of the operating system while something is read means that there is none for now: a server restarts, a mount was
evicted, a disk is reset. That is not damage: only what was read, and is wrong, is damaged. So it is waited for, and at
the end of all patience it is an `Outage`, which nothing takes for a bad sample or a bad checkpoint.
"""

from __future__ import annotations

import errno
import logging
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from trainer.errors import Outage

T = TypeVar("T")
PATIENCE_S = 300.0
"""How long storage may be away while anything but a shard is read. Other ranks may wait in a collective meanwhile: half
of what `launch.timeout_s` is by default."""
LONGEST_WAIT_S = 8.0
TOLD_AFTER_S = 10.0  # of failures in a row
PROGRESS = 64 << 10  # bytes that an attempt must have brought for the failures before it to be forgotten

ANSWERS = frozenset(
    (
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.EBADF, errno.EFAULT, errno.EXDEV, errno.ESPIPE),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMLINK),
        *(errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOTTY, errno.EOVERFLOW, errno.ENXIO),
    )
)
"""Errors that say how it is with a file, with this process or with the file system."""
LIMITS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))
"""Errors among these that say nothing about the file."""
CANNOT_MAP = frozenset((errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP))
"""What `mmap` says of a file system that maps no files."""

log = logging.getLogger("onecurve")
_lock = threading.Lock()
_waited_for: dict[str, float] = {}  # since when


def is_outage(error: BaseException) -> bool:
    """Whether an error means that storage does not answer for now."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in ANSWERS


class Patience:
    """Waits between the attempts of one read: longer and longer, and not forever."""

    def __init__(
        self,
        name: str,
        storage: str,
        limit_s: float | None = None,
        *,
        retries: int = 0,
        first_s: float = 0.25,
        key: str = "",
        exit_code: int = Outage.exit_code,
        advice: str = "",
    ):
        """`name` is what is read, `storage` what is told to be waited for: once, however many reads of it wait. An
        `Outage` ends the waiting after more than `retries` failures in a row that took at least `limit_s`. `key`: where
        that limit comes from (None: PATIENCE_S); `advice`: what to do if it is reached."""
        self._name, self._storage = name, storage
        self._limit_s = PATIENCE_S if limit_s is None else limit_s
        self._retries, self._first_s, self._key = retries, first_s, key
        self._exit_code, self._advice = exit_code, advice
        self._failures, self._since = 0, 0.0
        self._asked = time.monotonic()

    def wait(self, reason: str, at: int | None = None, brought: int = 0) -> None:
        """Waits before the next attempt; raises Outage instead if there shall be none. `at`: the byte that could not be
        read, `brought`: how many before it could."""
        if self._failures == 0 or brought >= PROGRESS:
            self._failures, self._since = 0, time.monotonic()
        self._failures += 1
        waited, spent = time.monotonic() - self._since, self._failures > self._retries
        if spent and waited >= self._limit_s:
            place = self._name if at is None else f"{self._name}: byte {at}"
            often = f" ({self._failures} attempts)" if self._failures > 1 else ""
            text = f"{place}: {reason}{often}{self._advice and f'; {self._advice}'}"
            with _lock:
                _waited_for.pop(self._storage, None)
            raise Outage(text, self._exit_code)
        if self._limit_s and (spent or waited >= TOLD_AFTER_S):
            self._tell(reason)
        longest = min(LONGEST_WAIT_S, self._first_s * 2 ** min(self._failures - 1, 30))
        time.sleep(longest * random.uniform(0.75, 1))  # many readers do not come back at once
        self._asked = time.monotonic()

    def answered(self) -> None:
        """Something came from the storage. What was asked for before it went away does not say that it is back."""
        if _waited_for.get(self._storage, 0.0) <= self._asked:
            note_answer(self._storage)

    def _tell(self, reason: str) -> None:
        with _lock:
            if self._storage in _waited_for:
                return
            _waited_for[self._storage] = time.monotonic()
        limit = f"{self._limit_s:g} s{self._key and f' ({self._key})'}"
        tell(f"waiting for {self._storage} ({reason}), up to {limit}")


def patiently(make: Callable[[], T], patience: Patience, at: int | None = None) -> T:
    """Returns what `make` gives; while that is an outage, it is waited for and tried again. Raises Outage, and whatever
    else `make` raises."""
    while True:
        try:
            result = make()
        except OSError as error:
            if not is_outage(error):
                patience.answered()
                raise
            patience.wait(cause(error), at)
        except BaseException:  # what came cannot be used: it came
            patience.answered()
            raise
        else:
            patience.answered()
            return result


def cause(error: OSError) -> str:
    """Returns the words for an error of the operating system while something was read."""
    return f"cannot be read: {error.strerror or error}"


def is_ongoing() -> bool:
    """Whether something is waited for."""
    return bool(_waited_for)


def note_answer(storage: str) -> None:
    """Says that something came from the storage of this name, should it be waited for."""
    if not _waited_for:
        return
    with _lock:
        since = _waited_for.pop(storage, None)
    if since is not None:
        tell(f"{storage} is back, after {time.monotonic() - since:.0f} s")


def tell(text: str) -> None:
    """Says what a person should know of storage, on stderr and in the log of the rank."""
    if log.hasHandlers():  # else, in a worker process, it would go to stderr, too
        log.warning(text)
    with suppress(OSError, ValueError):  # a closed terminal
        print(f"onecurve: {text}", file=sys.stderr, flush=True)
