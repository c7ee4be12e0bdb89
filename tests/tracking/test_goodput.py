"""The ledger of time: whatever happens to a run, its parts are its whole life."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runs import Run
from trainer.errors import ConfigError
from trainer.resilience import time_ledger
from trainer.resilience.time_ledger import GOODPUT, TimeLedger
from trainer.tracking.base import Row
from trainer.tracking.goodput import FILE, Goodput, goodput, sum_up
from trainer.tracking.jsonl import read
from trainer.tracking.run_files import RunFiles
from trainer.tracking.summary import load

NOON = datetime(2026, 3, 14, 12, tzinfo=timezone.utc)
PRODUCTIVE, WAITING = 3.0, 0.5  # seconds of a step


class Clock:
    """The clocks that the ledger of time reads. `jump` moves the wall clock alone."""

    def __init__(self) -> None:
        self.elapsed = self.jump = 0.0

    def monotonic(self) -> float:
        return self.elapsed

    def now(self, _zone: Any) -> datetime:
        return NOON + timedelta(seconds=self.elapsed + self.jump)


@contextmanager
def fake_clock() -> Iterator[Clock]:
    clock = Clock()
    with (
        patch.object(time_ledger, "time", clock),
        patch.object(time_ledger, "datetime", clock),
        patch.object(TimeLedger, "_last", None),
        patch.object(time_ledger, "atexit"),
    ):
        yield clock


class Lines(list):
    """What a ledger of time appends to."""

    append = list.extend  # type: ignore[assignment]

    def mend(self) -> None: ...


times = st.floats(0.01, 1000, allow_nan=False)
lives = st.lists(
    st.fixed_dictionaries({
        "startup": times,
        "steps": st.integers(0, 30),
        "every": st.integers(1, 7),  # steps a line
        "checkpoint": times,
        "unwritten": times,  # what a kill takes with it
        "down": times,
        "back": st.integers(0, 20),  # steps from the last line to the checkpoint that the next life finds
        "rollback": st.one_of(st.none(), st.integers(0, 20)),
        "ends": st.booleans(),  # writes its last line, instead of being killed
    }),
    min_size=1, max_size=6,
)  # fmt: skip


def simulated(history: list[dict[str, Any]], clock: Clock) -> tuple[list[Row], int]:
    """The lines of a run that lives as `history` says, and the step it came to."""
    lines, at = Lines(), 0
    for life in history:
        ledger = TimeLedger(lines, clock.elapsed)  # type: ignore[arg-type]
        TimeLedger._last = None  # another process
        clock.elapsed += life["startup"]
        ledger.note_restore(at)
        trained(ledger, clock, at, life)
        at += life["steps"]
        if life["rollback"] is not None and life["steps"]:
            clock.elapsed += life["unwritten"]  # of a step that is never told of
            at = max(0, at - life["rollback"])
            ledger.note_restore(at)
            clock.elapsed += life["startup"]
            trained(ledger, clock, at, life)
            at += life["steps"]
        if life["ends"]:
            ledger.switch("finishing")
            clock.elapsed += life["checkpoint"]
            ledger.close()
        else:
            clock.elapsed += life["unwritten"]
        clock.elapsed += life["down"]
        last, at = at, max(0, at - life["back"])
    return lines, last


def trained(ledger: TimeLedger, clock: Clock, at: int, life: dict[str, Any]) -> None:
    for step in range(at + 1, at + life["steps"] + 1):
        ledger.switch("data_wait")
        clock.elapsed += WAITING
        ledger.switch("productive")
        clock.elapsed += PRODUCTIVE
        if step % life["every"] == 0 or step == at + life["steps"]:
            ledger.write(step)


@settings(deadline=None, max_examples=150)
@given(lives)
def test_the_parts_are_the_whole(history: list[dict[str, Any]]) -> None:
    with fake_clock() as clock:
        lines, last = simulated(history, clock)
    seconds = sum_up(lines)
    ended = datetime.fromisoformat(lines[-1]["time"])
    assert sum(seconds.values()) == pytest.approx((ended - NOON).total_seconds(), abs=1e-3)
    assert min(seconds.values()) >= 0
    # Each step counts once, however often it was done.
    assert seconds.get("productive", 0) == pytest.approx(last * PRODUCTIVE, abs=1e-3)
    assert seconds.get("data_wait", 0) == pytest.approx(last * WAITING, abs=1e-3)
    again = sum(life["steps"] * (1 if life["rollback"] is None else 2) for life in history) - last
    told = sum(life["unwritten"] for life in history if life["rollback"] is not None and life["steps"])
    assert seconds.get("lost", 0) == pytest.approx(again * (PRODUCTIVE + WAITING) + told, abs=1e-3)


@settings(deadline=None, max_examples=100)
@given(lives, st.lists(st.floats(-1e5, 1e5), min_size=6, max_size=6))
def test_a_clock_that_jumps_changes_only_how_long_the_run_was_down(
    history: list[dict[str, Any]], jumps: list[float]
) -> None:
    with fake_clock() as clock:
        lines, _ = simulated(history, clock)
    right = sum_up(lines)
    lives_ids = list(dict.fromkeys(line["life"] for line in lines))
    for line in lines:
        jump = timedelta(seconds=jumps[lives_ids.index(line["life"])])
        line["time"] = (datetime.fromisoformat(line["time"]) + jump).isoformat()
    wrong = sum_up(lines)
    assert wrong.pop("down", 0) >= 0
    right.pop("down", 0)
    assert wrong == right


def line(life: str | None, at: float, step: int, restored: bool = False, **seconds: float) -> Row:
    told = {"life": life} if life else {}
    more = {"restored": True} if restored else {}
    return {"time": (NOON + timedelta(seconds=at)).isoformat(), **told, "step": step, **more, "seconds": seconds}


def test_a_line_that_straddles_the_restored_step_is_split() -> None:
    lines = [
        line("a", 10, 0, restored=True, startup=10),
        line("a", 110, 10, productive=80, data_wait=10, checkpoint=10),
        line("b", 150, 6, restored=True, startup=15),
        line("b", 190, 10, productive=40),
    ]
    assert sum_up(lines) == pytest.approx(
        {"startup": 25, "productive": 48 + 40, "data_wait": 6, "checkpoint": 6, "lost": 40, "down": 25}
    )


def test_work_on_a_step_that_was_never_finished_is_lost_and_the_wait_for_a_checkpoint_is_not() -> None:
    lines = [
        line("a", 10, 0, restored=True, startup=10),
        line("a", 20, 10, productive=10),
        line("a", 30, 10, checkpoint=7, productive=3, finishing=0),
        line("b", 40, 10, restored=True, startup=10),
    ]
    assert sum_up(lines) == {
        "startup": 20, "productive": 10, "checkpoint": 7, "lost": 3, "down": 0, "finishing": 0,
    }  # fmt: skip


def test_lines_of_before_there_were_lives_are_read() -> None:
    lines = [
        line(None, 11, 1, startup=10, productive=1),
        line(None, 20, 10, productive=9),
        line(None, 36, 6, startup=5, productive=1),  # the first step behind a checkpoint of step 5
        line(None, 41, 10, productive=5),
        line("new", 50, 8, restored=True, startup=4),
        line("new", 52, 10, productive=2),
    ]
    assert sum_up(lines) == pytest.approx({"startup": 19, "productive": 10.5, "lost": 5 + 2.5, "down": 10 + 5})


def test_what_a_ledger_writes_is_summed_up_whatever_a_kill_left(tmp_path: Path) -> None:
    assert goodput(tmp_path) is None
    for last in (4, 8):
        with patch.object(TimeLedger, "_last", None):
            ledger = TimeLedger(RunFiles(tmp_path).open_appender(GOODPUT), time.monotonic())
        ledger.note_restore(last - 4)
        for step in range(last - 3, last + 1):
            ledger.switch("data_wait")
            ledger.switch("productive")
            ledger.write(step)
        with (tmp_path / GOODPUT).open("a") as torn:
            torn.write('{"time": "20')
    rows = read(tmp_path / FILE)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert len({row["life"] for row in rows}) == 2
    found = goodput(tmp_path)
    assert found is not None
    assert found.seconds.keys() == {"startup", "data_wait", "productive", "lost", "down"}
    assert found.seconds["lost"] == 0


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"goodput\.jsonl: not a ledger of time"):
        goodput(tmp_path)


def test_the_next_run_of_a_sweep_begins_where_the_last_one_ended(tmp_path: Path) -> None:
    with fake_clock() as clock:
        for number in range(2):
            clock.elapsed += 10
            ledger = TimeLedger(RunFiles(tmp_path).open_appender(f"{number}.jsonl"), 0.0)
            ledger.note_restore(0)
    assert read(tmp_path / "1.jsonl")[0]["seconds"] == {"startup": 10}


def test_another_thread_reads_what_the_run_is_at_and_how_long_that_took_before() -> None:
    with fake_clock() as clock:
        ledger = TimeLedger(None, 0.0)
        for number in range(300):
            ledger.switch("data_wait")
            clock.elapsed += 0.5
            ledger.write(number)  # divides no spell
            clock.elapsed += 0.5
            assert ledger.switch("productive") == 1
            ledger.step += 1
            clock.elapsed += number
        assert (ledger.kind, ledger.since) == ("productive", clock.elapsed - 299)
    assert ledger.seconds("data_wait") == [1.0] * 256
    assert ledger.seconds("productive") == list(range(43, 299))
    assert ledger.seconds("none") == []
    end = threading.Event()

    def watch() -> None:
        while not end.is_set():
            assert len(ledger.seconds("productive")) <= 256

    thread = threading.Thread(target=watch)
    thread.start()
    begun = time.perf_counter()
    for _ in range(50_000):
        ledger.switch("data_wait")
        ledger.switch("productive")
    end.set()
    thread.join()
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        ({"productive": 90, "lost": 7, "down": 3}, "90.0% of 01:40 was productive. The largest overhead: lost work, "
         "7.0%: save more often (checkpoint.every)."),
        ({"productive": 60.0}, "100.0% of 01:00 was productive."),
        ({"startup": 5}, "0.0% of 00:05 was productive. The largest overhead: start-up, 100.0%: "
         "fewer and longer attempts, and data.cache kept where each of them finds it."),
        ({"productive": 5, "siesta": 5}, "50.0% of 00:10 was productive. The largest overhead: siesta, 50.0%."),
    ],
)  # fmt: skip
def test_the_largest_overhead_is_named(seconds: dict[str, float], told: str) -> None:
    assert Goodput(seconds).sentence == told
    assert sum(share for *_, share in Goodput(seconds).table) == pytest.approx(1)


@pytest.mark.slow
def test_a_run_that_was_killed_and_stopped_is_accounted_for(tmp_path: Path) -> None:
    """The wall clock of this test, from the start of the first process to the last writing of the last one: how long
    an interpreter takes to go is not a part of a run's life."""
    run = Run(tmp_path / "run", overrides=("train.steps=60", "train.log_every=1"))
    begun = time.time()
    run.kill_at(17)
    time.sleep(2)
    run.kill_at(34)
    process = run.start()
    while run.last_step() < 45:
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait() == 75
    time.sleep(2)
    run.train()
    wall = (run.folder / GOODPUT).stat().st_mtime - begun
    spent = goodput(run.folder)
    assert spent is not None
    print({kind: round(seconds, 2) for kind, seconds in spent.seconds.items()}, f"wall {wall:.2f}")  # -s: figures
    assert spent.wall == pytest.approx(wall, rel=0.01)
    assert spent.seconds["lost"] > 0
    assert spent.seconds["down"] > 4
    assert len({row["life"] for row in read(run.folder / GOODPUT)}) == 4
    assert {"startup", "productive", "data_wait", "checkpoint", "evaluation", "finishing"} <= spent.seconds.keys()


def test_the_time_in_which_a_run_was_finished_is_not_down(tmp_path: Path) -> None:
    def at(seconds: float) -> str:
        return (NOON + timedelta(seconds=seconds)).isoformat()

    def line(told: float, life: str, step: int, **seconds: float) -> Row:
        return {"time": at(told), "life": life, "step": step, "seconds": seconds}

    rows = [
        line(10, "a", 5, startup=1, productive=9),
        line(110, "b", 9, startup=2, productive=7, finishing=1),  # killed for 90 s
        line(1010, "c", 12, startup=2, productive=8),  # made longer after 890 s
        line(1020, "c", 12, finishing=10),
    ]
    events = [
        {"time": at(1), "kind": "start"}, {"time": at(102), "kind": "resume"}, {"time": at(109), "kind": "finished"},
        {"time": at(1002), "kind": "resume"}, {"time": at(1010), "kind": "finished"}, {"kind": "by hand"},
    ]  # fmt: skip
    for name, lines in ((FILE, rows), ("events.jsonl", events)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    spent = goodput(tmp_path)
    assert spent
    assert spent.seconds["down"] == pytest.approx(90)
    assert spent.wall == pytest.approx(1020 - 890)
    (tmp_path / "metrics.jsonl").touch()
    assert load(tmp_path).restarts == 1
