"""The fan-out: the record's errors are the run's, those of anyone else are a warning."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from tests.tracking.demo_run import info, row
from trainer.tracking import JsonlTracker, Trackers
from trainer.tracking.console import Console
from trainer.tracking.jsonl import read


def test_a_tracker_that_fails_is_reported_once_and_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    with (tmp_path / "terminal").open("w") as closed:
        console = Console(closed)
    trackers = Trackers(JsonlTracker(tmp_path), [console], said.append)
    trackers.start(info(tmp_path))
    trackers.rows([row(1)])
    trackers.rows([row(2)])
    trackers.event({"kind": "checkpoint", "step": 2})
    trackers.close({"state": "finished"})
    assert len(said) == 1
    assert said[0].startswith("Console tracking is off")
    assert [found["step"] for found in read(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [event["kind"] for event in read(tmp_path / "events.jsonl")] == ["tracker_off", "checkpoint"]


def test_errors_of_the_record_are_raised(tmp_path: Path) -> None:
    trackers = Trackers(JsonlTracker(tmp_path))
    trackers.start(info(tmp_path))
    trackers.rows([row(1)])
    with pytest.raises(ValueError, match="steps must rise"):
        trackers.rows([row(1)])


def test_events_get_their_time(tmp_path: Path) -> None:
    trackers = Trackers(JsonlTracker(tmp_path))
    trackers.start(info(tmp_path))
    trackers.event({"kind": "start", "step": 0})
    trackers.event({"kind": "resume", "step": 0, "time": "2026-01-01T00:00:00Z"})
    first, second = read(tmp_path / "events.jsonl")
    assert list(first) == ["time", "kind", "step"]
    assert datetime.fromisoformat(first["time"].replace("Z", "+00:00")).utcoffset().total_seconds() == 0  # type: ignore[union-attr]
    assert second["time"] == "2026-01-01T00:00:00Z"
