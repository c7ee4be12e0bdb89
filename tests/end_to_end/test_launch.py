"""`onecurve train`: one failure block, restarts, and being told to stop."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.end_to_end.test_refusals import onecurve
from tests.runs import TINY, Run, assert_same_bits, descendants

OVERRIDES = ("train.steps=60", "train.log_every=1", "model.dropout=0.1")


def launched(run: Run) -> subprocess.Popen[str]:
    command = onecurve("train", "-n", str(run.procs), *TINY, f"run.dir={run.folder}", *run.overrides)
    return subprocess.Popen(command, cwd=run.folder.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(run: Run, step: int, process: subprocess.Popen[str]) -> None:
    while run.last_step() < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def ranks(process: subprocess.Popen[str]) -> list[int]:
    """The processes that train, in the order of their ranks."""
    names = {}
    for pid in descendants(process.pid):
        with contextlib.suppress(OSError):
            names[pid] = Path(f"/proc/{pid}/comm").read_text()
    found = {name: pid for pid, name in names.items() if re.fullmatch(r"onecurve-\d+\n", name)}
    return [pid for _, pid in sorted(found.items())]


def test_a_killed_rank_is_restarted_and_the_curve_does_not_change(tmp_path: Path) -> None:
    undisturbed = Run(tmp_path / "undisturbed", 2, OVERRIDES)
    undisturbed.train()
    run = Run(tmp_path / "run", 2, OVERRIDES)
    process = launched(run)
    wait_for(run, 25, process)
    os.kill(ranks(process)[1], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "rank 1 was killed (signal 9), restart 1 of 3" in output
    assert_same_bits(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop(number: signal.Signals, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", 2, ("train.steps=5000", *OVERRIDES[1:]))
    process = launched(run)
    wait_for(run, 5, process)
    children = ranks(process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert run.status()["state"] == "interrupted"
    assert run.status()["step"] == run.metrics()[-1]["step"]
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_restarts_are_limited_and_the_end_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", 2, ("train.steps=5000", "launch.restarts=0", *OVERRIDES[1:]))
    process = launched(run)
    wait_for(run, 3, process)
    os.kill(ranks(process)[0], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 4, output
    assert run.status()["state"] == "failed"
    assert run.status()["exit_code"] == 4
