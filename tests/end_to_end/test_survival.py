"""What dies and how: restarts within a budget, fewer processes, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.end_to_end.test_launch import launched, ranks, wait_for
from tests.runs import Run, assert_same_bits, assert_same_curve, descendants

STEPS = ("train.steps=40", "train.log_every=1", "model.dropout=0.1")
FOR_EVER = ("train.steps=100000", "train.log_every=1", "eval.every=0", "data.ledger=false")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", 2, STEPS)
    run.train()
    return run


def restarts(run: Run) -> list[dict]:
    return [event for event in run.rows("events.jsonl") if event["kind"] == "restart"]


@pytest.mark.slow
def test_crashes_are_survived_as_long_as_there_is_progress(tmp_path: Path, undisturbed: Run) -> None:
    """Four faults with a budget of one restart: each new checkpoint fills it up."""
    faults = "step.after_backward:raise:6:1,track.rows:kill:8:0,data.next:raise:9:0,checkpoint.before_rename:kill:3:0"
    run = Run(tmp_path / "run", 2, (*STEPS, "launch.restarts=1", "checkpoint.every=4", f"debug.faults=[{faults}]"))
    process = launched(run)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert len(restarts(run)) == 2  # of a killed rank nobody tells
    assert output.count("restart 1 of 1") == 4
    assert "rank 1 failed at step 5 (Provoked: provoked by debug.faults" in output
    assert_same_bits(run, undisturbed)


@pytest.mark.slow
def test_a_crash_that_repeats_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", 2, (*STEPS, "debug.faults=[step.after_backward:raise:7+:1]", "checkpoint.every=0"))
    process = launched(run)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 4, output
    assert output.count("restart 1 of 3") == 1
    assert "restart 2 of 3" not in output
    status = run.status()
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    assert "the same failure twice at step 6" in status["reason"]
    assert "provoked by debug.faults: step.after_backward:raise:7+:1" in status["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["supervisor", "server"])
def test_nothing_is_left_behind(victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = Path(tempfile.mkdtemp())  # names of sockets must be short
    monkeypatch.setenv("TMPDIR", str(temporary))
    shared = set(Path("/dev/shm").iterdir())
    run = Run(tmp_path / "run", 2, (*FOR_EVER, "data.workers=1", "data.processes=true"))
    process = launched(run)
    wait_for(run, 3, process)
    family = [process.pid, *descendants(process.pid)]
    assert len(family) > 4
    assert not [line for pid in family for line in listening(pid) if not line.startswith(LOOPBACK)]
    server = next(pid for pid in family if b"launch.forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(process.pid if victim == "supervisor" else server, signal.SIGKILL)
    if victim == "server":
        assert "the processes were killed" in next(line for line in process.stdout if "restart" in line)
        wait_for(run, run.last_step() + 2, process)
        family.remove(process.pid)
        process.terminate()
        assert process.wait(timeout=60) == 75
    deadline = time.monotonic() + 5
    while (left := alive(family)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    process.communicate()
    assert not [path for path in temporary.rglob("*") if "torchinductor" not in path.name]  # torch's cache of kernels
    assert not [path for path in set(Path("/dev/shm").iterdir()) - shared if "torch" in path.name]


@pytest.mark.slow
def test_torchrun_restarts_it_likewise(tmp_path: Path, undisturbed: Run) -> None:
    """A killed rank, a crash and a hang, each in a life of its own; the end is told by the status."""
    faults = "step.after_update:kill:7:1,data.next:raise:9:0,step.after_backward:stop:13:1"
    watched = ("watchdog.grace_s=0", "watchdog.first_s=60", "checkpoint.every=4", f"debug.faults=[{faults}]")
    run = Run(tmp_path / "run", 2, (*STEPS, *watched))
    command = run.command
    command.insert(command.index("--standalone"), "--max-restarts=5")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert len([event for event in run.rows("events.jsonl") if event["kind"] == "resume"]) == 3
    assert [event["rank"] for event in restarts(run)] == [0, 0, 1]  # of the first, rank 0 only lost the other
    assert_same_bits(run, undisturbed)


@pytest.mark.slow
def test_torchrun_killed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = Path(tempfile.mkdtemp())  # names of sockets must be short
    monkeypatch.setenv("TMPDIR", str(temporary))
    run = Run(tmp_path / "run", 2, FOR_EVER)
    process = run.start()
    wait_for(run, 3, process)
    family = [process.pid, *descendants(process.pid)]
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while (left := alive(family)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    process.communicate()
    ours = [path for path in temporary.rglob("*") if not path.is_dir()]
    assert not [path for path in ours if "torchelastic" not in str(path)]  # that is torchrun's own


@pytest.mark.slow
def test_it_goes_on_with_fewer_and_grows_back(tmp_path: Path) -> None:
    """Two of four processes die at every start; then they are well again."""
    whole = Run(tmp_path / "whole", 1, STEPS)
    whole.train()
    run = Run(tmp_path / "run", 4, (*STEPS, "launch.min_procs=2", "launch.grow_s=6", "checkpoint.every=4"))
    slow = "debug.faults=[step.after_update:delay@0.3:1+]"
    process = launched(Run(run.folder, 4, (*run.overrides, slow)))
    while 2 not in sizes(run):
        assert process.poll() is None, process.communicate()[0]
        for pid in ranks(process)[2:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert sizes(run)[-1] == 4, output
    assert "with 2 of 4 processes" in output
    assert "trying 4 processes again" in output
    assert_same_curve(run, whole, 40)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_a_second_interrupt_leaves_at_once(plain: bool, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", 1, (*FOR_EVER, "checkpoint.every=2", "debug.faults=[data.next:delay@1000:6:0]"))
    process = run.start() if plain else launched(run)
    wait_for(run, 5, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]  # it would sleep a thousand seconds
    assert process.returncode == 4, output
    assert "interrupted a second time" in output
    assert run.status()["state"] == "failed"
    assert run.weights()  # the newest checkpoint is whole


def test_a_time_limit_stops_it_as_asked(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", 1, (*FOR_EVER, "launch.time_limit=3s"))
    run.train(expect=75)
    assert run.status()["state"] == "interrupted"
    assert run.weights()


LOOPBACK = ("0100007F:", "00000000000000000000000001000000:")


def alive(family: list[int]) -> list[int]:
    return [pid for pid in family if Path(f"/proc/{pid}").exists() and state(pid) != "Z"]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def sizes(run: Run) -> list[int]:
    """The processes of each life."""
    return [event["processes"] for event in run.rows("events.jsonl") if event["kind"] in ("start", "resume")]


def listening(pid: int) -> list[str]:
    """Local addresses (hexadecimal) on which a process listens."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            sockets.add(os.readlink(link))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.append(fields[1])
    return found
