"""Storage that does not answer: what counts as that, how long it is waited for, and how that is reported.

What a file system says of a file (it is not there, it may not be read, too many are open) is an answer. Any other
error of the operating system while something is read means that there is none for now: a server restarts, a mount was
evicted, a disk is reset. That is not damage: only what was read, and is wrong, is damaged. So the reader waits, and at
the end of its patience raises `Outage`, which nothing takes for a bad sample or a bad checkpoint.
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
"""How long storage may be away while anything but a shard is read. Other ranks may wait in a collective meanwhile, so
it is half of the default of `launch.timeout_s`."""
LONGEST_WAIT_S = 8.0
REPORT_AFTER_S = 10.0  # of failures in a row
PROGRESS = 64 << 10  # after an attempt that read so many bytes, earlier failures no longer count

ANSWERS = frozenset(
    (
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.EBADF, errno.EFAULT, errno.EXDEV, errno.ESPIPE),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMLINK),
        *(errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOTTY, errno.EOVERFLOW, errno.ENXIO),
    )
)
"""Errors that describe a file, this process or the file system: storage has answered."""
LIMITS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))
"""Errors among these that say nothing about the file."""
CANNOT_MAP = frozenset((errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP))
"""Errors of `mmap` on a file system that cannot map files."""

log = logging.getLogger("onecurve")
_lock = threading.Lock()
_waiting_since: dict[str, float] = {}  # by storage


def is_outage(error: BaseException) -> bool:
    """Returns whether an error means that storage does not answer for now."""
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
        """Prepares the waiting. `name`: what is read; `storage`: whose outage is reported once, however many wait.
        An `Outage` ends the waiting after more than `retries` failures in a row that took at least `limit_s` (None:
        PATIENCE_S). `key`: the config key of that limit; `advice`: what to do if it is reached."""
        self._name, self._storage = name, storage
        self._limit_s = PATIENCE_S if limit_s is None else limit_s
        self._retries, self._first_s, self._key = retries, first_s, key
        self._exit_code, self._advice = exit_code, advice
        self._failures, self._since = 0, 0.0
        self._requested_at = time.monotonic()

    def wait(self, reason: str, at: int | None = None, brought: int = 0) -> None:
        """Waits before the next attempt; raises Outage instead if there is none left. `at`: the byte that could not be
        read, `brought`: how many bytes before it were read."""
        if self._failures == 0 or brought >= PROGRESS:
            self._failures, self._since = 0, time.monotonic()
        self._failures += 1
        waited_s, has_no_retries = time.monotonic() - self._since, self._failures > self._retries
        if has_no_retries and waited_s >= self._limit_s:
            place = self._name if at is None else f"{self._name}: byte {at}"
            often = f" ({self._failures} attempts)" if self._failures > 1 else ""
            text = f"{place}: {reason}{often}{self._advice and f'; {self._advice}'}"
            with _lock:
                _waiting_since.pop(self._storage, None)
            raise Outage(text, self._exit_code)
        if self._limit_s and (has_no_retries or waited_s >= REPORT_AFTER_S):
            self._report(reason)
        longest = min(LONGEST_WAIT_S, self._first_s * 2 ** min(self._failures - 1, 30))
        time.sleep(longest * random.uniform(0.75, 1))  # many readers do not come back at once
        self._requested_at = time.monotonic()

    def note_answer(self) -> None:
        """Notes that the storage answered. An answer to a request from before the outage does not end it."""
        if _waiting_since.get(self._storage, 0.0) <= self._requested_at:
            note_answer(self._storage)

    def _report(self, reason: str) -> None:
        with _lock:
            if self._storage in _waiting_since:
                return
            _waiting_since[self._storage] = time.monotonic()
        limit = f"{self._limit_s:g} s{self._key and f' ({self._key})'}"
        report(f"waiting for {self._storage} ({reason}), up to {limit}")


def retry_during_outage(make: Callable[[], T], patience: Patience, at: int | None = None) -> T:
    """Returns the result of `make`; while storage does not answer, waits and tries again. Raises Outage, and whatever
    else `make` raises."""
    while True:
        try:
            result = make()
        except OSError as error:
            if not is_outage(error):
                patience.note_answer()
                raise
            patience.wait(cause(error), at)
        except BaseException:  # the content cannot be used, but storage answered
            patience.note_answer()
            raise
        else:
            patience.note_answer()
            return result


def cause(error: OSError) -> str:
    """Returns the text for an error of the operating system while something was read."""
    return f"cannot be read: {error.strerror or error}"


def is_ongoing() -> bool:
    """Returns whether this process waits for any storage."""
    return bool(_waiting_since)


def note_answer(storage: str) -> None:
    """Reports that the storage of this name answered again, if this process waits for it."""
    if not _waiting_since:
        return
    with _lock:
        since = _waiting_since.pop(storage, None)
    if since is not None:
        report(f"{storage} is back, after {time.monotonic() - since:.0f} s")


def report(text: str) -> None:
    """Prints a text on stderr and writes it to the log of the rank."""
    if log.hasHandlers():  # else, in a worker process, it would go to stderr, too
        log.warning(text)
    with suppress(OSError, ValueError):  # a closed terminal
        print(f"onecurve: {text}", file=sys.stderr, flush=True)
