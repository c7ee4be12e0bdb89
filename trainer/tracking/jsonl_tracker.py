"""Keeps the run's own record: metrics.jsonl and events.jsonl."""

from __future__ import annotations

from pathlib import Path

from trainer.tracking.base import Row, RunInfo
from trainer.tracking.jsonl import write_json
from trainer.tracking.run_files import RunFiles


class JsonlTracker:
    """The tracker that is the source of truth. `run_files` keeps lines that cannot be written until they can."""

    def __init__(self, folder: Path, run_files: RunFiles | None = None):
        self.folder, self.run_files = folder, run_files or RunFiles(folder)
        self.last = 0  # the step of the newest row

    def start(self, info: RunInfo) -> None:
        """Cuts the metrics back to the restored step; a row waits for its step's line of the ledger, if one is kept.

        Raises OSError if the disk cannot be written: an attempt does not start then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "environment.json", info.environment)
        self.metrics = self.run_files.open_appender("metrics.jsonl", after="ledger.jsonl")
        self.events = self.run_files.open_appender("events.jsonl")
        self.last = self.metrics.cut(info.step)
        self.events.mend()

    def rewind(self, step: int) -> None:
        """Cuts the metrics back to an earlier step."""
        self.last = self.metrics.cut(step)

    def rows(self, rows: list[Row]) -> None:
        """Appends the rows in one write, handed to the operating system at once.

        Raises:
            ValueError: a step that does not rise; nothing of `rows` is written then.
        """
        last = self.last
        for row in rows:
            if row["step"] <= last:
                raise ValueError(f"metrics.jsonl: step {row['step']} after step {last}: steps must rise")
            last = row["step"]
        self.metrics.append(rows)
        self.last = last

    def event(self, event: Row) -> None:
        """Appends the event. A checkpoint syncs the rows up to it, so that no power cut loses them."""
        self.events.append([event])
        if event["kind"] == "checkpoint":
            self._sync()

    def close(self, status: Row) -> None:
        self._sync()
        self.metrics.close()
        self.events.close()

    def _sync(self) -> None:
        self.metrics.sync()
        self.events.sync()
