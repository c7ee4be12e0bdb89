"""Where the time of a run went: `goodput.jsonl`, appended over all its lives; `tracking/goodput.py` sums it up.

Each second of a life belongs to exactly one kind: startup, productive, data_wait, checkpoint, evaluation, finishing.
Lines of a life tell what was spent since the one before, by a clock that cannot jump; `time` is the wall clock's.
"""

from __future__ import annotations

import atexit
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone

from trainer.tracking.run_files import Appender

GOODPUT = "goodput.jsonl"
REMEMBERED = 256  # spells of each kind


class TimeLedger:
    """Another thread may read `step` (the last that was done), `kind`, `since` (the `time.monotonic()` at which it
    began) and `seconds`."""

    _last: TimeLedger | None = None  # of this process: the next run of a sweep begins where it ended

    def __init__(self, file: Appender | None, started_at: float):
        """`started_at` is the `time.monotonic()` at which the process started to be ours; no file: keep none."""
        if (last := TimeLedger._last) is not None:
            atexit.unregister(last.close)
            started_at = max(started_at, last._counted)
        TimeLedger._last = self
        atexit.register(self.close)  # with samples, report and whatever else comes behind the last step
        self.kind, self.since, self.life = "startup", started_at, uuid.uuid4().hex[:8]
        self._file, self.step = file, 0
        self._began, self._step_then = started_at, 0  # of the spell that goes on, and the step at its begin
        self.started_at: float = started_at
        self._counted: float = started_at
        self.waits = False
        self._unwritten: dict[str, float] = defaultdict(float)
        self._spells: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        if file is not None:
            file.mend()

    def switch(self, kind: str) -> float:
        """Counts time as `kind` from now on. Returns the seconds since the last switch."""
        now = time.monotonic()
        spell = now - self._began
        self._unwritten[self.kind] += now - self._counted
        if self.kind != "productive" or self.step != self._step_then:  # what is between two steps tells nothing of one
            self._spells[self.kind].append(spell)
        self.since = self._began = self._counted = now  # first: a reader may find the old kind young, never the new old
        self.kind, self._step_then = kind, self.step
        return spell

    def seconds(self, kind: str) -> list[float]:
        """How long the last spells of a kind took since the start or the last rollback, the newest last. Productive
        ones are those in which a step was done."""
        return list(self._spells.get(kind, ()))

    def progressed(self) -> None:
        """What is going on is not a hang: it came to the next of its parts."""
        self.since = time.monotonic()

    @contextmanager
    def watched_elsewhere(self) -> Iterator[None]:
        """While this lasts, what is waited for has a budget of its own, which somebody else looks after."""
        self.waits = True
        try:
            yield
        finally:
            self.since = self._began = time.monotonic()  # a new spell: what was waited for is none of it
            self.waits = False

    def restored(self, step: int) -> None:
        """Writes down that from here on the run goes on from `step`: in a new life, or after a rollback in this one.

        What was spent since the last line is start-up, or work that is done again.
        """
        if self.kind != "startup":
            self.switch("startup")
        self._spells.clear()  # what comes now may take as long as the first time: readers begin again, caches are cold
        self._write(step, restored=True)

    def write(self, step: int) -> None:
        """Appends what was spent since the last line, in which the run came to `step`."""
        self._write(step)

    def close(self) -> None:
        """Appends the last of this life, as far as it has come; again at the process's exit."""
        self._write(self.step)

    def _write(self, step: int, **more: bool) -> None:
        now = time.monotonic()
        self._unwritten[self.kind] += now - self._counted
        self._counted, self.step = now, step
        if self._file is not None:
            seconds = {kind: round(value, 6) for kind, value in self._unwritten.items()}
            told = datetime.now(timezone.utc).isoformat()
            self._file.append([{"time": told, "life": self.life, "step": step, **more, "seconds": seconds}])
        self._unwritten.clear()
