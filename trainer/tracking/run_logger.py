"""Records what the training loop reports: metrics and samples of each step, events, and how the run ended.

Every rank has a logger. Only the main rank's reaches trackers and files; the others add their part of the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from trainer.data import ledger
from trainer.data.stream import StepData
from trainer.topology import Topology
from trainer.tracking import Row, RunInfo, Trackers
from trainer.tracking.jsonl import STATUS, encode

LEDGER = "ledger.jsonl"
STATUS_SECONDS = 2.0  # how old the step in status.json may be, beyond the reading of the device's numbers


class RunLogger:
    """Logs a run. `trackers` is None on all ranks but the main one; `start` sets `info.step`."""

    def __init__(self, topology: Topology, info: RunInfo, trackers: Trackers | None, keep_ledger: bool):
        self.topology, self.info, self.trackers = topology, info, trackers
        self.keep_ledger = keep_ledger
        self.step, self.started, self.status_written = 0, False, 0.0

    def ledger(self, steps: Sequence[StepData]) -> None:
        """Records the samples of each step. All ranks call it, before the steps' rows are recorded."""
        if self.keep_ledger:
            parts = self.topology.gather([[data.step, data.entries] for data in steps])
            if self.trackers:
                rows_of_steps = ledger.rows((step, entries) for part in parts for step, entries in part)
                self.trackers.run_files.open_appender(LEDGER).append(rows_of_steps)

    def rows(self, rows: list[Row]) -> None:
        """Records one row for each step."""
        if not rows:
            return
        self.step = rows[-1]["step"]
        if self.trackers:
            self.trackers.rows(rows)
            if time.monotonic() > self.status_written + STATUS_SECONDS:
                self._status("running")

    def recorded(self, step: int) -> Row | None:
        """Returns the newest row, on all ranks, if it belongs to this step."""
        row = self.topology.broadcast(self.trackers.last() if self.trackers else None)
        return row if row and row["step"] == step else None

    def remove_row(self, step: int) -> None:
        """Removes the row of this step from the record, if there is one."""
        if self.trackers:
            self.trackers.rewind(step - 1)

    def start(self, step: int, resumed: bool) -> None:
        """Starts the trackers; drops what was recorded after `step`: those steps will be repeated."""
        self.step = step
        if not self.trackers:
            return
        if self.keep_ledger:
            self.trackers.run_files.open_appender(LEDGER).cut(step)
        self.trackers.start(RunInfo(**{**vars(self.info), "step": step}))
        self.started = True
        self.event("resume" if resumed else "start", processes=self.topology.world_size)

    def rewind(self, step: int) -> None:
        """Drops what was recorded after `step`, as `start` does, in the middle of an attempt."""
        self.step = step
        if self.trackers:
            if self.keep_ledger:
                self.trackers.run_files.open_appender(LEDGER).cut(step)
            self.trackers.rewind(step)

    def events(self, events: Iterable[Row]) -> None:
        for event in events:
            self.event(**event)

    def event(self, kind: str, **fields: Any) -> None:
        if not (self.trackers and self.started):
            return
        self.trackers.event({"kind": kind, "step": self.step, **fields})
        if kind == "checkpoint":
            self._status("running")

    def close(self, state: str, reason: str | None = None, exit_code: int = 0) -> None:
        """Ends this attempt of the run as `finished`, `interrupted` or `failed`."""
        if not self.trackers:
            return
        status = self._status(state, reason=reason, exit_code=exit_code)
        if self.started:
            self.event(state, **({"reason": reason} if reason else {}))
            self.trackers.close(status)

    def _status(self, state: str, **fields: Any) -> Row:
        status = {"state": state, "step": self.step, "steps": self.info.steps, "reason": None, **fields}
        if self.trackers:
            self.trackers.run_files.replace(STATUS, encode(status))
        self.status_written = time.monotonic()
        return status
