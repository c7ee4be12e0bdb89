"""A disk that is full, read-only or broken: nothing of the record is lost, it is told once, and the run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runs import Run
from tests.tracking.demo_run import info, row
from trainer.errors import TrainingError
from trainer.tracking import JsonlTracker, Trackers
from trainer.tracking import run_files as disks
from trainer.tracking.base import Row
from trainer.tracking.jsonl import encode, read, read_status
from trainer.tracking.run_files import RunFiles


class Mount:
    """A small disk of its own."""

    def __init__(self, folder: Path, size: str):
        self.folder, self.filler = folder, folder / "filler"
        folder.mkdir()
        self("-t", "tmpfs", "-o", f"size={size}", "tmpfs")

    def __call__(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self.folder)], check=True, capture_output=True)

    def fill(self, but: int = 0) -> None:
        """Leaves `but` bytes."""
        with self.filler.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                file.truncate(max(0, file.tell() - but))

    def free(self) -> None:
        self.filler.unlink()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Mount]]:
    made = []

    def make(size: str) -> Mount:
        try:
            made.append(Mount(tmp_path / "disk", size))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"only who may mount a tmpfs can run out of room: {error}")
        return made[-1]

    yield make
    for each in made:
        subprocess.run(["umount", "-l", str(each.folder)], check=True)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "RETRY_S", 0.0)


def trackers(folder: Path, said: list[str]) -> Trackers:
    made = Trackers(JsonlTracker(folder), say=said.append)
    made.start(info(folder))
    return made


def steps(path: Path) -> list[int]:
    return [each["step"] for each in read(path)]


@pytest.mark.parametrize("room", [0, 4096])
def test_a_full_disk_loses_nothing_and_is_told_once(mount: Callable[[str], Mount], room: int) -> None:
    """With some room left, a line is torn in the middle."""
    disk, said = mount("256k"), list[str]()
    tell = trackers(disk.folder, said)
    tell.rows([row(step) for step in range(1, 30)])
    tell.event({"kind": "checkpoint", "step": 29})
    disk.fill(but=room)
    for step in range(30, 120):
        tell.rows([row(step)])
    tell.event({"kind": "checkpoint", "step": 119})
    assert len(said) == 1
    assert "metrics.jsonl cannot be written: No space left on device. Training goes on" in said[0]
    before = steps(disk.folder / "metrics.jsonl")
    assert before == list(range(1, len(before) + 1))
    assert 29 <= len(before) < 60
    disk.free()
    tell.rows([row(120)])
    assert len(said) == 2
    assert said[1].endswith("can be written again: nothing was lost")
    tell.close({"state": "finished"})
    assert read(disk.folder / "metrics.jsonl") == [row(step) for step in range(1, 121)]
    events = read(disk.folder / "events.jsonl")
    assert [event["kind"] for event in events] == ["checkpoint", "disk_failed", "checkpoint", "disk_recovered"]
    assert (events[1]["file"], events[1]["step"]) == ("metrics.jsonl", before[-1] + 1)
    assert events[3]["lines"] - (119 - before[-1]) in (0, 1, 2)  # the events, if there was no room for them either
    assert events[3]["step"] == 120


def test_trouble_that_comes_again_is_told_again(mount: Callable[[str], Mount]) -> None:
    disk, said = mount("64k"), list[str]()
    tell = trackers(disk.folder, said)
    for first in (1, 100):
        disk.fill()
        for step in range(first, first + 40):
            tell.rows([row(step)])
        disk.free()
        tell.rows([row(first + 40)])
    assert ["cannot be written" in text for text in said] == [True, False, True, False]
    assert steps(disk.folder / "metrics.jsonl") == [*range(1, 42), *range(100, 141)]


def test_a_folder_that_became_read_only(mount: Callable[[str], Mount]) -> None:
    disk, said = mount("256k"), list[str]()
    tell = trackers(disk.folder, said)
    tell.rows([row(1)])
    tell.record.close({})
    tell.run_files.replace("status.json", encode({"step": 1}))
    disk("-o", "remount,ro")
    tell.rows([row(2)])
    tell.run_files.replace("status.json", encode({"step": 2}))
    tell.rows([row(3)])
    assert len(said) == 1
    assert "Read-only file system" in said[0]
    assert read_status(disk.folder) == {"step": 1}
    disk("-o", "remount,rw")
    tell.rows([row(4)])
    tell.close({"state": "finished"})
    assert steps(disk.folder / "metrics.jsonl") == [1, 2, 3, 4]
    assert read_status(disk.folder) == {"step": 2}


def test_a_folder_that_is_gone_and_comes_back(tmp_path: Path) -> None:
    said, folder = list[str](), tmp_path / "run"
    tell = trackers(folder, said)
    tell.rows([row(1)])
    tell.record.close({})
    folder.rename(tmp_path / "elsewhere")
    tell.rows([row(2)])
    assert "metrics.jsonl cannot be written: No such file or directory" in said[0]
    (tmp_path / "elsewhere").rename(folder)
    tell.rows([row(3)])
    assert steps(folder / "metrics.jsonl") == [1, 2, 3]


def broken(path: Path) -> None:
    """A file for which there is never room."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


def test_a_row_waits_for_its_line_of_the_ledger(tmp_path: Path) -> None:
    disk = RunFiles(tmp_path)
    ledger = disk.open_appender("ledger.jsonl")
    record = JsonlTracker(tmp_path, disk)
    record.start(info(tmp_path))
    broken(tmp_path / "ledger.jsonl")
    for step in (1, 2):
        ledger.append([{"step": step}])
        record.rows([row(step)])
        record.event({"kind": "step", "step": step})
    assert steps(tmp_path / "metrics.jsonl") == []
    assert steps(tmp_path / "events.jsonl") == [1, 2]
    assert disk.news() == [{"kind": "disk_failed", "file": "ledger.jsonl", "reason": "No space left on device"}]
    assert disk.news() == []
    (tmp_path / "ledger.jsonl").unlink()
    record.rows([row(3)])  # the ledger's lines go first, whoever comes
    assert steps(tmp_path / "ledger.jsonl") == [1, 2]
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert [(event["kind"], event["lines"]) for event in disk.news()] == [("disk_recovered", 4)]


def test_an_end_that_cannot_be_written_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[str] = []

    class Told:
        def start(self, _: object) -> None: ...
        def rows(self, _: object) -> None: ...
        def event(self, _: object) -> None: ...
        def close(self, status: Row) -> None:
            states.append(status["state"])

    monkeypatch.setattr(disks, "PATIENCE_S", 0.5)
    tell = Trackers(JsonlTracker(tmp_path), [Told()], say=lambda _: None)
    tell.start(info(tmp_path))
    broken(tmp_path / "metrics.jsonl")
    tell.rows([row(1), row(2)])
    begun = time.monotonic()
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: 2 lines missing\): No space left on device.*Make room"):
        tell.close({"state": "finished"})
    assert 0.5 <= time.monotonic() - begun < 2
    assert states == ["failed"]
    begun = time.monotonic()
    with pytest.raises(TrainingError):
        tell.close({"state": "failed"})
    assert time.monotonic() - begun < 0.4  # given up


def test_a_disk_that_comes_back_at_the_end_is_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    tell = trackers(tmp_path, said)
    broken(tmp_path / "metrics.jsonl")
    tell.rows([row(1), row(2)])
    child = subprocess.Popen(["sh", "-c", f"sleep 0.7; rm {tmp_path}/metrics.jsonl"])
    tell.close({"state": "finished"})
    assert child.wait() == 0
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert [event["kind"] for event in read(tmp_path / "events.jsonl")] == ["disk_failed", "disk_recovered"]
    assert len(said) == 2


def test_what_waits_is_cut_back_with_what_is_there(tmp_path: Path) -> None:
    disk = RunFiles(tmp_path)
    file = disk.open_appender("metrics.jsonl")
    file.append([{"step": 1}, {"step": 2}])
    file.close()
    there = (tmp_path / "metrics.jsonl").rename(tmp_path / "there")
    broken(tmp_path / "metrics.jsonl")
    file.append([{"step": step} for step in range(3, 9)])
    assert file.cut(5) == 5
    there.replace(tmp_path / "metrics.jsonl")
    file.append([{"step": 6}])
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    assert file.cut(1) == 1
    file.append([{"step": 2}])
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_failing_disk_is_not_tried_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "RETRY_S", 0.5)
    file, tries = RunFiles(tmp_path).open_appender("metrics.jsonl"), []
    monkeypatch.setattr(file, "_write", lambda: tries.append(1) or (_ for _ in ()).throw(OSError(5, "Input/output")))
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        file.append([{"step": 1}])
        time.sleep(0.005)
    assert 2 <= len(tries) <= 4


def test_a_limit_of_the_files_size(tmp_path: Path) -> None:
    """In a process of its own: the limit holds for all it writes."""
    script = """
import resource, sys
from pathlib import Path
from trainer.tracking import run_files
run_files.RETRY_S = 0
file = run_files.RunFiles(Path(sys.argv[1])).open_appender("metrics.jsonl")
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
for step in range(100):
    file.append([{"step": step}])
assert file.problem.strerror == "File too large"
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
file.append([{"step": 100}])
assert file.problem is None
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert steps(tmp_path / "metrics.jsonl") == list(range(101))


@pytest.mark.slow
def test_a_run_whose_disk_is_full_for_a_while_ends_as_if_it_had_not_been(
    tmp_path: Path, mount: Callable[[str], Mount]
) -> None:
    disk = mount("16m")
    keys = ("train.steps=400", "checkpoint.every=0", "train.log_every=1")  # time for it to be tried again
    calm, run = Run(tmp_path / "calm", overrides=keys), Run(disk.folder / "run", overrides=keys)
    calm.train()
    process = run.start()
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    said = []
    for text in lines:
        said.append(text)
        if text.startswith("step  20/"):
            disk.fill(but=4096)
        if text.startswith("step 100/"):
            waiting = run.last_step()
            disk.free()
    assert process.wait() == 0, "".join(said)
    assert 20 <= waiting < 60
    print(f"at step 100 the disk had {waiting} rows")  # -s: figures
    assert run.curve() == calm.curve()
    assert run.ledger() == calm.ledger()
    assert run.status()["state"] == "finished"
    kinds = [event["kind"] for event in run.rows("events.jsonl")]
    assert kinds == ["start", "disk_failed", "disk_recovered", "checkpoint", "finished"]
    assert sum("cannot be written: No space left" in text for text in said) == 1
    assert sum("can be written again" in text for text in said) == 1
    assert os.stat(run.folder / "goodput.jsonl").st_size > 0


class Torn(FileIO):
    """A file that takes so many bytes more, and then none."""

    room = 0

    def write(self, data: Any) -> int:
        if Torn.room <= 0:
            raise OSError(28, "No space left on device")
        taken = super().write(data[: Torn.room])
        Torn.room -= taken
        return taken


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 400)), min_size=1, max_size=30))
def test_wherever_a_line_is_torn_none_is_lost_twice_or_out_of_order(rounds: list[tuple[int, int]]) -> None:
    """Each round brings some lines, and room for some bytes."""
    with TemporaryDirectory() as folder, patch.object(disks, "RETRY_S", 0.0), patch.object(disks, "FileIO", Torn):
        disk, step = RunFiles(Path(folder)), 0
        file = disk.open_appender("metrics.jsonl")
        for lines, room in rounds:
            Torn.room = room
            file.append([{"step": step + n, "text": "é" * n} for n in range(1, lines + 1)])
            step += lines
            there = steps(file.path) if file.path.exists() else []
            assert there == list(range(1, len(there) + 1))
        Torn.room = 1 << 20
        assert file.flush(now=True)
        assert steps(file.path) == list(range(1, step + 1))


@pytest.mark.slow
def test_a_run_whose_record_cannot_be_written_to_the_end_fails_and_says_what_is_missing(
    tmp_path: Path, mount: Callable[[str], Mount]
) -> None:
    """Its checkpoints lie on another disk. The same command, once there is room, has nothing left to train."""
    disk = mount("16m")
    run = Run(disk.folder / "run", overrides=("train.steps=60", "checkpoint.every=0", "train.log_every=1"))
    (tmp_path / "checkpoints").mkdir()
    run.folder.mkdir()
    (run.folder / "checkpoints").symlink_to(tmp_path / "checkpoints")
    process = run.start()
    assert process.stdout is not None
    said = []
    for text in iter(process.stdout.readline, ""):
        said.append(text)
        if text.startswith("step 20/"):
            disk.fill()
    assert process.wait() == 4, "".join(said)
    assert "could not be written to the end (" in "".join(said)
    assert "lines missing" in "".join(said)
    last = run.last_step()
    assert 15 < last < 60
    disk.free()
    run.train()
    assert run.status()["state"] == "finished"
