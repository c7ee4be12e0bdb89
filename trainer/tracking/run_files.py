"""The files that a run goes on writing in its folder. What the disk does not take waits in memory, in order, and is
tried again: a full disk, a folder that became read-only, a lost mount are no end of a run and lose none of its lines.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from trainer.errors import TrainingError
from trainer.files import replace_file, sync
from trainer.tracking import jsonl
from trainer.tracking.base import Row

RETRY_S = 1.0  # between two tries of a file that could not be written
PATIENCE_S = 30.0  # how long the end of a run waits for the disk


class RunFiles:
    """A run's folder. The trouble of any of its files is told as one, from the first that has any until none has."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.delayed = 0  # lines that could not be written at once, of the trouble there is
        self._appended: dict[str, Appender] = {}
        self._replaced: dict[str, _Replaced] = {}
        self._since: float | None = None  # of the trouble that was told
        self._gave_up = False

    def open_appender(self, name: str, after: str | None = None) -> Appender:
        """The file of this name, to append to. `after`: another one, without whose lines none of these is written."""
        if name not in self._appended:
            self._appended[name] = Appender(self, self.folder / name, self._appended.get(after or ""))
        return self._appended[name]

    def replace(self, name: str, content: bytes) -> None:
        """Puts a small file of this content there, whole; now, or as soon as that works."""
        file = self._replaced.setdefault(name, _Replaced(self.folder / name))
        file.content = content
        file.flush()

    def news(self) -> list[Row]:
        """Events to be told of: that something cannot be written, or that all can be written again; which is tried."""
        left = [(file.path.name, file.problem) for file in self._files if not file.flush() or file.problem]
        stuck = next(((name, problem) for name, problem in left if problem is not None), None)
        now, since = time.monotonic(), self._since
        if stuck is not None and since is None:
            self._since = now
            return [{"kind": "disk_failed", "file": stuck[0], "reason": stuck[1].strerror or str(stuck[1])}]
        if stuck is None and since is not None:
            event = {"kind": "disk_recovered", "lines": self.delayed, "seconds": round(now - since, 1)}
            self._since, self.delayed = None, 0
            return [event]
        return []

    def flush_all(self) -> None:
        """Waits until all is written. Raises TrainingError where that takes longer, and at once if it did so before."""
        deadline = time.monotonic() + (0 if self._gave_up else PATIENCE_S)
        while left := [file for file in self._files if not file.flush(now=True)]:
            if time.monotonic() >= deadline:
                self._gave_up = True
                lost = ", ".join(f"{file.path.name}: {file.missing}" for file in left)
                reason = next((file.problem.strerror for file in left if file.problem is not None), None) or "?"
                raise TrainingError(
                    f"{self.folder}: could not be written to the end ({lost}): {reason}. Make room, or make it "
                    "writable, and run the same command again"
                )
            time.sleep(RETRY_S / 4)

    @property
    def _files(self) -> list[Appender | _Replaced]:
        return [*self._appended.values(), *self._replaced.values()]


class Appender:
    """A file of JSON lines. Writing never raises OSError; `cut` and `last` may."""

    def __init__(self, run_files: RunFiles, path: Path, after: Appender | None):
        self.path, self._disk, self._after = path, run_files, after
        self.problem: OSError | None = None
        self._waiting: deque[bytes] = deque()
        self._file: FileIO | None = None
        self._whole = -1  # bytes of the lines that are there, as soon as it is open; what lies behind is a torn one
        self._tried = 0.0

    @property
    def missing(self) -> str:
        return f"{len(self._waiting)} lines missing"

    def cut(self, step: int) -> int:
        """Drops the rows after `step`, and makes the file if there is none; gives the last step kept, 0 if none."""
        self.close()
        self._whole = -1
        self._waiting = deque(line for line in self._waiting if _step(line) <= step)
        last = jsonl.cut(self.path, step)
        FileIO(self.path, "a").close()
        return _step(self._waiting[-1]) if self._waiting else last

    def last(self) -> Row | None:
        """Returns the newest row, written or waiting; None where there is none."""
        return json.loads(self._waiting[-1]) if self._waiting else jsonl.last(self.path)

    def mend(self) -> None:
        """Drops a torn last line of an earlier life."""
        with suppress(OSError):
            jsonl.repair(self.path)

    def append(self, rows: Iterable[Row]) -> None:
        """Hands the rows to the operating system, in one write; or keeps them, if it does not take them."""
        new = [(jsonl.dumps(row) + "\n").encode() for row in rows]
        self._waiting.extend(new)
        if not self.flush():
            self._disk.delayed += min(len(new), len(self._waiting))

    def flush(self, now: bool = False) -> bool:
        """Writes what waits; `now`: also if that failed a moment ago. Gives whether nothing waits any more."""
        if self._after is not None and not self._after.flush(now):
            return not self._waiting
        if not self._waiting:
            return True
        if self.problem is not None and not now and time.monotonic() < self._tried + RETRY_S:
            return False
        self._tried = time.monotonic()
        try:
            self._write()
        except OSError as error:
            self._fail(error)
            return False
        self.problem = None
        return True

    def sync(self) -> None:
        """Makes what is written survive a power cut."""
        self.flush(now=True)
        try:
            if self._file is not None:
                sync(self._file.fileno())
                self.problem = None
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Lets go of the file; the next line opens it again."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _fail(self, error: OSError) -> None:
        self.close()  # a mount that comes back is another one
        self.problem = error

    def _write(self) -> None:
        if self._file is None:
            self._file = FileIO(self.path, "a")
            size = os.fstat(self._file.fileno()).st_size
            if 0 <= self._whole < size:
                self._file.truncate(self._whole)
            else:
                self._whole = size
        data, done = memoryview(b"".join(self._waiting)), 0
        try:
            while done < len(data):  # one write, unless the disk is nearly full: the next one then says so
                done += self._file.write(data[done:]) or 0
        finally:
            while self._waiting and len(self._waiting[0]) <= done:
                done -= len(self._waiting[0])
                self._whole += len(self._waiting.popleft())


class _Replaced:
    """A small file that is replaced as a whole; only its newest content counts."""

    missing = "not written"

    def __init__(self, path: Path):
        self.path = path
        self.content: bytes | None = None  # what is not there yet
        self.problem: OSError | None = None
        self._tried = 0.0

    def flush(self, now: bool = False) -> bool:
        if self.content is None:
            return True
        if self.problem is not None and not now and time.monotonic() < self._tried + RETRY_S:
            return False
        self._tried = time.monotonic()
        try:
            replace_file(self.path, self.content)
        except OSError as error:
            self.problem = error
            return False
        self.content = self.problem = None
        return True


def _step(line: bytes) -> int:
    return json.loads(line)["step"]
