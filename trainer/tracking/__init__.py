"""Passes the run's metrics and events on: first to its own record, then to the other trackers."""

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
    """Passes metrics and events to every tracker.

    Errors of `record`, the source of truth, are raised. If the disk cannot be written, that is reported once, by `say`
    and in the run's events. Any other tracker that fails is reported the same way, and dropped.
    """

    def __init__(self, record: JsonlTracker, extra_trackers: Sequence[Tracker] = (), say: PrintLine | None = None):
        self.record, self.run_files = record, record.run_files
        self.extra_trackers = list(extra_trackers)
        self.say = say or _stderr

    def start(self, info: RunInfo) -> None:
        self.record.start(info)
        self._notify(lambda tracker: tracker.start(info))

    def last(self) -> Row | None:
        """Returns the newest row that is recorded."""
        return self.record.metrics.last()

    def rewind(self, step: int) -> None:
        """Cuts the record back to `step`: the later steps will be repeated. Other trackers accept a step twice."""
        self.record.rewind(step)

    def rows(self, rows: list[Row]) -> None:
        self.record.rows(rows)
        self._notify(lambda tracker: tracker.rows(rows))
        self._report_disk(rows[-1]["step"] if rows else None)

    def event(self, event: Row) -> None:
        """Passes the event on, with `time` filled in if it is missing."""
        self._event(event)
        self._report_disk(event.get("step"))

    def close(self, status: Row) -> None:
        """Closes all trackers. Raises TrainingError if not everything can be written; the status is then `failed`."""
        try:
            self.run_files.flush_all()
            self._report_disk(status.get("step"))
        except TrainingError as error:
            status = {**status, "state": "failed", "reason": str(error)}
            raise
        finally:
            self._notify(lambda tracker: tracker.close(status))
            self.record.close(status)

    def _event(self, event: Row) -> None:
        event = masked({"time": now(), **event}, prose)
        self.record.event(event)
        self._notify(lambda tracker: tracker.event(event))

    def _report_disk(self, step: int | None) -> None:
        """Reports the disk, once when it fails and once when everything can be written again."""
        for event in self.run_files.news():
            self._event({"kind": event["kind"], "step": step, **event})
            if event["kind"] == "disk_failed":
                self._say(
                    f"{self.run_files.folder / event['file']} cannot be written: {event['reason']}. Training goes on; "
                    "what is recorded waits in memory until it can be: make room, or make it writable"
                )
            else:
                self._say(f"{self.run_files.folder} can be written again: nothing was lost")

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a closed terminal
            self.say(prose(text))

    def _notify(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.extra_trackers):
            try:
                call(tracker)
            except Exception as error:
                self.extra_trackers.remove(tracker)
                name = getattr(tracker, "name", type(tracker).__name__)
                reason = f"{type(error).__name__}: {error}"
                self.record.event({"time": now(), "kind": "tracker_off", "tracker": name, "reason": reason})
                self._say(f"{name} tracking is off from here on: {reason}")


def now() -> str:
    """Returns the time of an event: ISO 8601, UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
