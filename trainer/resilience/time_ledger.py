"""Records where the time of a run went, in `goodput.jsonl` over all attempts; `tracking/goodput.py` sums it up.

Each second of an attempt has exactly one kind: startup, productive, data_wait, checkpoint, evaluation, finishing. Each
line has the seconds since the line before it, by a clock that cannot jump; `time` is that of the wall clock.
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
    """The time of an attempt by kinds. Another thread may read `step` (the last that was done), `kind`, `since` (the
    `time.monotonic()` at which it began) and `seconds`."""

    _last: TimeLedger | None = None  # of this process: the next run of a sweep begins where the last one ended

    def __init__(self, file: Appender | None, started_at: float):
        """`started_at` is the `time.monotonic()` at which the attempt started; without a file nothing is written."""
        if (last := TimeLedger._last) is not None:
            atexit.unregister(last.close)
            started_at = max(started_at, last._counted_until)
        TimeLedger._last = self
        atexit.register(self.close)  # with the samples, the report and all else after the last step
        self.kind, self.since, self.life = "startup", started_at, uuid.uuid4().hex[:8]
        self._file, self.step = file, 0
        self._spell_start, self._spell_step = started_at, 0  # of the current spell, and the step at its start
        self.started_at: float = started_at
        self._counted_until: float = started_at
        self.is_paused = False
        self._unwritten_seconds: dict[str, float] = defaultdict(float)
        self._spells: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        if file is not None:
            file.mend()

    def switch(self, kind: str) -> float:
        """Counts time as `kind` from now on. Returns the seconds since the last switch."""
        now = time.monotonic()
        spell = now - self._spell_start
        self._unwritten_seconds[self.kind] += now - self._counted_until
        # The time between two steps is not that of a step.
        if self.kind != "productive" or self.step != self._spell_step:
            self._spells[self.kind].append(spell)
        # First: a reader may see the old kind too young, but never the new one too old.
        self.since = self._spell_start = self._counted_until = now
        self.kind, self._spell_step = kind, self.step
        return spell

    def seconds(self, kind: str) -> list[float]:
        """Returns how long the last spells of a kind took since the start or the last rollback, the newest last. A
        productive spell counts if a step was done in it."""
        return list(self._spells.get(kind, ()))

    def note_progress(self) -> None:
        """Notes that the current work has reached its next part, so it does not hang."""
        self.since = time.monotonic()

    @contextmanager
    def pause_watchdog(self) -> Iterator[None]:
        """Pauses the watchdog of the main thread while it waits for work whose time is watched elsewhere."""
        self.is_paused = True
        try:
            yield
        finally:
            self.since = self._spell_start = time.monotonic()  # a new spell, without the time of waiting
            self.is_paused = False

    def note_restore(self, step: int) -> None:
        """Records that the run continues from `step`, in a new attempt or after a rollback in this one.

        The time since the last line was startup, or work that is done again.
        """
        if self.kind != "startup":
            self.switch("startup")
        self._spells.clear()  # work may take as long as the first time again: readers restart, caches are cold
        self._write(step, restored=True)

    def write(self, step: int) -> None:
        """Appends the time since the last line, in which the run reached `step`."""
        self._write(step)

    def close(self) -> None:
        """Appends the last time of this attempt; it is called again at the process's exit."""
        self._write(self.step)

    def _write(self, step: int, **extra: bool) -> None:
        now = time.monotonic()
        self._unwritten_seconds[self.kind] += now - self._counted_until
        self._counted_until, self.step = now, step
        if self._file is not None:
            seconds = {kind: round(value, 6) for kind, value in self._unwritten_seconds.items()}
            wall_time = datetime.now(timezone.utc).isoformat()
            self._file.append([{"time": wall_time, "life": self.life, "step": step, **extra, "seconds": seconds}])
        self._unwritten_seconds.clear()
