"""Invariant I5 at every crash point of a save, not at a sample of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.checkpoint.storm import CALLS, Life, Outcome, dcp_over_itself, points, saving


def _can_trace() -> bool:
    done = subprocess.run(["strace", "-o", "/dev/null", sys.executable, "-c", ""], capture_output=True)
    return done.returncode == 0


pytestmark = pytest.mark.skipif(
    not shutil.which("strace") or not _can_trace(), reason="needs strace, and the right to trace processes"
)


def told(outcomes: Iterable[Outcome]) -> list[Outcome]:
    its = list(outcomes)
    print(len(its), "points:", dict(Counter(outcome.call for outcome in its if outcome.reached)))
    print("(acknowledged, recovered):", dict(Counter((outcome.acknowledged, outcome.recovered) for outcome in its)))
    assert {"openat", "write", "fsync", "rename"} <= {outcome.call for outcome in its if outcome.reached}
    return its


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("size", "victim"), [(1, None), slow(2, None), slow(2, 0), slow(2, 1)])
def test_killed_at_every_call(tmp_path: Path, size: int, victim: int | None) -> None:
    """Nothing that was acknowledged is lost; what a run goes on from is whole."""
    calls = CALLS if victim != 1 else ("openat", "write", "fsync")  # the second rank only writes its file
    outcomes = list(points(Life(tmp_path / "life", saving, size), victim, "signal=KILL", calls))
    assert not [outcome for outcome in outcomes if outcome.lost]
    if victim != 1:
        told(outcomes)
        assert {0, 1, 2} & {outcome.acknowledged for outcome in outcomes} == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        ("ENOSPC", False),
        *(slow(*its) for its in (("ENOSPC", True), ("EIO", False), ("EIO", True), ("EROFS", True))),
    ],
)
def test_failing_at_every_call(tmp_path: Path, error: str, lasting: bool) -> None:
    """Training goes on; no save is acknowledged that is not there; once there is space again, the next one is."""
    life = Life(tmp_path / "life", saving, 1)
    calls = ("openat", "write", "fsync", "rename", "mkdir")
    for outcome in told(points(life, None, f"error={error}", calls, lasting=lasting)):
        (steps,) = outcome.told
        assert len(steps) == 3, outcome  # nothing ended the process
        assert not outcome.lost, outcome
        if not lasting:
            assert 3 in steps or 2 in steps, outcome


@pytest.mark.slow
def test_a_control_fails(tmp_path: Path) -> None:
    """The same driver over torch's distributed checkpoint, which saves over the last one: or it would prove nothing."""
    outcomes = told(points(Life(tmp_path / "life", dcp_over_itself, 1), None, "signal=KILL"))
    assert sum(outcome.lost for outcome in outcomes) > len(outcomes) / 4
