"""Reads and writes JSON lines, one object a line, and the small files that go with them.

A number that is not finite is written as `null`: valid JSON, which pandas reads as NaN and jq as null.
A line counts once its newline is written; a torn line of a killed process is dropped.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.files import read_file, replace_file
from trainer.outage import CANNOT_MAP
from trainer.tracking.base import Row

STATUS = "status.json"


def dumps(value: Any) -> str:
    """Returns `value` as one line of strict JSON, with `null` for NaN and the infinities."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def display_text(value: Any) -> str:
    """Returns `value` for a person to read: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else dumps(value)


def read(path: Path) -> list[Row]:
    """Returns all whole lines of a JSON-lines file; none if the file does not exist. A torn last line is left out.

    Raises:
        ConfigError: a line before the last is not a JSON object.
        Outage: the storage does not answer.
    """
    try:
        content = read_file(path)
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        row = _parse(line)
        if row is None:
            raise ConfigError(f"{path}: line {number} is not a JSON object; mend or delete that line")
        rows.append(row)
    return rows


def cut(path: Path, step: int) -> int:
    """Drops the rows after `step`, and a torn last line, from a file whose steps rise.

    Returns the last step kept, 0 if none. Only dropped rows are parsed: a long file costs a copy, and nothing
    if there is nothing to drop. The new file replaces the old one: a kill at any instant leaves one of them
    whole, and a leftover process that still writes to the old one cannot damage the new one.
    """
    row = _cut(path, lambda row: row["step"] <= step)
    return row["step"] if row else 0


def last(path: Path) -> Row | None:
    """Returns the last whole row, None if there is none. The file is not changed."""
    if not path.exists() or not path.stat().st_size:
        return None
    with _view(path) as view:
        end = view.rfind(b"\n") + 1
        return _parse(view[view.rfind(b"\n", 0, end - 1) + 1 : end]) if end else None


def repair(path: Path) -> None:
    """Drops a torn last line, so that the file can be appended to."""
    _cut(path, lambda row: True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file so that a reader sees the old text or the new one, never a part."""
    replace_file(path, encode(value))


def encode(value: Any) -> bytes:
    """Returns `value` as the content of a JSON file for a person to read."""
    return (json.dumps(json.loads(dumps(value)), indent=2) + "\n").encode()


def write_status(folder: Path, status: Row) -> None:
    """Writes status.json: {"state": running, finished, interrupted or failed, "step", "steps", "reason"}."""
    write_json(folder / STATUS, status)


def read_status(folder: Path) -> Row:
    """Returns the content of `status.json`; {} if the file is missing."""
    try:
        status = json.loads((folder / STATUS).read_bytes())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


@contextmanager
def _view(path: Path) -> Iterator[bytes | mmap.mmap]:
    """Yields the content of a file, memory-mapped; read as a whole if its file system cannot map files."""
    with path.open("rb") as file:
        try:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno not in CANNOT_MAP:
                raise
            view = None
        with view or nullcontext(file.read()) as content:
            yield content


def _cut(path: Path, keep: Callable[[Row], bool]) -> Row | None:
    """Drops rows from the end up to a whole row for which `keep` is true; returns that row, None if there is none."""
    if not path.exists() or not (size := path.stat().st_size):
        return None
    with _view(path) as view:
        end = view.rfind(b"\n") + 1
        row = None
        while end:
            begin = view.rfind(b"\n", 0, end - 1) + 1
            row = _parse(view[begin:end])
            if row is not None and keep(row):
                break
            row, end = None, begin
        if end < size:
            try:
                with memoryview(view) as whole, whole[:end] as whole_lines:  # never in memory: a ledger is large
                    replace_file(path, whole_lines)
            except OSError:  # no room for a copy
                os.truncate(path, end)
    return row


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
