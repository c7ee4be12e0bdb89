"""Where the time of a run went: `goodput.jsonl`, one line a reading, appended over all lives of the run.

Each second belongs to exactly one kind: startup, productive, data_wait, checkpoint, evaluation.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict, deque
from datetime import datetime, timezone
from pathlib import Path


class TimeLedger:
    def __init__(self, path: Path | None, born: float):
        """`born` is the `time.monotonic()` at which the process started to be ours; no path: keep no file."""
        self.path = path
        self.kind, self.since = "startup", born
        self._spells: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=256))
        self._unwritten: dict[str, float] = defaultdict(float)

    def switch(self, kind: str) -> float:
        """From now on time is of `kind`. Gives the seconds since the last switch."""
        now = time.monotonic()
        spent = now - self.since
        self._unwritten[self.kind] += spent
        self._spells[self.kind].append(spent)
        self.since, self.kind = now, kind
        return spent

    def seconds(self, kind: str) -> list[float]:
        return list(self._spells.get(kind, ()))

    def write(self, step: int) -> None:
        """Appends what was spent since the last reading."""
        self.switch(self.kind)
        if self.path is not None:
            seconds = {kind: round(value, 4) for kind, value in self._unwritten.items()}
            row = {"time": datetime.now(timezone.utc).isoformat(), "step": step, "seconds": seconds}
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        self._unwritten.clear()
