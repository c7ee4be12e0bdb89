"""Whether a run is alive is asked of its lock: of a killed one the status says `running` for good."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import jobs
from launch.liveness import PATIENCE_S, dead_since
from launch.report import report
from launch.sweeps.summary import outcome
from launch.sweeps.trials import Trial
from trainer import locks
from trainer.processes import ATTEMPT, record_attempt

HOLDER = """
import sys, time
from pathlib import Path
from trainer import locks
lock = locks.acquire_run(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""
ROW = {
    "step": 2, "loss": 5.4, "grad_norm": 1.0, "lr": 0.1, "tokens": 10, "samples": 2, "step_s": 1.0, "data_wait_s": 0.1,
    "tokens_per_s": 10.0, "skipped": False,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that says it is running, without a sign for an hour."""
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": "running", "step": 2, "steps": 9, "reason": None}))
    (folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "logs" / "rank-0.log").write_text("started\n")
    silent(folder)
    return folder


def silent(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)


def told(function, capsys: pytest.CaptureFixture[str], folder: Path, **options) -> str:
    assert function(argparse.Namespace(run_dir=folder, **options)) == 0
    return capsys.readouterr().out


def test_a_killed_run_is_dead_for_all_commands(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    silent(run)
    assert "running, step 2/9" in told(jobs.print_status, capsys, run)
    holder.kill()
    holder.wait()
    silent(run)
    status = told(jobs.print_status, capsys, run)
    assert "dead, step 2/9, loss 5.4000 (since 20" in status
    assert "no sign for 60 min, and no process has its folder; run the same command again to continue)" in status
    follow = {"follow": True, "lines": 5, "rank": None}
    assert "started\n==> dead since 20" in told(jobs.print_logs, capsys, run, **follow)
    assert "nothing to stop, it is dead since 20" in told(jobs.cancel, capsys, run, now=False)
    assert not (run / "STOP").exists()
    assert outcome(Trial(0, str(run), [], {}, 9)).state == "dead"
    shown = told(report, capsys, run)
    assert "run: dead\nsince 20" in shown
    page = (run / "report.html").read_text()
    assert ">dead</span>" in page
    assert "no process has its folder" in page


def test_a_run_that_gave_a_sign_or_has_its_lock_lives(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dead_since(run) is not None
    lock = locks.acquire_run(run)
    assert dead_since(run) is None
    assert "is asked to save and stop" in told(jobs.cancel, capsys, run, now=False)
    assert (run / "STOP").exists()
    lock.release()
    os.utime(run / "metrics.jsonl", (time.time() - PATIENCE_S / 2,) * 2)  # a launcher may be starting it again
    assert dead_since(run) is None
    silent(run)
    (run / "environment.json").write_text(json.dumps({"host": "node-of-another-world"}))
    assert dead_since(run) is None
    (run / "environment.json").write_text(json.dumps({"host": platform.node()}))
    (run / "slurm").mkdir()
    (run / "slurm" / "jobs").write_text("17\n")
    assert dead_since(run) is None  # Slurm knows more
    (run / "slurm" / "jobs").unlink()
    assert dead_since(run) is not None
    (run / "status.json").write_text(json.dumps({"state": "finished", "step": 9, "steps": 9}))
    silent(run)
    assert dead_since(run) is None


def test_an_attempt_that_has_no_lock_yet_lives(run: Path) -> None:
    (run / "config.yaml").touch()
    record_attempt(run)
    silent(run)
    assert dead_since(run) is None
    told = json.loads((run / ATTEMPT).read_text())
    (run / ATTEMPT).write_text(json.dumps(told | {"started": "0"}))  # another process has that number now
    silent(run)
    assert dead_since(run) is not None
    (run / ATTEMPT).write_text(json.dumps(told | {"host": "node-of-another-world", "boot": ""}))
    silent(run)
    assert dead_since(run) is None
