"""The files that a run keeps writing in its directory. Lines that cannot be written wait in memory, in order, and are
tried again: a full disk, a read-only folder or a lost mount does not end the run and loses none of its lines.
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
    """The files of a run directory. Failures are reported as one, from the first failing file until none fails."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.delayed = 0  # lines that could not be written at once, in the current trouble
        self._appenders: dict[str, Appender] = {}
        self._replaced_files: dict[str, _ReplacedFile] = {}
        self._trouble_since: float | None = None  # time of the trouble that was reported
        self._gave_up = False

    def open_appender(self, name: str, after: str | None = None) -> Appender:
        """Returns the file `name` to append to. `after`: a file whose lines are written before those of this one."""
        if name not in self._appenders:
            self._appenders[name] = Appender(self, self.folder / name, self._appenders.get(after or ""))
        return self._appenders[name]

    def replace(self, name: str, content: bytes) -> None:
        """Replaces a small file as a whole; now, or as soon as that works."""
        file = self._replaced_files.setdefault(name, _ReplacedFile(self.folder / name))
        file.content = content
        file.flush()

    def news(self) -> list[Row]:
        """Tries to write everything. Returns an event when that begins to fail, and one when it works again."""
        unwritten = [(file.path.name, file.problem) for file in self._files if not file.flush() or file.problem]
        failure = next(((name, problem) for name, problem in unwritten if problem is not None), None)
        now, trouble_since = time.monotonic(), self._trouble_since
        if failure is not None and trouble_since is None:
            self._trouble_since = now
            return [{"kind": "disk_failed", "file": failure[0], "reason": failure[1].strerror or str(failure[1])}]
        if failure is None and trouble_since is not None:
            event = {"kind": "disk_recovered", "lines": self.delayed, "seconds": round(now - trouble_since, 1)}
            self._trouble_since, self.delayed = None, 0
            return [event]
        return []

    def flush_all(self) -> None:
        """Waits until all is written. Raises TrainingError after PATIENCE_S, and at once if that happened before."""
        deadline = time.monotonic() + (0 if self._gave_up else PATIENCE_S)
        while unwritten := [file for file in self._files if not file.flush(now=True)]:
            if time.monotonic() >= deadline:
                self._gave_up = True
                missing = ", ".join(f"{file.path.name}: {file.missing}" for file in unwritten)
                reason = next((file.problem.strerror for file in unwritten if file.problem is not None), None) or "?"
                raise TrainingError(
                    f"{self.folder}: could not be written to the end ({missing}): {reason}. Make room, or make it "
                    "writable, and run the same command again"
                )
            time.sleep(RETRY_S / 4)

    @property
    def _files(self) -> list[Appender | _ReplacedFile]:
        return [*self._appenders.values(), *self._replaced_files.values()]


class Appender:
    """A file of JSON lines. Writing never raises OSError; `cut` and `last` may."""

    def __init__(self, run_files: RunFiles, path: Path, after: Appender | None):
        self.path, self._run_files, self._prerequisite = path, run_files, after
        self.problem: OSError | None = None
        self._pending: deque[bytes] = deque()
        self._file: FileIO | None = None
        self._whole_bytes = -1  # bytes of whole lines, -1 until the file is opened; bytes after them are a torn line
        self._last_try_s = 0.0

    @property
    def missing(self) -> str:
        return f"{len(self._pending)} lines missing"

    def cut(self, step: int) -> int:
        """Drops the rows after `step`, and creates the file if necessary; returns the last step kept, 0 if none."""
        self.close()
        self._whole_bytes = -1
        self._pending = deque(line for line in self._pending if _step(line) <= step)
        last = jsonl.cut(self.path, step)
        FileIO(self.path, "a").close()
        return _step(self._pending[-1]) if self._pending else last

    def last(self) -> Row | None:
        """Returns the newest row, written or waiting; None if there is none."""
        return json.loads(self._pending[-1]) if self._pending else jsonl.last(self.path)

    def mend(self) -> None:
        """Drops a torn last line of an earlier attempt."""
        with suppress(OSError):
            jsonl.repair(self.path)

    def append(self, rows: Iterable[Row]) -> None:
        """Hands the rows to the operating system in one write, or keeps them if that fails."""
        lines = [(jsonl.dumps(row) + "\n").encode() for row in rows]
        self._pending.extend(lines)
        if not self.flush():
            self._run_files.delayed += min(len(lines), len(self._pending))

    def flush(self, now: bool = False) -> bool:
        """Writes waiting lines; `now`: even if that failed a moment ago. Returns whether no line waits any more."""
        if self._prerequisite is not None and not self._prerequisite.flush(now):
            return not self._pending
        if not self._pending:
            return True
        if self.problem is not None and not now and time.monotonic() < self._last_try_s + RETRY_S:
            return False
        self._last_try_s = time.monotonic()
        try:
            self._write()
        except OSError as error:
            self._fail(error)
            return False
        self.problem = None
        return True

    def sync(self) -> None:
        """Syncs the file, so that its lines survive a power cut."""
        self.flush(now=True)
        try:
            if self._file is not None:
                sync(self._file.fileno())
                self.problem = None
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Closes the file; the next line opens it again."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _fail(self, error: OSError) -> None:
        self.close()  # a mount that comes back needs a new file descriptor
        self.problem = error

    def _write(self) -> None:
        if self._file is None:
            self._file = FileIO(self.path, "a")
            size = os.fstat(self._file.fileno()).st_size
            if 0 <= self._whole_bytes < size:
                self._file.truncate(self._whole_bytes)
            else:
                self._whole_bytes = size
        data, done = memoryview(b"".join(self._pending)), 0
        try:
            while done < len(data):  # one write, unless the disk is nearly full: the next one then says so
                done += self._file.write(data[done:]) or 0
        finally:
            while self._pending and len(self._pending[0]) <= done:
                done -= len(self._pending[0])
                self._whole_bytes += len(self._pending.popleft())


class _ReplacedFile:
    """A small file that is replaced as a whole; only its newest content counts."""

    missing = "not written"

    def __init__(self, path: Path):
        self.path = path
        self.content: bytes | None = None  # content that is not written yet
        self.problem: OSError | None = None
        self._last_try_s = 0.0

    def flush(self, now: bool = False) -> bool:
        if self.content is None:
            return True
        if self.problem is not None and not now and time.monotonic() < self._last_try_s + RETRY_S:
            return False
        self._last_try_s = time.monotonic()
        try:
            replace_file(self.path, self.content)
        except OSError as error:
            self.problem = error
            return False
        self.content = self.problem = None
        return True


def _step(line: bytes) -> int:
    return json.loads(line)["step"]
