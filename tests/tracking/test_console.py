"""What a person sees: plain lines through a pipe, a live bar on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.tracking.demo_run import evaluation, info, row
from trainer.tracking.base import Row
from trainer.tracking.console import Console, duration
from trainer.tracking.jsonl import read


def shown(rows: list[Row], events: list[Row] | None = None, steps: int = 2000) -> list[str]:
    file = io.StringIO()
    console = Console(file)
    console.start(info(Path("run"), steps=steps))
    console.rows(rows)
    for event in events or []:
        console.event(event)
    console.close({"state": "finished"})
    return file.getvalue().splitlines()


def test_a_plain_line_a_flush() -> None:
    first = row(9, loss=99, step_s=1.0, data_wait_s=0.5, tokens_per_s=1000)
    last = row(10, loss=2.34567, grad_norm=0.5, lr=3e-4, step_s=3.0, data_wait_s=0.5, tokens_per_s=3000, skipped=True)
    (line,) = shown([first, last])
    assert " ".join(line.split()) == (
        "step 10/2000 loss 2.3457 norm 0.500 lr 3.00e-04 2,500 tok/s data 25.0% skipped 1 eta 1:06:20"
    )


def test_lines_are_aligned_and_never_wrapped() -> None:
    lines = [shown([row(step, mfu=0.41, mem_gib=12.5)])[0] for step in (1, 77, 1999)]
    assert len({line.index("eta") for line in lines}) == 1
    assert "mfu  41.0%" in lines[0]
    assert "mem  12.50 GiB" in lines[0]
    assert len(lines[0]) > 80


def test_an_evaluation_is_shown_with_its_units() -> None:
    values = {"loss": 1.5, "nats_per_char": 1.25, "bits_per_byte": 1.75, "sequences": 436}
    lines = shown([row(10, eval=values)])
    assert lines[0] == "evaluation  step 10  loss 1.5000  1.2500 nats/char  1.7500 bits/byte  436 sequences"
    assert len(lines) == 2
    assert "bits/byte" not in shown([row(10, eval={"loss": 1.5})])[0]


def test_an_event_shows_all_it_has_to_say_as_it_is() -> None:
    event = {
        "time": "now",
        "kind": "tracker_off",
        "step": 7,
        "reason": "[red]rank 2[/red]",
        "lost": 3,
        "after": 1 / 3,
    }
    assert shown([], [event]) == ["tracker_off step 7  reason [red]rank 2[/red]  lost 3  after 0.3333"]


def test_the_reason_of_an_end_is_left_to_the_block_that_tells_it() -> None:
    event = {"time": "now", "kind": "failed", "step": 7, "reason": "no more"}
    assert shown([], [event]) == ["failed      step 7"]


def test_the_remaining_time_counts_training_only() -> None:
    rows = [row(step, step_s=2.0) for step in range(1, 51)]
    assert shown(rows, steps=100)[0].endswith("eta 01:40")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "00:00"), (59.6, "01:00"), (3599, "59:59"), (90061, "25:01:01")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_reader_that_has_gone_ends_the_console_and_not_the_run(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from demo_run import info, row
from trainer.tracking import JsonlTracker, Trackers
from trainer.tracking.console import Console
folder = Path(sys.argv[1])
trackers = Trackers(JsonlTracker(folder), [Console()])
trackers.start(info(folder))
trackers.rows([row(1)])
trackers.rows([row(2)])
trackers.close({"state": "finished"})
print("the run's last words")
"""
    gone, pipe = os.pipe()
    os.close(gone)
    command = [sys.executable, "-c", script, tmp_path, Path(__file__).parent]
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True)
    os.close(pipe)
    (said,) = done.stderr.splitlines()
    assert said.startswith("Console tracking is off from here on: BrokenPipeError")
    assert done.returncode == 0
    assert [found["step"] for found in read(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [event["kind"] for event in read(tmp_path / "events.jsonl")] == ["tracker_off"]


def read_all(terminal: int, seen: list[bytes]) -> None:
    """Until the other side closes, which Linux tells by an error."""
    with suppress(OSError):
        while part := os.read(terminal, 4096):
            seen.append(part)
    os.close(terminal)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, slave = pty.openpty()
    seen: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(master, seen))
    reader.start()
    with os.fdopen(slave, "w") as terminal:
        console = Console(terminal)
        console.start(info(Path("run"), steps=20))
        console.rows([row(10, loss=2.5, eval=evaluation(10))])
        console.event({"kind": "checkpoint", "step": 10})
        console.rows([row(20, loss=1.5)])
        console.close({"state": "finished"})
    reader.join()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(seen).decode())
    assert "━" in text
    assert "10/20" in text
    assert "loss 2.5000" in text
    assert re.search(r"checkpoint +step 10", text)
    last = text.rstrip().splitlines()[-1]
    assert "20/20" in last
    assert "eta 00:00" in last
    assert len(last.strip()) <= 140
