"""Invariant I2: killed at any instant and started again, a run ends as if nothing had happened, to the last bit."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from tests.runs import Run, assert_same_bits

STEPS = 40
OVERRIDES = (f"train.steps={STEPS}", "model.dropout=0.1", "train.log_every=1", "train.micro_batch=2")


def killed_and_undisturbed(folder: Path, procs: int, kills: int) -> tuple[Run, Run]:
    """A run that was killed at random steps, and once in the middle of a save, and one that nobody touched."""
    seed = int(os.environ.get("ONECURVE_SEED", str(procs)))
    print(f"ONECURVE_SEED={seed}")
    undisturbed, run = Run(folder / "undisturbed", procs, OVERRIDES), Run(folder / "killed", procs, OVERRIDES)
    undisturbed.train()
    for step in sorted(random.Random(seed).sample(range(1, 20), kills)):
        run.kill_at(step)
    run.kill_in_checkpoint(20)
    run.train()
    assert not list((run.folder / "checkpoints").glob(".attempt*"))  # nothing is left of the save that was killed
    return run, undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("procs", [2, 3, 4])
def test_killed_run_ends_the_same(procs: int, tmp_path: Path) -> None:
    assert_same_bits(*killed_and_undisturbed(tmp_path, procs, kills=1))


@pytest.mark.slow
@pytest.mark.parametrize("procs", [1, 2, 3, 4])
def test_killed_many_times(procs: int, tmp_path: Path) -> None:
    assert_same_bits(*killed_and_undisturbed(tmp_path, procs, kills=10))


@pytest.mark.parametrize("how", ["SIGTERM", pytest.param("STOP", marks=pytest.mark.slow)])
def test_stops_when_asked(how: str, tmp_path) -> None:
    """Finishes the step, saves, says so with code 75, continues."""
    whole = Run(tmp_path / "whole", 1, OVERRIDES)
    whole.train()
    run = Run(tmp_path / "run", 1, (*OVERRIDES, "checkpoint.every=0"))
    job = run.begin()
    while len(run.metrics()) < 5:
        assert job.running(timeout=0.01)
    if how == "STOP":
        (run.folder / "STOP").touch()
    else:
        job.signal(signal.SIGTERM)
    codes, output = job.end()
    assert codes == [75], output
    status = run.status()
    assert status["state"] == "interrupted"
    assert 5 <= status["step"] < STEPS
    run.train()
    assert run.status() == {**run.status(), "state": "finished", "step": STEPS, "exit_code": 0}
    assert_same_bits(run, whole)


@pytest.mark.slow
def test_save_on_request(tmp_path) -> None:
    run = Run(tmp_path / "run", 1, (*OVERRIDES, "checkpoint.every=0"))
    job = run.begin()
    while len(run.metrics()) < 3:
        assert job.running(timeout=0.01)
    (run.folder / "SAVE").touch()
    assert job.end()[0] == [0]
    saved = [event["step"] for event in run.rows("events.jsonl") if event["kind"] == "checkpoint"]
    assert len(saved) == 2
    assert saved[0] < saved[1] == STEPS
