"""The watchdog: real hangs of every kind, the right rank named, the run restarted and its curve the same."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from statistics import median

import pytest

from tests.end_to_end.test_refusals import onecurve
from tests.runs import TINY, Run, assert_same_bits
from trainer.config.schema import Watchdog
from trainer.resilience.hang_verdict import verdict
from trainer.resilience.stacks import last_collective
from trainer.resilience.time_ledger import TimeLedger
from trainer.resilience.watchdog import budget, patience

STEPS = ("train.steps=60", "train.log_every=1")
WATCHED = ("watchdog.grace_s=1", "watchdog.first_s=100", "checkpoint.every=5")
# Kind of hang: how it is provoked on rank 1 of 3, and what the sentence must say.
HANGS = {
    "stopped": ("debug.faults=[step.after_backward:stop:40:1]", r"rank 1 is stopped"),
    "skipped": ("objective.way=skipped", r"rank 1 .*left out .*all_?reduce.*ranks 0, 2 wait in all_reduce"),
    "loader": ("debug.faults=[data.read:delay@1000:300:1]", r"rank 1 has been in .*loader.*data wait"),
    "save": ("debug.faults=[checkpoint.before_write:delay@1000:5:1]", r"rank 1 has been in .*ranks 0, 2 wait in"),
    "endless": ("objective.way=endless", r"rank 1 has been in .*hangs.py endless\(\)"),
    "lock": ("objective.way=lock", r"rank 1 holds Python's lock in foreign code, at .*sre|rank 1 holds .*re"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", 3, STEPS)
    run.train()
    return run


def user_code(
    folder: Path, name: str = "hangs", keys: str = "name: hangs:Hangs\nway: none\ndone: {folder}/done\n"
) -> None:
    """An objective of this folder's, as a package of the user's."""
    shutil.copy(Path(__file__).with_name(f"{name}.py"), folder)
    (folder / "conf" / "objective").mkdir(parents=True)
    (folder / "conf" / "objective" / f"{name}.yaml").write_text(keys.format(folder=folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", HANGS)
def test_a_hang_is_found_told_and_survived(kind: str, tmp_path: Path, undisturbed: Run) -> None:
    how, sentence = HANGS[kind]
    overrides = [*TINY, *STEPS, *WATCHED, how]
    if how.startswith("objective"):
        user_code(tmp_path)
        overrides = ["--config-dir=conf", *overrides, "run.plugins=[hangs]", "objective=hangs"]
    run = Run(tmp_path / "run", 3)
    command = onecurve("train", "-n", "3", *overrides, f"run.dir={run.folder}")
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    told = re.search(r"onecurve: hang: (.*)\. Stacks: (\S+) \(after ([\d.]+) s, where ([\d.]+) s were", process.stderr)
    assert told, process.stderr
    assert re.search(sentence, told[1]), told[1]
    assert sorted(path.name for path in Path(told[2]).glob("rank-*"))
    (restart,) = [event for event in run.rows("events.jsonl") if event["kind"] == "restart"]
    assert restart["rank"] == 1
    assert told[1] in restart["reason"]
    if not how.startswith("objective"):
        assert_same_bits(run, undisturbed)


@pytest.mark.slow
def test_no_false_alarm(tmp_path: Path) -> None:
    """5,000 steps, one of them ten times as slow."""
    steps = ("train.steps=5000", "checkpoint.every=1000", "eval.every=0", "data.ledger=false", "model.layers=1")
    slow = "debug.faults=[step.after_backward:delay@1:2500:1]"  # a step takes 20 to 50 ms
    run = Run(tmp_path / "run", 2, (*steps, slow, "watchdog.grace_s=0", "watchdog.first_s=100"))
    run.train()
    steps = [row["step_s"] for row in run.metrics()]
    usual = median(steps)
    assert 10 * (max(steps) - usual) > 9 * usual  # ten are read together: one of them took ten times as long
    assert list((run.folder / "logs" / "faults").iterdir())
    assert not list((run.folder / "logs").glob("hang*"))


@pytest.mark.slow
def test_a_slow_first_step_is_no_hang(tmp_path: Path) -> None:
    """Whatever came before it: the save of step 0 cuts the time before the first step into short spells."""
    slow = "debug.faults=[step.loss:delay@14:1:0]"  # longer than 5 + 5 s, what any spell may take that was timed before
    run = Run(
        tmp_path / "run", 1, ("train.steps=2", "eval.every=0", slow, "watchdog.grace_s=5", "watchdog.first_s=100")
    )
    run.train()
    assert run.status()["state"] == "finished"
    assert run.metrics()[0]["step_s"] > 14
    assert not list((run.folder / "logs").glob("hang*"))


def test_what_is_between_two_steps_is_no_step() -> None:
    clock = TimeLedger(None, time.monotonic())
    for kind in ("startup", "productive", "checkpoint", "productive", "data_wait", "productive"):
        clock.switch(kind)
    assert clock.seconds("productive") == []  # the first step has yet to end
    clock.step = 1
    clock.switch("evaluation")
    clock.switch("productive")
    clock.switch("data_wait")
    assert len(clock.seconds("productive")) == 1
    clock.note_restore(0)
    assert not any(map(clock.seconds, ("productive", "data_wait", "checkpoint", "evaluation")))


def test_an_evaluation_that_goes_on_is_no_hang() -> None:
    """Its budget is a whole evaluation's, which a rank that is done may wait for; it counts from the last batch."""
    clock = TimeLedger(None, time.monotonic())
    clock.switch("evaluation")
    began = clock.since
    time.sleep(0.01)
    clock.note_progress()
    assert clock.since > began + 0.009
    clock.switch("productive")
    assert clock.seconds("evaluation")[0] >= 0.01


@pytest.mark.slow
def test_a_run_that_goes_on_looks_at_nothing_in_its_folder(tmp_path: Path) -> None:
    user_code(tmp_path, "looks", "name: looks:Looks\nrun_dir: {folder}/run\n")
    steps = ("train.steps=8", "train.log_every=100", "eval.every=0", "checkpoint.every=0")
    ours = (f"--config-dir={tmp_path}/conf", "run.plugins=[looks]", "objective=looks")
    Run(tmp_path / "run", 2, (*ours, *steps)).train()
    main, other = ((tmp_path / f"looks-{rank}").read_text() for rank in range(2))
    assert other == ""
    assert "watchdog" not in main  # it looks for requests when it reads the numbers


def test_who_is_late_looks_before_an_alarm_can_be() -> None:
    for grace, first in ((60, 1800), (0, 100), (60, 5), (0, 0.1)):
        config = Watchdog(enabled=True, grace_s=grace, first_s=first)
        earliest = min(budget([], config), budget([0.001], config))
        assert 0 < patience(config) <= earliest / 2


def test_budgets_follow_what_was_seen() -> None:
    config = Watchdog(enabled=True, grace_s=2, first_s=100)
    assert budget([], config) == 100
    assert budget([0.1], config) == 7
    assert budget([50.0, *[0.1] * 10], config) == 7  # the first one compiled
    assert budget([4.0] * 20, config) == 14
    assert budget([1.0] * 199 + [1000.0], config) == 7  # one of a hundred may be as slow as it likes


def told(**more) -> dict:
    return {
        "where": "trainer/loop.py go_on() line 9", "seconds": 9.0, "step": 7, "kind": "productive", "reader": None,
        "collective": "all_reduce", "waits": True, "backward": False, "last": None, "counts": {}, **more,
    }  # fmt: skip


def test_who_is_to_blame() -> None:
    in_data = told(waits=False, collective=None, where="trainer/data/stream.py __next__() line 1", kind="data_wait")
    assert verdict({0: told(), 1: in_data, 2: told()}, {}) == (
        [1],
        "rank 1 has been in trainer/data/stream.py __next__() line 1 for 9 s (step 7, data wait); "
        "ranks 0, 2 wait in all_reduce of step 7",
    )
    assert verdict({0: told(), 2: told()}, {1: "is stopped (SIGSTOP)"})[0] == [1]
    first = {"group": "0", "number": 5, "name": "gloo:all_reduce", "time": 1.0}
    later = {"group": "1", "number": 8, "name": "gloo:broadcast", "time": 2.0}
    ahead, behind = {"last": first, "counts": {"0": 5, "1": 7}}, {"last": later, "counts": {"0": 4, "1": 8}}
    assert verdict({0: told(**ahead), 1: told(**behind)}, {})[0] == [1]
    assert verdict({0: told(), 1: told(where="trainer/x.py f() line 1"), 2: told()}, {})[0] == [1]
    assert verdict({0: told(), 1: told()}, {})[0] == [0, 1]


def entry(backend: str, group: str, number: int, at: int, *, ended: bool = True, name: str = "all_reduce") -> dict:
    """As FlightRecorderDetail.hpp of torch 2.13 dumps it in JSON (version 2.10), for gloo and NCCL alike."""
    if backend == "nccl":
        state, started = ("completed" if ended else "scheduled"), at + 1
    else:
        state, started = "scheduled", 0  # gloo tells only by `retired` that it is over
    return {
        "collective_seq_id": number, "input_dtypes": ["Float"], "input_sizes": [[4096]], "is_p2p": False,
        "op_id": number, "output_dtypes": ["Float"], "output_sizes": [[4096]], "p2p_seq_id": 0, "pg_id": int(group),
        "process_group": [group, "default_pg"], "profiling_name": f"{backend}:{name}", "record_id": number,
        "retired": ended, "state": state, "thread_id": "140325192525504", "thread_name": "python",
        "time_created_ns": at, "time_discovered_completed_ns": at + 2 if ended and state == "completed" else 0,
        "time_discovered_started_ns": started if ended else 0, "timeout_ms": 600000,
    }  # fmt: skip


def test_of_ranks_that_all_wait_on_gpus_the_one_that_left_a_collective_out_is_found() -> None:
    """Host and device apart: two ranks have more in NCCL's queue already; gloo's group has the same name and other
    numbers."""
    done = [entry("nccl", "0", number, 100 + number) for number in range(1, 41)]
    queued = [entry("nccl", "0", number, 200 + number, ended=False) for number in range(41, 46)]
    gloo = [entry("gloo", "0", 7, 150), entry("gloo", "2", 900, 400)]
    waits = last_collective({"gloo": gloo, "nccl": done + queued}, ["0", "1", "2"])
    assert waits["last"] == {"group": "nccl/0", "number": 41, "name": "nccl:all_reduce", "time": 241e-9}
    assert waits["counts"] == {"gloo/0": 7, "gloo/1": 0, "gloo/2": 900, "nccl/0": 45, "nccl/1": 0, "nccl/2": 0}
    left_out = last_collective(
        {"gloo": [*gloo, entry("gloo", "1", 1, 500, ended=False)], "nccl": done}, ["0", "1", "2"]
    )
    assert left_out["last"]["group"] == "gloo/1"
    culprits, sentence = verdict({0: told(**waits), 1: told(**left_out), 2: told(**waits)}, {})
    assert culprits == [1]
    assert "left out all_reduce that others wait in" in sentence


def test_where_nothing_is_waited_for_the_newest_collective_is_the_last() -> None:
    gloo, nccl = [entry("gloo", "0", 7, 150)], [entry("nccl", "0", 3, 160, name="_reduce_scatter_base")]
    assert last_collective({"gloo": gloo, "nccl": nccl}, ["0"])["last"]["number"] == 3
    assert last_collective({"gloo": [], "nccl": []}, ["0"])["last"] is None
