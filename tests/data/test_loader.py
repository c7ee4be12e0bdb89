from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from trainer.data.loader import Prefetch, concurrently


def prefetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_for(condition, seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_order_is_kept_and_the_end_stays_the_end(depth: int) -> None:
    reader = Prefetch(iter(range(100)), depth)
    assert list(reader) == list(range(100))
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(reader)


@pytest.mark.parametrize("depth", [1, 3])
def test_it_reads_depth_items_ahead_and_no_more(depth: int) -> None:
    made = []
    reader = Prefetch((made.append(i) or i for i in count()), depth)
    for taken in range(5):
        assert wait_for(lambda taken=taken: len(made) == taken + depth)
        time.sleep(0.02)
        assert len(made) == taken + depth
        assert next(reader) == taken
    reader.close()


def test_an_error_comes_in_its_place_with_its_traceback_and_stays() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk on fire")

    reader = Prefetch(broken(), 5)
    assert [next(reader), next(reader)] == [1, 2]
    for _ in range(3):
        with pytest.raises(OSError, match="disk on fire") as caught:
            next(reader)
        assert "broken" in [entry.name for entry in caught.traceback]


def test_close_while_the_producer_waits_for_room() -> None:
    others = set(prefetchers())
    reader = Prefetch(count(), 2)
    assert next(reader) == 0
    time.sleep(0.05)
    start = time.monotonic()
    reader.close()
    assert time.monotonic() - start < 0.3
    assert not set(prefetchers()) - others
    with pytest.raises(StopIteration):
        next(reader)
    reader.close()


def test_close_while_the_iterator_is_stuck() -> None:
    release = threading.Event()

    def stuck() -> Iterator[int]:
        yield 0
        release.wait(30)
        yield 1

    reader = Prefetch(stuck(), 2)
    assert next(reader) == 0
    start = time.monotonic()
    reader.close()
    assert time.monotonic() - start < 1
    with pytest.raises(StopIteration):
        next(reader)
    release.set()


def test_close_frees_a_waiting_consumer() -> None:
    release, ended = threading.Event(), threading.Event()

    def stuck() -> Iterator[int]:
        release.wait(30)
        yield 1

    reader = Prefetch(stuck(), 2)

    def consume() -> None:
        assert list(reader) == []
        ended.set()

    threading.Thread(target=consume).start()
    time.sleep(0.05)
    reader.close()
    assert ended.wait(5)
    release.set()


def test_a_dropped_reader_ends_its_thread() -> None:
    others = set(prefetchers())  # threads that earlier tests left stuck may end at any time
    reader = Prefetch(count(), 2)
    assert next(reader) == 0
    (mine,) = set(prefetchers()) - others
    del reader
    gc.collect()
    assert wait_for(lambda: not mine.is_alive())


def test_jobs_run_at_the_same_time_and_an_error_is_raised() -> None:
    meeting = threading.Barrier(3, timeout=10)
    done = []
    concurrently(lambda job: done.append((job, meeting.wait() >= 0)), range(3))
    assert sorted(done) == [(0, True), (1, True), (2, True)]
    with pytest.raises(ZeroDivisionError):
        concurrently(lambda job: 1 // job, [1, 0, 2])


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="depth"):
        Prefetch(count(), 0)


@pytest.mark.parametrize(
    "iterator",
    [
        "itertools.count()",  # waiting for room
        "(time.sleep(0.01) for _ in itertools.count())",  # at work
        "(time.sleep(60) for _ in itertools.count(1))",  # stuck
    ],
)
@pytest.mark.parametrize("end", ["", "raise SystemExit(7)"])
def test_the_interpreter_ends_with_a_live_reader(iterator: str, end: str) -> None:
    program = f"""
import itertools, time
from trainer.data.loader import Prefetch
reader = Prefetch({iterator}, 3)
time.sleep(0.05)
print("ready", flush=True)
{end}
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (7 if end else 0, "ready\n", "")
    assert time.monotonic() - start < 20
