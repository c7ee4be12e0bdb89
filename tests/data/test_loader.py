from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from trainer.data.loader import read_ahead
from trainer.errors import ConfigError, DataError, TrainingError

BOTH = pytest.mark.parametrize("processes", [False, True], ids=["threads", "processes"])


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def wait_for(condition, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# What worker processes make: they find these by name.


def uneven(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number % 3 == 0 else 0)
    return number, os.getpid()


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 3), number), "b": torch.arange(number), "none": torch.empty(0, 4)}


def broken(error: Exception, at: int, number: int) -> int:
    if number == at:
        raise error
    return number


def stuck(folder: str, number: int) -> int:
    """Item 1 never comes; tells by a file that it is being made."""
    if number == 1:
        Path(folder, str(os.getpid())).touch()
        time.sleep(600)
    return number


def dies(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


class Unportable(Exception):
    def __init__(self, *, reason: str):
        super().__init__(reason)


class Missing:
    """Stands for an object whose module is not there in the worker."""

    def __reduce__(self):
        return __import__, ("no_such_module_anywhere",)

    def __call__(self, number: int) -> int:
        return number


@BOTH
@pytest.mark.parametrize(("workers", "depth"), [(1, 1), (2, 5), (3, 2)])
def test_the_order_is_that_of_the_numbers(workers: int, depth: int, processes: bool) -> None:
    reader = read_ahead(uneven, 7, depth=depth, workers=workers, processes=processes)
    items = [next(reader) for _ in range(40)]
    reader.close()
    assert [number for number, _ in items] == list(range(7, 47))
    makers = {pid for _, pid in items}
    assert len(makers) == min(workers, depth) if processes else makers == {os.getpid()}
    assert (os.getpid() in makers) is not processes


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("depth", [1, 4])
def test_it_reads_depth_items_ahead_and_no_more(depth: int, workers: int) -> None:
    made: list[int] = []
    reader = read_ahead(lambda number: made.append(number) or number, 0, depth=depth, workers=workers)
    for taken in range(5):
        assert wait_for(lambda taken=taken: len(made) == taken + depth)
        time.sleep(0.02)
        assert sorted(made) == list(range(taken + depth))
        assert next(reader) == taken
    reader.close()


def test_threads_work_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=60)
    reader = read_ahead(lambda number: meeting.wait() >= 0, 0, depth=3, workers=3)
    assert [next(reader) for _ in range(9)] == [True] * 9
    reader.close()


def test_tensors_come_back_from_processes_as_they_were() -> None:
    reader = read_ahead(tensors, 0, depth=3, workers=2, processes=True)
    for number in range(20):
        item, expected = next(reader), tensors(number)
        assert item.keys() == expected.keys()
        assert all(torch.equal(item[name], expected[name]) for name in expected)
    reader.close()


@BOTH
def test_an_error_comes_in_its_place_with_its_fields_and_stays(processes: bool) -> None:
    error = DataError("a.tar: byte 512: sample 'k': no JPEG", shard="a.tar", key="k", byte=512)
    reader = read_ahead(partial(broken, error, 12), 10, depth=4, workers=2, processes=processes)
    assert [next(reader), next(reader)] == [10, 11]
    for _ in range(3):
        with pytest.raises(DataError) as caught:
            next(reader)
        assert type(caught.value) is DataError
        assert str(caught.value) == "a.tar: byte 512: sample 'k': no JPEG"
        assert (caught.value.shard, caught.value.key, caught.value.byte) == ("a.tar", "k", 512)
        assert caught.value.exit_code == 3
    reader.close()


@BOTH
def test_an_unexpected_error_keeps_its_type_and_its_traceback(processes: bool) -> None:
    reader = read_ahead(partial(broken, OSError(5, "disk on fire"), 0), 0, depth=1, workers=1, processes=processes)
    with pytest.raises(OSError, match="disk on fire") as caught:
        next(reader)
    assert caught.value.errno == 5
    where = str(caught.value.__cause__) if processes else str([entry.name for entry in caught.traceback])
    assert "broken" in where
    reader.close()


def test_an_error_that_cannot_be_pickled_is_told_of() -> None:
    make = partial(broken_unportably, 1)
    reader = read_ahead(make, 0, depth=1, workers=1, processes=True)
    assert next(reader) == 0
    with pytest.raises(RuntimeError, match=r"^Unportable: of glass$"):
        next(reader)
    reader.close()


def broken_unportably(at: int, number: int) -> int:
    if number == at:
        raise Unportable(reason="of glass")
    return number


def test_what_a_worker_cannot_import_is_an_error_with_its_cause() -> None:
    reader = read_ahead(Missing(), 0, depth=1, workers=1, processes=True)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        next(reader)
    reader.close()


def test_what_cannot_be_sent_to_a_process_is_a_problem_of_the_config() -> None:
    with pytest.raises(ConfigError, match=r"data\.processes=true: .*lambda"):
        read_ahead(lambda number: number, 0, depth=1, workers=1, processes=True)


def test_a_worker_process_that_dies_is_named_with_what_to_do() -> None:
    reader = read_ahead(dies, 0, depth=2, workers=1, processes=True)
    assert [next(reader) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(TrainingError, match=r"killed by SIGKILL; most likely memory ran out: lower data\.workers"):
        next(reader)
    reader.close()


def test_signals_for_the_whole_job_do_not_end_the_workers() -> None:
    reader = read_ahead(uneven, 0, depth=2, workers=2, processes=True)
    workers = {next(reader)[1] for _ in range(8)}
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker, number)
    assert {next(reader)[1] for _ in range(8)} == workers
    reader.close()
    assert wait_for(lambda: not any(map(alive, workers)))


@BOTH
def test_close_while_the_makers_wait_for_room(processes: bool) -> None:
    others = set(readers())
    reader = read_ahead(uneven, 0, depth=2, workers=2, processes=processes)
    workers = {next(reader)[1] for _ in range(4)} - {os.getpid()}
    time.sleep(0.05)
    reader.close()
    assert wait_for(lambda: not set(readers()) - others)
    assert wait_for(lambda: not any(map(alive, workers)))
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(reader)
        reader.close()


@BOTH
def test_close_while_the_makers_are_stuck(processes: bool, tmp_path: Path) -> None:
    reader = read_ahead(partial(stuck, str(tmp_path)), 0, depth=4, workers=2, processes=processes)
    assert next(reader) == 0
    assert wait_for(lambda: len(list(tmp_path.iterdir())) == 1)
    start = time.monotonic()
    reader.close()
    assert time.monotonic() - start < 10  # of the 600 s
    with pytest.raises(StopIteration):
        next(reader)
    (worker,) = [int(path.name) for path in tmp_path.iterdir()]
    assert worker == os.getpid() or wait_for(lambda: not alive(worker))


@BOTH
def test_close_frees_a_waiting_consumer(processes: bool, tmp_path: Path) -> None:
    reader = read_ahead(partial(stuck, str(tmp_path)), 1, depth=1, workers=1, processes=processes)
    got: list[list[int]] = []
    consumer = threading.Thread(target=lambda: got.append(list(reader)))
    consumer.start()
    assert wait_for(lambda: len(list(tmp_path.iterdir())) == 1)
    reader.close()
    consumer.join(60)
    assert got == [[]]


@BOTH
def test_a_dropped_reader_ends_its_makers(processes: bool) -> None:
    others = set(readers())  # threads that earlier tests left stuck may end at any time
    reader = read_ahead(uneven, 0, depth=2, workers=2, processes=processes)
    workers = {next(reader)[1] for _ in range(4)} - {os.getpid()}
    mine = set(readers()) - others
    assert len(mine) == 2
    del reader
    gc.collect()
    assert wait_for(lambda: not any(thread.is_alive() for thread in mine))
    assert wait_for(lambda: not any(map(alive, workers)))


@pytest.mark.parametrize(("depth", "workers"), [(0, 1), (1, 0)])
def test_depth_and_workers_must_be_positive(depth: int, workers: int) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        read_ahead(uneven, 0, depth=depth, workers=workers)


PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from trainer.data.loader import read_ahead

def all_begun():  # else one worker may make the first items before the other's thread runs at all
    while len(os.listdir({folder!r})) < (2 if {processes} else 1):
        time.sleep(0.01)

def make(number):
    Path({folder!r}, str(os.getpid())).touch()
    all_begun()
    time.sleep({sleep})
    return number

if __name__ == "__main__":
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()  # a parent with threads
    reader = read_ahead(make, 0, depth=3, workers=2, processes={processes})
    all_begun()
    print("ready", flush=True)
    {end}
"""

AT_WORK, STUCK_LATER, STUCK = "0.01", "0 if number < 2 else 600", "600"


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    ("end", "code", "sleep"),
    [("", 0, AT_WORK), ("raise SystemExit(7)", 7, STUCK), ("next(iter([]))", 1, STUCK_LATER)],
    ids=["end", "exit", "exception"],
)
def test_the_interpreter_ends_with_a_live_reader(
    end: str, code: int, sleep: str, processes: bool, tmp_path: Path
) -> None:
    done, folder = run(tmp_path, end, sleep, processes)
    assert (done.returncode, done.stdout) == (code, "ready\n")
    assert ("StopIteration" in done.stderr) if "next" in end else done.stderr == ""
    workers = [int(worker.name) for worker in folder.iterdir()]
    assert wait_for(lambda: not any(map(alive, workers)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "sleep"),
    [(signal.SIGKILL, AT_WORK), (signal.SIGKILL, STUCK), (signal.SIGTERM, STUCK_LATER)],
    ids=["at work", "stuck", "stuck later"],
)
def test_no_worker_outlives_a_parent_that_is_killed(number: int, sleep: str, tmp_path: Path) -> None:
    done, folder = run(tmp_path, f"os.kill(os.getpid(), {int(number)})", sleep, True)
    assert (done.returncode, done.stdout) == (-number, "ready\n")  # read to its end: nobody holds it open any more
    workers = [int(worker.name) for worker in folder.iterdir()]
    assert len(workers) == 2
    assert wait_for(lambda: not any(map(alive, workers)))


@pytest.mark.slow
def test_a_long_folder_for_temporary_files(tmp_path: Path) -> None:
    """Addresses of sockets have room for 107 bytes; batch systems make folders of temporary files that leave none."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    for end in ("print(next(reader), next(reader))", "raise SystemExit(7)"):
        done, folder = run(tmp_path, end, AT_WORK, True, TMPDIR=str(long))
        assert done.stderr == ""
        assert done.stdout == ("ready\n0 1\n" if "print" in end else "ready\n")
        shutil.rmtree(folder)


def run(
    tmp_path: Path, end: str, sleep: str, processes: bool, **environ: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder, program = tmp_path / "workers", tmp_path / "program.py"
    folder.mkdir()
    program.write_text(PROGRAM.format(folder=str(folder), sleep=sleep, processes=processes, end=end))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environ
    command = [sys.executable, str(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment), folder
