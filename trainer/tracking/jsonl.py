"""The run's own record: metrics.jsonl and events.jsonl, an object a line, and the small files beside them.

A number that is not finite is written as `null`: valid JSON, which pandas reads as NaN and jq as null.
A line counts once its newline is there; what a killed process left behind it is dropped.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import ConfigError
from trainer.files import replace_file
from trainer.tracking.base import Row, RunInfo


class JsonLines:
    """The tracker that is the truth: its errors (a full disk) are the run's errors."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.last = 0  # the step of the newest row

    def start(self, info: RunInfo) -> None:
        """Cuts the metrics back to the restored step and opens both files for appending."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "environment.json", info.environment)
        self.last = cut(self.folder / "metrics.jsonl", info.step)
        mend(self.folder / "events.jsonl")
        self.metrics: BinaryIO = (self.folder / "metrics.jsonl").open("ab", buffering=0)
        self.events: BinaryIO = (self.folder / "events.jsonl").open("ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Cuts the metrics back to an earlier step."""
        self.metrics.close()
        self.last = cut(self.folder / "metrics.jsonl", step)
        self.metrics = (self.folder / "metrics.jsonl").open("ab", buffering=0)

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
        _append(self.metrics, rows)
        self.last = last

    def event(self, event: Row) -> None:
        """Appends the event. With a checkpoint the rows up to it are synced: no power cut loses them."""
        _append(self.events, [event])
        if event["kind"] == "checkpoint":
            self._sync()

    def close(self, status: Row) -> None:
        self._sync()
        self.metrics.close()
        self.events.close()

    def _sync(self) -> None:
        os.fsync(self.metrics.fileno())
        os.fsync(self.events.fileno())


def dumps(value: Any) -> str:
    """`value` as one line of strict JSON, with `null` for NaN and the infinities."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def plain(value: Any) -> str:
    """`value` for a person: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else dumps(value)


def read(path: Path) -> list[Row]:
    """All whole lines of a JSON-lines file; none when there is no such file. A torn last line is left out.

    Raises:
        ConfigError: a line before the last is no JSON object.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        row = _parse(line)
        if row is None:
            raise ConfigError(f"{path}: line {number} is not a JSON object; mend or delete that line")
        rows.append(row)
    return rows


def cut(path: Path, step: int) -> int:
    """Drops the rows after `step`, and a torn last line, from a file whose steps rise.

    Gives the last step kept, 0 if none. Only dropped rows are parsed: a long file costs a copy, and nothing
    when there is nothing to drop. The new file replaces the old one: a kill at any instant leaves one of them
    whole, and a left-over process that still writes to the old one cannot spoil the new one.
    """
    row = _cut(path, lambda row: row["step"] <= step)
    return row["step"] if row else 0


def mend(path: Path) -> None:
    """Drops a torn last line, so that the file can be appended to."""
    _cut(path, lambda row: True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file so that a reader sees the old text or the new one, never a part."""
    replace_file(path, (json.dumps(json.loads(dumps(value)), indent=2) + "\n").encode())


def write_status(folder: Path, status: Row) -> None:
    """Writes status.json: {"state": running, finished, interrupted or failed, "step", "steps", "reason"}."""
    write_json(folder / "status.json", status)


def read_status(folder: Path) -> Row:
    """What `status.json` says; nothing where there is none."""
    try:
        status = json.loads((folder / "status.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _cut(path: Path, keep: Callable[[Row], bool]) -> Row | None:
    """Drops from the end until a whole row that `keep` wants; gives that row, None when there is none."""
    if not path.exists() or not (size := path.stat().st_size):
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        end = view.rfind(b"\n") + 1
        row = None
        while end:
            begin = view.rfind(b"\n", 0, end - 1) + 1
            row = _parse(view[begin:end])
            if row is not None and keep(row):
                break
            row, end = None, begin
        if end < size:
            with memoryview(view) as whole, whole[:end] as kept:  # never in memory: a ledger is large
                replace_file(path, kept)
    return row


def _append(file: BinaryIO, rows: list[Row]) -> None:
    data = memoryview("".join(dumps(row) + "\n" for row in rows).encode())
    while data:  # one write, unless the disk is nearly full: the next one then says so
        data = data[file.write(data) :]


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: _finite(part) for name, part in value.items()}
        case list() | tuple():
            return [_finite(part) for part in value]
    return value
