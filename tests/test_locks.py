"""Locks where the file system has none: leases that name their holder and end some time after it, on any machine."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout

from launch.checkpoint_names import hold_run_lock
from trainer import leases, locks
from trainer.config.compose import load
from trainer.data.storage import cache
from trainer.data.tools.pack import Options, pack_inputs
from trainer.errors import ConfigError
from trainer.run_directory import RunDirectory, set_aside
from trainer.topology import ALONE

ELSEWHERE = {"host": "node-that-broke", "boot": "another", "pid": 4711, "started": "1", "since": 0.0, "id": "x"}


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(_fd: int, _how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSYS)
    monkeypatch.setattr(leases, "SETTLE_S", 0.05)
    monkeypatch.setattr(leases, "RENEW_S", 0.05)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").touch()
    return folder


def left(path: Path, **others: Any) -> Path:
    """A lease of a process of another machine."""
    lease = locks.lease_of(path)
    lease.write_text(json.dumps({**ELSEWHERE, **others}))
    return lease


@pytest.fixture
def renewed(run_dir: Path) -> Iterator[Path]:
    """The lease of a process of another machine, which lives."""
    lease, stop = left(run_dir / ".lock"), threading.Event()

    def renew() -> None:
        while not stop.wait(0.05):
            with suppress(FileNotFoundError):
                os.utime(lease)

    thread = threading.Thread(target=renew)
    thread.start()
    yield lease
    stop.set()
    thread.join()


@pytest.mark.usefixtures("no_flock")
def test_a_lease_is_exclusive_and_names_its_holder(tmp_path: Path) -> None:
    lock = locks.acquire(tmp_path / "lock")
    with pytest.raises(Timeout):
        locks.acquire(tmp_path / "lock")
    told = locks.holder(tmp_path / "lock")
    assert f"{tmp_path}/lock.lease: process {os.getpid()} on {os.uname().nodename} since 20" in told
    assert "renewed 0 s ago" in told
    lock.release()
    assert os.listdir(tmp_path) == ["lock"]
    locks.acquire(tmp_path / "lock").release()


@pytest.mark.usefixtures("no_flock")
def test_what_is_not_renewed_is_taken_over_from_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leases, "LEASE_S", 1.0)
    monkeypatch.setattr(leases, "REPORT_AFTER_S", 0.1)
    left(tmp_path / "lock")
    began = time.monotonic()
    lock = locks.acquire(tmp_path / "lock")
    assert time.monotonic() - began >= 1
    assert "held by process 4711 on node-that-broke" in capfd.readouterr().err
    with pytest.raises(Timeout):  # it is renewed from now on
        locks.acquire(tmp_path / "lock")
    lock.release()


@pytest.mark.usefixtures("no_flock")
def test_who_lives_on_another_machine_keeps_it(renewed: Path, run_dir: Path) -> None:
    """For as long as it renews the lease, whatever the clocks say; and the refusal names it."""
    config = load(["experiment=none", "model.layers=1", f"run.dir={run_dir}"])
    expected = rf"process trains in this folder \({renewed}: process 4711 on node-that-broke .*; stop it, or choose"
    with pytest.raises(ConfigError, match=expected):
        RunDirectory(config, lambda _: {}, ALONE, 0.0)
    with pytest.raises(ConfigError, match=f"{renewed}: process 4711"), hold_run_lock(run_dir):
        pass
    with pytest.raises(Timeout):
        set_aside(run_dir)


HOLD = """
import errno, fcntl, os, sys, time
from pathlib import Path
def flock(*_): raise OSError(errno.ENOSYS, "")
fcntl.flock = flock
from trainer import locks
lock = locks.acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.usefixtures("no_flock")
def test_killed_it_is_taken_over_at_once_on_its_machine_and_later_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    for host in ("this", "another"):
        with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == "held\n"
            with pytest.raises(Timeout):
                locks.acquire(path)
            process.send_signal(signal.SIGKILL)
        if host == "another":
            monkeypatch.setattr(leases, "LEASE_S", 1.0)
            owner = json.loads(locks.lease_of(path).read_text())
            locks.lease_of(path).write_text(json.dumps({**owner, "boot": "another", "host": "another"}))
        locks.acquire(path).release()


@pytest.mark.usefixtures("no_flock")
def test_of_many_that_take_over_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_S", 1.0)
    left(tmp_path / "lock")
    got: list[Any] = []

    def take() -> None:
        try:
            got.append(locks.acquire(tmp_path / "lock"))
        except Timeout:
            got.append(None)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([lock for lock in got if lock is not None]) == 1
    assert len(got) == 8


@pytest.mark.usefixtures("no_flock")
def test_a_lease_that_was_removed_is_made_again_one_that_is_anothers_is_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lock = locks.acquire(tmp_path / "lock")
    lease = locks.lease_of(tmp_path / "lock")
    lease.unlink()
    wait_for(lease.exists)
    lease.write_text(json.dumps(ELSEWHERE))
    said: list[str] = []
    wait_for(lambda: said.append(capfd.readouterr().err) or "is another process's now" in "".join(said))
    lock.release()
    assert json.loads(lease.read_text()) == ELSEWHERE


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("no_flock")
def test_who_is_waited_for_is_named(
    renewed: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "REPORT_AFTER_S", 0.1)
    threading.Timer(1, renewed.unlink).start()
    with locks.hold_when_free(run_dir / ".lock"):
        told = capfd.readouterr().err
    assert f"waiting for the lock {run_dir}/.lock" in told
    assert "process 4711 on node-that-broke" in told


@pytest.mark.usefixtures("no_flock")
def test_caches_and_packing_do_with_leases(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a\nb\n" * 50)
    out = tmp_path / "out"
    pack_inputs([tmp_path / "in.txt"], out, Options(split="lines", tokenizer="bytes", validation=0))
    assert list(out.glob("*.tar"))
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "cache").mkdir()
    chunks = cache.Cache(str(tmp_path / "cache"), 1 << 20)
    chunks.put("k" * 32, 0, b"chunk")
    assert chunks.on_disk
    assert chunks.get("k" * 32, 0, 0, 5) == b"chunk"


def test_the_kernels_lock_tells_no_holder(tmp_path: Path) -> None:
    with locks.hold_when_free(tmp_path / "lock"):
        assert locks.holder(tmp_path / "lock") == ""
        with pytest.raises(Timeout):
            locks.acquire(tmp_path / "lock")


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (errno.ENOLCK, "cannot be locked: No locks available: its lock service does not answer"),
        (errno.EOPNOTSUPP, "cannot be locked: Operation not supported: its file system cannot lock files"),
    ],
)
def test_a_file_system_that_refuses_locks_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, problem: str
) -> None:
    config = load(["experiment=none", "model.layers=1", f"run.dir={tmp_path}/run"])
    (tmp_path / "in.txt").write_text("a\nb\n")
    refuse(monkeypatch, number)
    with pytest.raises(ConfigError, match=rf"run\.dir={tmp_path}/run: {problem}.*; choose another run\.dir"):
        RunDirectory(config, lambda _: {}, ALONE, 0.0)
    with pytest.raises(ConfigError, match=f"out: {problem}"):
        pack_inputs([tmp_path / "in.txt"], tmp_path / "out", Options())


def test_a_folder_behind_a_link_is_set_aside_where_it_lies(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "run", tmp_path / "link"
    real.mkdir(parents=True)
    (real / "config.yaml").touch()
    link.symlink_to(real)
    set_aside(link)
    assert link.resolve() == real
    assert (tmp_path / "disk" / "run.old-1" / "config.yaml").exists()
    assert os.listdir(real) == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_by_strace(tmp_path: Path) -> None:
    """Without a lock of the kernel, as its own error says it: two at once, one killed, the other goes on."""
    code = HOLD.replace("fcntl.flock = flock\n", "")
    log = tmp_path / "log"
    command = ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=flock", "-e", "inject=flock:error=ENOSYS"]
    command += [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        assert first.stdout.readline() == "held\n"
        second = subprocess.run(command, capture_output=True, text=True)
        assert "Timeout" in second.stderr
        holder = json.loads((tmp_path / "lock.lease").read_text())["pid"]
        os.kill(holder, signal.SIGKILL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as third:
        assert third.stdout
        assert third.stdout.readline() == "held\n"
        assert "INJECTED" in log.read_text()
        os.kill(json.loads((tmp_path / "lock.lease").read_text())["pid"], signal.SIGKILL)
