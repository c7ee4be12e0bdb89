"""The supervisor's judgment: who pays for a restart, and when there is none."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from launch.supervisor import Budget, Life, Requests, Supervisor


def test_a_budget_is_filled_by_progress() -> None:
    budget = Budget(2)
    assert [budget.spend(False, None) for _ in range(2)] == [None, None]
    assert budget.spend(True, None) is None
    assert budget.spend(False, None) is None
    assert budget.spend(False, None) == "no new checkpoint in 2 restarts"
    assert Budget(0).spend(True, None) == "launch.restarts=0"


def test_the_same_failure_twice_ends_it() -> None:
    budget = Budget(9)
    assert budget.spend(False, (7, "ValueError: x")) is None
    assert budget.spend(False, (8, "ValueError: x")) is None
    assert budget.spend(False, (8, "ValueError: y")) is None
    assert budget.spend(False, (8, "ValueError: y")) == "the same failure twice at step 8"
    assert budget.spend(True, (8, "ValueError: y")) is None  # a checkpoint lies between them


def test_it_waits_longer_and_longer() -> None:
    budget, pauses = Budget(9), []
    for _ in range(8):
        budget.spend(False, None)
        pauses.append(budget.pause_s)
    assert pauses == [0, 2, 4, 8, 16, 30, 30, 30]


def test_what_happens_behind_the_end_of_a_run_restarts_nothing(tmp_path: Path) -> None:
    supervisor = Supervisor.__new__(Supervisor)
    supervisor.folder, supervisor.began, supervisor.life = tmp_path, time.time() - 1, "a"
    supervisor.requests = Requests()
    supervisor.restart = 0
    status = tmp_path / "status.json"
    killed = Life(codes={0: -9, 1: 0}, first_failures=[0])
    status.write_text(json.dumps({"state": "running"}))
    assert supervisor._decide_exit(killed) is None
    status.write_text(json.dumps({"state": "finished"}))
    assert supervisor._decide_exit(killed) == (0, "")
    assert supervisor._decide_exit(Life(codes={0: 2})) == (2, "")  # refused, before it took the folder
    os.utime(status, (1, 1))
    assert supervisor._decide_exit(killed) is None  # of an earlier life
