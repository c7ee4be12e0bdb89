"""The run's own record: what a kill may leave behind, what is cut, and that it is strict JSON."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tracking.demo_run import info, row
from trainer.errors import ConfigError
from trainer.tracking import JsonlTracker
from trainer.tracking.jsonl import cut, read, write_json, write_status


def write_lines(path: Path, steps: range) -> bytes:
    path.write_bytes(b"".join(json.dumps({"step": step, "x": "é" * (step % 7)}).encode() + b"\n" for step in steps))
    return path.read_bytes()


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("torn", [b"", b'{"step": 10', b'{"step": 10}', b"\x00" * 300, b"\n", b'[1]\n{"step"\n'])
@pytest.mark.parametrize("step", [0, 1, 5, 9, 50])
def test_cut_keeps_the_rows_up_to_a_step(tmp_path: Path, step: int, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = write_lines(path, range(1, 10))
    path.write_bytes(whole + torn)
    assert cut(path, step) == min(step, 9)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:step])
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_knows_no_file_and_an_empty_one(tmp_path: Path) -> None:
    assert cut(tmp_path / "metrics.jsonl", 5) == 0
    assert not (tmp_path / "metrics.jsonl").exists()
    (tmp_path / "metrics.jsonl").touch()
    assert cut(tmp_path / "metrics.jsonl", 5) == 0


def test_cut_leaves_a_file_alone_when_there_is_nothing_to_drop(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, range(1, 10))
    before = path.stat()
    assert cut(path, 9) == 9
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_process_left_over_cannot_spoil_the_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, range(1, 10))
    with path.open("ab", buffering=0) as left_over:
        cut(path, 4)
        left_over.write(b'{"step": 10}\n')
    assert steps_in(path) == [1, 2, 3, 4]


def test_a_resumed_run_has_one_row_a_step(tmp_path: Path) -> None:
    first = JsonlTracker(tmp_path)
    first.start(info(tmp_path))
    first.rows([row(step) for step in range(1, 8)])
    first.event({"kind": "checkpoint", "step": 5})
    with (
        (tmp_path / "metrics.jsonl").open("ab") as torn,
        (tmp_path / "events.jsonl").open("ab") as torn_event,
    ):
        torn.write(b'{"step": 8, "lo')
        torn_event.write(b'{"kin')
    second = JsonlTracker(tmp_path)
    second.start(info(tmp_path, step=5))
    second.event({"kind": "resume", "step": 5})
    second.rows([row(6), row(7)])
    second.rows([row(8)])
    second.close({"state": "finished"})
    assert read(tmp_path / "metrics.jsonl") == [row(step) for step in range(1, 9)]
    assert [event["kind"] for event in read(tmp_path / "events.jsonl")] == ["checkpoint", "resume"]


def test_steps_that_do_not_rise_are_refused_whole(tmp_path: Path) -> None:
    record = JsonlTracker(tmp_path)
    record.start(info(tmp_path))
    record.rows([row(1), row(2)])
    for wrong in ([row(2)], [row(3), row(3)], [row(4), row(3)]):
        with pytest.raises(ValueError, match="steps must rise"):
            record.rows(wrong)
    record.rows([row(3)])
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_what_is_not_finite_is_null_and_the_rest_exact(tmp_path: Path) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    record = JsonlTracker(tmp_path)
    record.start(info(tmp_path))
    record.rows([row(1, loss=math.nan, eval={"loss": -math.inf}, grad_norm=math.inf, lr=0.1 + 0.2)])
    found = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert found == row(1, loss=None, eval={"loss": None}, grad_norm=None, lr=0.30000000000000004)


def test_rows_of_a_killed_process_are_there(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from demo_run import info, row
from trainer.tracking import JsonlTracker
record = JsonlTracker(Path(sys.argv[1]))
record.start(info(Path(sys.argv[1])))
record.rows([row(1), row(2)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path, Path(__file__).parent])
    assert done.returncode == -signal.SIGKILL
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2]


def test_read_names_the_line_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 2 "):
        read(path)


def test_read_leaves_a_torn_last_line_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    assert read(path) == [{"step": 1}]
    assert read(tmp_path / "none.jsonl") == []


def test_a_status_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_status(tmp_path, {"state": "running", "step": 3})
    with pytest.raises(TypeError):
        write_json(tmp_path / "status.json", {"state": object()})
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "running", "step": 3}
    assert [each.name for each in tmp_path.iterdir()] == ["status.json"]
