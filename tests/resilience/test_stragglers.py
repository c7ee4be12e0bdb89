"""A slow rank is named, by what it is slow at; equal ones are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import Run
from trainer.resilience.stragglers import find_slow


def test_who_stands_out() -> None:
    assert find_slow([1.0, 1.1, 2.0, 0.9], 10) == [2]
    assert find_slow([0.001, 0.001, 0.1, 0.001], 10) == []  # a hundredth of the time is nothing
    assert find_slow([1.0, 1.2, 1.4], 10) == []
    assert find_slow([0.0, 5.0, 5.0], 10) == []


@pytest.mark.slow
def test_a_slow_reader_is_named(tmp_path: Path) -> None:
    """Rank 2 of 3 takes 0.2 s for each sequence that it reads: 8 in a step."""
    slow_reader = ("train.steps=32", "train.log_every=1", "debug.faults=[data.read:delay@0.2:1+:2]", "data.workers=1")
    run = Run(tmp_path / "run", 3, slow_reader)
    run.train()
    stragglers = [event for event in run.rows("events.jsonl") if event["kind"] == "straggler"]
    assert {(event["rank"], event["what"]) for event in stragglers} == {(2, "data_wait_s")}
    (line, *_) = run.rows("ranks.jsonl")
    assert len(line["forward_s"]) == 3
    assert min(line["forward_s"]) > 0
