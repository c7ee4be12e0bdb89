"""Where the run's numbers go: its own record first, then whoever else wants to know."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone

from trainer.errors import TrainingError
from trainer.secrets import masked, prose
from trainer.tracking.base import Row, RunInfo, Tracker
from trainer.tracking.jsonl import write_status
from trainer.tracking.jsonl_tracker import JsonlTracker

__all__ = ["JsonlTracker", "Row", "RunInfo", "Tracker", "Trackers", "now", "write_status"]


PrintLine = Callable[[str], None]


class Trackers:
    """Tells every tracker.

    Errors of `record`, the truth about the run, are raised; that the disk does not take it is told once, through `say`
    and in the run's events. Any other tracker that fails is reported likewise, and left out from then on.
    """

    def __init__(self, record: JsonlTracker, others: Sequence[Tracker] = (), say: PrintLine | None = None):
        self.record, self.run_files = record, record.run_files
        self.others = list(others)
        self.say = say or _stderr

    def start(self, info: RunInfo) -> None:
        self.record.start(info)
        self._tell(lambda tracker: tracker.start(info))

    def last(self) -> Row | None:
        """Returns the newest row that is recorded."""
        return self.record.metrics.last()

    def rewind(self, step: int) -> None:
        """The steps after this one are about to come again, or its row with an evaluation. Only the record is cut:
        others take a step twice."""
        self.record.rewind(step)

    def rows(self, rows: list[Row]) -> None:
        self.record.rows(rows)
        self._tell(lambda tracker: tracker.rows(rows))
        self._news(rows[-1]["step"] if rows else None)

    def event(self, event: Row) -> None:
        """Hands the event on, with `time` filled in where it is missing."""
        self._event(event)
        self._news(event.get("step"))

    def close(self, status: Row) -> None:
        """Raises TrainingError if the disk does not take all that was recorded; the trackers then hear of a failure."""
        try:
            self.run_files.flush_all()
            self._news(status.get("step"))
        except TrainingError as error:
            status = {**status, "state": "failed", "reason": str(error)}
            raise
        finally:
            self._tell(lambda tracker: tracker.close(status))
            self.record.close(status)

    def _event(self, event: Row) -> None:
        event = masked({"time": now(), **event}, prose)
        self.record.event(event)
        self._tell(lambda tracker: tracker.event(event))

    def _news(self, step: int | None) -> None:
        """Tells of the disk, once when it fails and once when it takes everything again."""
        for news in self.run_files.news():
            self._event({"kind": news["kind"], "step": step, **news})
            if news["kind"] == "disk_failed":
                self._say(
                    f"{self.run_files.folder / news['file']} cannot be written: {news['reason']}. Training goes on; "
                    "what is recorded waits in memory until it can be: make room, or make it writable"
                )
            else:
                self._say(f"{self.run_files.folder} can be written again: nothing was lost")

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a closed terminal
            self.say(prose(text))

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in list(self.others):
            try:
                tell(tracker)
            except Exception as error:
                self.others.remove(tracker)
                name = getattr(tracker, "name", type(tracker).__name__)
                reason = f"{type(error).__name__}: {error}"
                self.record.event({"time": now(), "kind": "tracker_off", "tracker": name, "reason": reason})
                self._say(f"{name} tracking is off from here on: {reason}")


def now() -> str:
    """The time of an event: ISO 8601, UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
