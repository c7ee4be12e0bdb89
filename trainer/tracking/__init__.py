"""Where the run's numbers go: its own record first, then whoever else wants to know."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone

from trainer.tracking.base import Row, RunInfo, Tracker
from trainer.tracking.jsonl import JsonLines, write_status

__all__ = ["JsonLines", "Row", "RunInfo", "Tracker", "Trackers", "now", "write_status"]


Say = Callable[[str], None]


class Trackers:
    """Tells every tracker.

    Errors of `record`, the truth about the run, are raised. Any other tracker that fails is reported once,
    through `say` and in the run's events, and left out from then on.
    """

    def __init__(self, record: JsonLines, others: Sequence[Tracker] = (), say: Say | None = None):
        self.record = record
        self.others = list(others)
        self.say = say or _stderr

    def start(self, info: RunInfo) -> None:
        self.record.start(info)
        self._tell(lambda tracker: tracker.start(info))

    def rewind(self, step: int) -> None:
        """The steps after this one are about to come again. Only the record is cut: others take a step twice."""
        self.record.rewind(step)

    def rows(self, rows: list[Row]) -> None:
        self.record.rows(rows)
        self._tell(lambda tracker: tracker.rows(rows))

    def event(self, event: Row) -> None:
        """Hands the event on, with `time` filled in where it is missing."""
        event = {"time": now(), **event}
        self.record.event(event)
        self._tell(lambda tracker: tracker.event(event))

    def close(self, status: Row) -> None:
        self._tell(lambda tracker: tracker.close(status))
        self.record.close(status)

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in list(self.others):
            try:
                tell(tracker)
            except Exception as error:
                self.others.remove(tracker)
                name, reason = type(tracker).__name__, f"{type(error).__name__}: {error}"
                self.record.event({"time": now(), "kind": "tracker_off", "tracker": name, "reason": reason})
                with suppress(OSError, ValueError):  # a closed terminal
                    self.say(f"{name} tracking is off from here on: {reason}")


def now() -> str:
    """The time of an event: ISO 8601, UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
