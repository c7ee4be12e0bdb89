"""The watchdog: real hangs of every kind, the right rank named, the run restarted and its curve the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from statistics import median

import pytest

from tests.end_to_end.test_refusals import onecurve
from tests.runs import TINY, Run, assert_same_bits
from trainer.config.schema import Watchdog
from trainer.resilience.verdict import verdict
from trainer.resilience.watchdog import budget

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


def user_code(folder: Path) -> None:
    """The objective that hangs, as a package of the user's."""
    shutil.copy(Path(__file__).with_name("hangs.py"), folder)
    (folder / "conf" / "objective").mkdir(parents=True)
    (folder / "conf" / "objective" / "hangs.yaml").write_text(f"name: hangs:Hangs\nway: none\ndone: {folder}/done\n")


@pytest.mark.parametrize(
    "kind", ["skipped", *(pytest.param(kind, marks=pytest.mark.slow) for kind in HANGS if kind != "skipped")]
)
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
