"""A stop that is asked for waits for nothing but the step and the save, whatever the run is doing; nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.end_to_end.test_launch import launched
from tests.runs import Run, assert_same_bits

LONG = 1000  # seconds that no test waits for
OVERRIDES = ("train.steps=24", "train.log_every=5", "eval.every=10", "eval.steps=8", "checkpoint.every=10")


def ask(how: str, run: Run, process: subprocess.Popen[str]) -> str:
    """Asks the run to stop; returns what it printed, once it has ended with code 75."""
    if how == "STOP":
        (run.folder / "STOP").touch()
    else:
        process.send_signal(getattr(signal, how))
    output = process.communicate(timeout=LONG / 4)[0]
    assert process.returncode == 75, output
    assert run.status()["state"] == "interrupted", output
    return output


def wait_until(condition, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def saved(run: Run, step: int) -> bool:
    return (run.folder / "checkpoints" / f"step-{step:08d}").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", 2, OVERRIDES)
    run.train()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "STOP"])
def test_in_an_evaluation(how: str, tmp_path: Path, undisturbed: Run) -> None:
    """It is broken off, and made up for in the next attempt; the step was saved before it."""
    run = Run(tmp_path / "run", 2, OVERRIDES)
    delay = f"debug.faults=[eval.batch:delay@0.5:1+,eval.batch:delay@{LONG}:15:0]"  # the 15th is in the second one
    process = launched(Run(run.folder, 2, (*run.overrides, delay)))
    wait_until(lambda: saved(run, 10), process)
    assert run.last_step() == 9  # the row waits for its evaluation
    ask(how, run, process)
    assert run.status()["step"] == 10
    assert "eval" not in run.metrics()[-1]
    run.train()
    assert_same_bits(run, undisturbed)


def test_killed_in_an_evaluation(tmp_path: Path, undisturbed: Run) -> None:
    run = Run(tmp_path / "run", 2, OVERRIDES)
    killed = (*run.overrides, "debug.faults=[eval.batch:kill:3:1]", "checkpoint.asynchronous=false")
    Run(run.folder, 2, killed).train(expect=-signal.SIGKILL)
    assert saved(run, 10)
    assert run.last_step() == 9
    run.train()
    assert_same_bits(run, undisturbed)
    assert [event["step"] for event in run.rows("events.jsonl") if event["kind"] == "resume"] == [10]


@pytest.mark.slow
def test_an_evaluation_that_fails_costs_no_step(tmp_path: Path, undisturbed: Run) -> None:
    """Also at the last step, and however often."""
    run = Run(tmp_path / "run", 2, OVERRIDES)
    failing = Run(run.folder, 2, (*run.overrides, "debug.faults=[eval.batch:raise:20+:0]"))  # in the last evaluation
    failing.train(expect=4)
    assert saved(run, 24)
    again = Run(run.folder, 2, (*run.overrides, "debug.faults=[eval.batch:raise:1+:0]"))
    again.train(expect=4)
    run.train()
    assert_same_bits(run, undisturbed)


PIPELINE = ("strategy=pipeline", "train.micro_batch=6")
STUCK = [
    # processes, overrides, samples that a process reads in a step
    pytest.param(1, ("strategy=single",), 24, marks=pytest.mark.slow),
    pytest.param(2, ("strategy=ddp",), 12, marks=pytest.mark.slow),
    pytest.param(2, ("strategy=fsdp",), 12, marks=pytest.mark.slow),
    pytest.param(2, ("strategy=zero", "strategy.stage=2"), 12, marks=pytest.mark.slow),
    pytest.param(2, ("strategy=zero", "strategy.stage=3"), 12, marks=pytest.mark.slow),
    pytest.param(2, PIPELINE, 24, marks=pytest.mark.slow),
    pytest.param(2, (*PIPELINE, "data.on_error=quarantine"), 24, marks=pytest.mark.slow),
    pytest.param(4, (*PIPELINE, "strategy.stages=2", "strategy.data_parallel=fsdp"), 12, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("procs", "overrides", "reads"), STUCK)
def test_while_data_is_waited_for(procs: int, overrides: tuple[str, ...], reads: int, tmp_path: Path) -> None:
    """The step whose data does not come is abandoned on all ranks: no update, no row; and done in the next attempt."""
    overrides = (*OVERRIDES, "train.micro_batch=4", *overrides)
    undisturbed, run = Run(tmp_path / "undisturbed", procs, overrides), Run(tmp_path / "run", procs, overrides)
    undisturbed.train()
    stuck = f"debug.faults=[data.read:delay@{LONG}:{12 * reads + 5}:{procs - 1}]"  # in step 13
    process = launched(Run(run.folder, procs, (*overrides, stuck)))
    wait_until(lambda: run.last_step() >= 10, process)
    time.sleep(1)  # most likely it waits by now; if not, it is stopped before, as in other tests
    ask("SIGTERM" if procs > 1 else "STOP", run, process)
    assert 10 <= run.last_step() == run.status()["step"] <= 12
    run.train()
    assert_same_bits(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1"])
def test_during_the_start(how: str, tmp_path: Path) -> None:
    """There is nothing to save: it leaves, whatever it is in."""
    run = Run(tmp_path / "run", 1, OVERRIDES)
    process = Run(run.folder, 1, (*run.overrides, f"debug.faults=[start.built:delay@{LONG}:1]")).start()
    wait_until(lambda: (run.folder / "logs" / "faults").exists(), process)
    output = ask(how, run, process)
    by = " by SIGUSR1" if how == "SIGUSR1" else ""
    assert f"stopped as asked{by}, before there was anything new to save" in output
    assert f"asked{by}," in run.status()["reason"]
    run.train()
    assert run.status()["state"] == "finished"


@pytest.mark.slow
def test_ranks_leave_a_start_together(tmp_path: Path) -> None:
    """One hangs in its start, the others wait for it: none of them needs another to leave."""
    run = Run(tmp_path / "run", 2, OVERRIDES)
    process = launched(Run(run.folder, 2, (*run.overrides, f"debug.faults=[start.restored:delay@{LONG}:1:1]")))
    wait_until(lambda: (run.folder / "logs" / "faults").exists(), process)
    ask("SIGTERM", run, process)
    assert not [pid for pid in run.processes() if pid != os.getpid()]
